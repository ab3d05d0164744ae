"""Responses of a model to many prompts: batched by length, the same wherever the work was interrupted."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from kd_lightning.data.collate import left_pad
from kd_lightning.generation.response_file import Response, ResponseFile
from kd_lightning.models.generate import Sampling, generate
from kd_lightning.models.hf_adapter import eos_token_ids, max_positions
from kd_lightning.seeding import derive_seed

WINDOW = 16
"""Batches whose rows are sorted by length together: what a kill costs at most."""

Answers = Iterable[tuple[int, Response]]


def length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Row numbers in batches of similar length, a function of the lengths alone.

    Rows are sorted within windows of `WINDOW` batches, longest first, so that what is written in file order never waits
    for long.

    Args:
        lengths: tokens of each prompt.
        batch_size: rows per batch, at least 1.
    """
    found = []
    for start in range(0, len(lengths), WINDOW * batch_size):
        window = range(start, min(start + WINDOW * batch_size, len(lengths)))
        rows = sorted(window, key=lambda row: -lengths[row])
        found += [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    return found


def max_prompt_tokens(model: Any, max_new_tokens: int, max_length: int | None) -> int:
    """How many tokens a prompt may have.

    Args:
        model: that responds.
        max_new_tokens: of its longest response.
        max_length: of prompt and response together; None: as many as the model has places for.

    Raises:
        ValueError: none.
    """
    limits = {"max_length": max_length, "the model's max_position_embeddings": max_positions(model)}
    for name, limit in limits.items():
        if limit is not None and max_new_tokens >= limit:
            raise ValueError(f"max_new_tokens must leave room for a prompt in {name} of {limit}, got {max_new_tokens}")
    return min([limit for limit in limits.values() if limit is not None], default=1 << 30) - max_new_tokens


@dataclass(frozen=True)
class BatchGenerator:
    """A model with its tokenizer and how it is to write.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer.
        sampling: how responses are sampled.
        seed: of the samples.
        device: where it computes, which need not be where its parameters lie; None: there.

    Raises:
        ValueError: the model names no token that ends a response.
    """

    model: Any
    tokenizer: Any
    sampling: Sampling
    seed: int = 0
    device: torch.device | None = None

    def __post_init__(self) -> None:
        if not self.ends:
            raise ValueError(
                "the model has no end of sequence (eos_token_id in generation_config.json): no response would ever end"
            )

    @property
    def ends(self) -> list[int]:
        """Tokens that end a response."""
        return eos_token_ids(self.model)

    def answers(self, prompts: Sequence[Sequence[int]], numbered: Iterable[tuple[int, list[int]]]) -> Answers:
        """Responses to prompts, batch by batch.

        Args:
            prompts: token ids of all prompts.
            numbered: batches of their numbers, each with its own number, which decides its samples.
        """
        pad = self.tokenizer.pad_token_id
        device = self.device or next(self.model.parameters()).device
        for number, rows in numbered:
            inputs = left_pad([prompts[row] for row in rows], self.ends[0] if pad is None else pad)
            arguments = (self.model, *(inputs[name].to(device) for name in ("input_ids", "attention_mask")))
            settings = {**asdict(self.sampling), "seed": derive_seed(self.seed, number)}
            yield from zip(rows, self.read(generate(*arguments, **settings)), strict=True)

    def read(self, tokens: Tensor) -> list[Response]:
        """Response tokens [B, N] as texts, each up to its end."""
        ended = torch.isin(tokens, torch.tensor(self.ends, device=tokens.device)).cpu()
        found = []
        for ids, ends in zip(tokens.tolist(), ended, strict=True):
            finished = bool(ends.any())
            length = int(ends.int().argmax()) if finished else len(ids)
            text = self.tokenizer.decode(ids[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            found.append(Response(text, "eos" if finished else "length", length + finished))
        return found


def write_responses(file: ResponseFile, answers: Answers, bar: bool = True, title: str = "Responses") -> str:
    """Write responses as they come, and show how fast.

    Args:
        file: opened.
        answers: responses with the number of their row in the file.
        bar: show a progress bar.
        title: what stands before it.

    Returns:
        What there is to say about all responses in the file, in words.
    """
    start, tokens = time.perf_counter(), 0
    with tqdm(total=len(file.rows), initial=file.done, desc=title, disable=not bar) as shown:
        for number, response in answers:
            if number < file.done:
                continue
            file.write(number, response)
            tokens += response.tokens
            shown.set_postfix_str(f"{tokens / (time.perf_counter() - start):.0f} tokens/s", refresh=False)
            shown.update()
    seconds = time.perf_counter() - start
    rate = f"{tokens} tokens in {seconds:.0f} s ({tokens / seconds:.0f} a second)"
    return f"{summary(file.responses)}, {rate}" if tokens else summary(file.responses)


def summary(responses: Sequence[Response]) -> str:
    """How many there are, and of what kind."""
    counts = {
        "empty": sum(not response.text.strip() for response in responses),
        "cut at max_new_tokens": sum(response.finish_reason == "length" for response in responses),
    }
    notes = [f"{count} {kind}" for kind, count in counts.items() if count]
    return ", ".join([f"{len(responses)} responses", *notes])


def batches_of_rank(
    plan: Sequence[list[int]], done: int = 0, rank: int = 0, ranks: int = 1
) -> Iterator[tuple[int, list[int]]]:
    """The batches of one rank with their numbers, without those that are done.

    Args:
        plan: all batches.
        done: rows before this one are done.
        rank: of this process.
        ranks: processes that share the batches.
    """
    for number, rows in enumerate(plan):
        if number % ranks == rank and max(rows) >= done:
            yield number, rows
