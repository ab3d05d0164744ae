"""Responses of a causal language model: left-padded prompts in, response tokens out."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from kd_lightning.engine.validation import TEMPERATURES, check_count
from kd_lightning.models.hf_adapter import eos_token_ids, max_positions, padding_id
from kd_lightning.schedules import check_number


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled.

    Args:
        max_new_tokens: longest response, at least 1.
        temperature: samples of softmax(logits / temperature), in [0.001, 1000]; 0: greedy.
        top_p: sample from the most likely tokens that together have this probability, in (0, 1].
        min_new_tokens: the end of sequence cannot be one of the first `min_new_tokens` tokens, in [0, max_new_tokens].
        stop: a response ends before the first of these texts that it contains; a text that is complete within the first
            `min_new_tokens` tokens does not count. Special tokens are no part of the text.

    Raises:
        ValueError: an argument is out of its range.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_count("max_new_tokens", self.max_new_tokens)
        greedy = isinstance(self.temperature, (int, float)) and self.temperature == 0
        if not greedy or isinstance(self.temperature, bool):
            check_number("temperature", self.temperature, *TEMPERATURES, hint=", or 0 (greedy)")
        check_number("top_p", self.top_p, 0, 1, "(]")
        if type(self.min_new_tokens) is not int or not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens must be an integer in [0, max_new_tokens {self.max_new_tokens}], "
                f"got {self.min_new_tokens!r}"
            )
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop must be texts that are not empty, got {self.stop!r}")

    def settings(self) -> dict[str, Any]:
        """The arguments, as files of responses hold them: the last two only where they are not their defaults."""
        given: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
        }
        if self.min_new_tokens:
            given["min_new_tokens"] = self.min_new_tokens
        if self.stop:
            given["stop"] = list(self.stop)
        return given

    def max_prompt_tokens(self, model: PreTrainedModel | None, max_length: int | None) -> int:
        """The longest prompt that leaves room for a response.

        Args:
            model: generates the responses; None: it is not in this process.
            max_length: of prompt and response together; None: as long as the model can read.

        Raises:
            ValueError: there is no room for a prompt.
        """
        positions = None if model is None else max_positions(model)
        limits = {"max_length": max_length, "the model's max_position_embeddings": positions}
        given = {name: limit for name, limit in limits.items() if limit is not None}
        for name, limit in given.items():
            if self.max_new_tokens >= limit:
                raise ValueError(
                    f"max_new_tokens must be less than {name} of {limit}, to leave room for a prompt, "
                    f"got {self.max_new_tokens}"
                )
        return min(given.values(), default=1 << 30) - self.max_new_tokens

    def check(self, model: PreTrainedModel, max_length: int | None) -> None:
        """Check that a model can end a response, and that there is room for a prompt.

        Args:
            model: generates the responses.
            max_length: of the data, in tokens; None: not known.

        Raises:
            ValueError: one of them is not the case.
        """
        require_eos_token_ids(model)
        self.max_prompt_tokens(model, max_length)


def stop_strings(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop strings for `Sampling`: of one text, of several, or none."""
    if given is None:
        return ()
    return (given,) if isinstance(given, str) else tuple(given)


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    sampling: Sampling,
    *,
    seed: int = 0,
    processors: Sequence[LogitsProcessor] = (),
    criteria: Sequence[StoppingCriteria] = (),
    together: bool = False,
) -> Tensor:
    """Responses to left-padded prompts, without dropout.

    Args:
        model: a causal LM; its mode (train or eval) is restored afterwards.
        input_ids: prompts, padded on the left, [B, T].
        attention_mask: 1 for tokens, 0 for padding, [B, T].
        sampling: how responses are sampled; `stop` needs `criteria`. Other settings of the model's generation config
            (`top_k`, penalties) are not used: they would change the distribution.
        seed: of the samples; torch's global generators are left unchanged.
        processors: change the logits of each token before temperature and `top_p` are applied.
        criteria: end rows, besides the end of sequence and `max_new_tokens`.
        together: all ranks continue until the last of them has finished, because what they compute with is sharded.

    Returns:
        Response tokens, [B, up to max_new_tokens]; padding after the end of a response.

    Raises:
        ValueError: there are stop strings, and no criteria that find them.
    """
    if sampling.stop and not criteria:
        raise ValueError("criteria must have StopStrings for the stop strings of sampling, got none")
    pad = padding_id(model, model.generation_config.pad_token_id)
    options = _options(sampling)
    if processors:
        options["logits_processor"] = LogitsProcessorList(processors)
    if criteria:
        options["stopping_criteria"] = StoppingCriteriaList(criteria)
    training = model.training
    device = input_ids.device
    if any(part.training for part in model.modules()):
        model.eval()  # type: ignore[no-untyped-call]
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            _seed_generator(device, seed)
            tokens: Tensor = model.generate(  # type: ignore[operator]
                input_ids=input_ids,
                attention_mask=attention_mask,
                max_new_tokens=sampling.max_new_tokens,
                pad_token_id=pad,
                use_cache=True,
                synced_gpus=together,
                **options,
            )
    finally:
        if training:
            model.train()
    return tokens[:, input_ids.shape[1] :]


