"""Let a causal language model write: prompts in, response tokens out."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from kd_lightning.models.hf_adapter import eos_token_ids, max_positions


def check_sampling(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Refuse settings of generation that are out of range.

    Raises:
        ValueError: it names the one that is.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not temperature >= 0 or temperature == float("inf"):
        raise ValueError(f"temperature must be a number >= 0 (0: the likeliest token each time), got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")


def generate(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    max_new_tokens: int = 32,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    processors: Sequence[LogitsProcessor] = (),
    together: bool = False,
) -> Tensor:
    """Responses to left-padded prompts, dropout off.

    Args:
        model: a causal LM; its mode (train or eval) is put back afterwards.
        input_ids: prompts, padded on the left, [B, T].
        attention_mask: 1 where there is a token, [B, T].
        max_new_tokens: longest response, > 0.
        temperature: 0: the likeliest token each time; otherwise samples of softmax(logits / temperature).
        top_p: sample from the likeliest tokens that together have this mass, in (0, 1].
        seed: of the samples; the generators outside are left as they were.
        processors: change the logits of each token before temperature and `top_p`.
        together: all ranks write until the last of them has finished, as what they compute with is spread over them.

    Returns:
        Response tokens, [B, up to max_new_tokens]; after the end of a response, padding.

    Raises:
        ValueError: a setting is out of its range.
    """
    check_sampling(max_new_tokens, temperature, top_p)
    config = model.generation_config
    eos = config.eos_token_id
    pad = config.pad_token_id if config.pad_token_id is not None else (eos[0] if isinstance(eos, list) else eos)
    # top_k, repetition penalties and the like that a folder brings along would make another distribution of it
    plain = {"top_k": 0, "top_p": top_p, "temperature": temperature, "repetition_penalty": 1.0, "min_p": None}
    sampling: dict[str, Any] = {"do_sample": True, **plain} if temperature > 0 else {"do_sample": False}
    if processors:
        sampling["logits_processor"] = LogitsProcessorList(processors)
    training = model.training
    device = input_ids.device
    if any(part.training for part in model.modules()):
        model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            tokens: Tensor = model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
                use_cache=True,
                synced_gpus=together,
                **sampling,
            )
    finally:
        if training:
            model.train()
    return tokens[:, input_ids.shape[1] :]


def require_eos_token_ids(model: PreTrainedModel) -> list[int]:
    """The tokens that end a response of this model.

    Raises:
        ValueError: it has none.
    """
    found = eos_token_ids(model)
    if not found:
        raise ValueError(
            "the student's generation config has no eos_token_id, so its responses would never end: set it in "
            "generation_config.json"
        )
    return found


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled.

    Args:
        max_new_tokens: longest response, at least 1.
        temperature: > 0; 0: the likeliest token each time.
        top_p: mass of the likeliest tokens that are sampled from, in (0, 1].

    Raises:
        ValueError: a setting is out of its range.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_sampling(self.max_new_tokens, self.temperature, self.top_p)

    def check(self, student: Any, max_length: int | None) -> None:
        """Refuse a student that cannot end a response, and prompts without room before one.

        Args:
            student: the model that will write.
            max_length: of the data, in tokens; None: not known.

        Raises:
            ValueError: it names what does not fit.
        """
        require_eos_token_ids(student)
        limits = {"data.max_length": max_length, "the student's max_position_embeddings": max_positions(student)}
        for name, limit in limits.items():
            if limit is not None and self.max_new_tokens >= limit:
                raise ValueError(
                    f"max_new_tokens must leave room for a prompt within {name} of {limit}, got {self.max_new_tokens}"
                )


class RestrictVocabulary(LogitsProcessor):
    """Only the first tokens of the vocabulary: those that another model knows too.

    Args:
        vocabulary: how many.
    """

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores, −inf outside."""
        scores[:, self.vocabulary :] = -torch.inf
        return scores


class TeacherMixture(LogitsProcessor):
    r"""Logits of \(a\,p + (1-a)\,q\), q the writing model's distribution and p another model's on the same tokens.

    Args:
        model: the other model, a causal LM of the same tokens.
        share: a in [0, 1].
        temperature: of both, > 0.
        attention_mask: of the prompts, [B, T].
    """

    def __init__(self, model: Any, share: float, temperature: float, attention_mask: Tensor) -> None:
        self.model = model
        self.share = share
        self.temperature = temperature
        self.mask = attention_mask
        self._places = "position_ids" in inspect.signature(model.forward).parameters
        self._cache: Any = None
        self._read = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The mixture's logits, such that the writing model's `temperature` gives the mixture itself."""
        new = input_ids[:, self._read :]
        grown = input_ids.shape[1] - self.mask.shape[1]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(new), grown)], 1)
        places = (self.mask.cumsum(1) - 1).clamp_min(0)[:, self._read :]
        inputs = {"input_ids": new, "attention_mask": self.mask, "use_cache": True, "cache": self._cache}
        if self._places:  # the others count by the attention mask, or not at all
            inputs["position_ids"] = places
        out = self.model(**inputs)
        self._cache, self._read = out.cache, input_ids.shape[1]
        width = min(scores.shape[-1], out.logits.shape[-1])
        p = (out.logits[:, -1, :width].float() / self.temperature).softmax(-1)
        q = (scores[:, :width].float() / self.temperature).softmax(-1)
        mixed = torch.full_like(scores, -torch.inf)
        mixed[:, :width] = (self.share * p + (1 - self.share) * q).log() * self.temperature
        return mixed
