"""A model in this process that responds to conversations, with its tokenizer."""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import torch

from kd_lightning.data.conversation import Conversation
from kd_lightning.data.text.prompt_notice import prompt_notice
from kd_lightning.data.text.rendering import today
from kd_lightning.data.text.text_tokenizer import TextTokenizer
from kd_lightning.data.tokenization import load_tokenizer, with_template
from kd_lightning.distributed.dtensor import tensor_digest
from kd_lightning.distributed.signals import StopRequest
from kd_lightning.generation.batch_generator import BatchGenerator, NumberedResponses, batches_of_rank, length_batches
from kd_lightning.models.generate import Sampling
from kd_lightning.models.loading import load_causal_lm
from kd_lightning.reporting.redaction import print_message


class LocalModel:
    """A model in this process, with its tokenizer and how its responses are sampled.

    Args:
        name: folder, hub name or `asset:` name.
        sampling: how responses are sampled.
        seed: of the samples.
        max_length: longest prompt and response together, in tokens; None: the model's number of positions.
        dtype: of the weights; auto: as saved.
        device: cpu, cuda, cuda:1 …; auto: a GPU if there is one.
        template_kwargs: variables for the chat template.
        date: YYYY-MM-DD, for templates that write the date; None: today's.

    Raises:
        ValueError: an argument is out of its range, or the model cannot be read.
    """

    def __init__(
        self,
        name: str,
        sampling: Sampling,
        seed: int,
        max_length: int | None,
        dtype: str,
        device: str,
        template_kwargs: dict[str, Any] | None = None,
        date: str | None = None,
    ) -> None:
        target = _device(device)
        self.model = load_causal_lm(name, kwargs={"dtype": dtype}, role="model")
        tokenizer = load_tokenizer(name)
        with_template(tokenizer, None, _log)
        self.model.to(target)  # type: ignore[arg-type]  # transformers wraps the method without its types
        self.generator = BatchGenerator(self.model, tokenizer, sampling, seed)
        longest = sampling.max_prompt_tokens(self.model, max_length)
        self.text = TextTokenizer(tokenizer, None, template_kwargs, longest, date=date or today())

    def fingerprint(self) -> str:
        """A hash that changes with any weight, with the end-of-sequence tokens, and with how prompts are tokenized."""
        model = self.model
        weights = tensor_digest(itertools.chain(model.named_parameters(), model.named_buffers()))
        parts = [weights, str(model.generation_config.eos_token_id), self.text.fingerprint()]
        return f"sha256:{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:16]}"

    def dated(self) -> dict[str, str]:
        """The date of the prompts as a setting, if the chat template writes one."""
        date = self.text.written_date
        return {} if date is None else {"date": date}

    def prompts(self, questions: Sequence[Conversation]) -> list[list[int]]:
        """Token ids of the prompts; logs how many are truncated.

        Raises:
            ValueError: a prompt is empty.
        """
        prompts = [self.text.prompt(question)[1] for question in questions]
        if notice := prompt_notice(self.text, questions):
            _log(notice)
        longest = self.text.max_length
        if full := sum(len(prompt) == longest for prompt in prompts):
            _log(f"{full} prompts have {longest} tokens or more: only the last {longest} tokens are kept")
        if empty := [number for number, prompt in enumerate(prompts, start=1) if not prompt]:
            raise ValueError(f"row {empty[0]} has an empty prompt")
        return prompts

    def responses(
        self, prompts: Sequence[list[int]], done: int, batch_size: int, request: StopRequest
    ) -> NumberedResponses:
        """Responses with the numbers of their rows, without the first `done` rows, up to a request to stop."""
        plan = length_batches([len(prompt) for prompt in prompts], batch_size)
        return self.generator.generate(prompts, request.until_requested(batches_of_rank(plan, done)))


def _device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        ValueError: this machine has no such device.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device must be auto, cpu or a device of this machine, got {name!r}: {error}") from None
    return device


def _log(text: str) -> None:
    print_message(text, sys.stderr)