def _seed_generator(device: torch.device, seed: int) -> None:
    """Seed the generator that samples are drawn with."""
    if device.type == "cpu":  # torch.manual_seed also seeds all accelerators, which takes longer than some tokens do
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def _options(sampling: Sampling) -> dict[str, Any]:
    """Arguments of `model.generate` that say how tokens are sampled."""
    options: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0}
    if sampling.temperature > 0:
        options = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
        options |= {"top_k": 0, "min_p": None}
    if sampling.min_new_tokens:
        options["min_new_tokens"] = sampling.min_new_tokens
    return options


def require_eos_token_ids(model: PreTrainedModel) -> list[int]:
    """The tokens that end a response of this model.

    Raises:
        ValueError: it has none.
    """
    found = eos_token_ids(model)
    if not found:
        raise ValueError(
            "the model's generation config has no eos_token_id, so its responses would never end: set it in "
            "generation_config.json"
        )
    return found


class RestrictVocabulary(LogitsProcessor):
    """Generate only the first tokens of the vocabulary: those that another model has as well.

    Args:
        vocabulary: number of tokens.
    """

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores, −inf outside of the vocabulary."""
        scores[:, self.vocabulary :] = -torch.inf
        return scores


class TeacherMixture(LogitsProcessor):
    r"""Logits of \(a\,p + (1-a)\,q\), with q of the generating model and p of another model for the same tokens.

    Args:
        model: the other model, a causal LM with the same tokens.
        share: a in [0, 1].
        temperature: of both distributions, > 0.
        input_ids: the other model's prompts, padded on the left, [B, T].
        attention_mask: of these prompts, [B, T].
    """

    def __init__(
        self, model: PreTrainedModel, share: float, temperature: float, input_ids: Tensor, attention_mask: Tensor
    ) -> None:
        self.model = model
        self.share = share
        self.temperature = temperature
        self.prompt, self.mask = input_ids, attention_mask
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._cache: Cache | None = None
        self._read = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits that the temperature of generation turns into the mixture."""
        new = self.prompt if self._cache is None else input_ids[:, self._read :]
        if self._cache is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(new.shape)], 1)
        positions = (self.mask.cumsum(1) - 1).clamp_min(0)[:, -new.shape[1] :]
        inputs: dict[str, Any] = {"input_ids": new, "attention_mask": self.mask, "use_cache": True}
        inputs["cache"] = self._cache
        if self._takes_positions:  # other models take them from the attention mask, or have none
            inputs["position_ids"] = positions
        out = self.model(**inputs)
        self._cache, self._read = out.cache, input_ids.shape[1]
        width = min(scores.shape[-1], out.logits.shape[-1])
        p = (out.logits[:, -1, :width].float() / self.temperature).softmax(-1)
        q = (scores[:, :width].float() / self.temperature).softmax(-1)
        mixed = torch.full_like(scores, -torch.inf)
        mixed[:, :width] = (self.share * p + (1 - self.share) * q).log() * self.temperature
        return mixed
