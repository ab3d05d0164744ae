"""Responses of a model to many prompts, in batches of similar length that do not depend on interruptions."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd_lightning.console import terminal_bar
from kd_lightning.data.collate import left_pad
from kd_lightning.generation.response_file import Response, ResponseFile
from kd_lightning.generation.stop_strings import StopStrings
from kd_lightning.models.generate import Sampling, generate, require_eos_token_ids
from kd_lightning.models.hf_adapter import eos_token_ids, padding_id
from kd_lightning.seeding import derive_seed

WINDOW = 16
"""Number of batches whose rows are sorted by length together: the most work that is lost if interrupted."""

NumberedResponses = Iterable[tuple[int, Response]]
"""Responses with the numbers of their rows."""


def length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Row numbers in batches of similar length. They depend on the lengths only.

    Rows are sorted within windows of `WINDOW` batches, longest first: a file in row order then never waits for long.

    Args:
        lengths: number of tokens of each prompt.
        batch_size: rows per batch, at least 1.
    """
    batches = []
    for start in range(0, len(lengths), WINDOW * batch_size):
        window = range(start, min(start + WINDOW * batch_size, len(lengths)))
        rows = sorted(window, key=lambda row: -lengths[row])
        batches += [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    return batches


@dataclass(frozen=True)
class BatchGenerator:
    """A model with its tokenizer and how its responses are sampled.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer.
        sampling: how responses are sampled.
        seed: of the samples.
        device: of the computation; None: that of the parameters.

    Raises:
        ValueError: the model has no token that ends a response.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    seed: int = 0
    device: torch.device | None = None

    def __post_init__(self) -> None:
        require_eos_token_ids(self.model)

    def generate(
        self, prompts: Sequence[Sequence[int]], batches: Iterable[tuple[int, list[int]]]
    ) -> Iterator[tuple[int, Response]]:
        """Responses with the numbers of their rows, batch by batch.

        Args:
            prompts: token ids of all prompts.
            batches: the number of each batch, which determines its samples, and its row numbers.
        """
        pad_id = padding_id(self.model, self.tokenizer.pad_token_id)
        device = self.device or next(self.model.parameters()).device
        for number, rows in batches:
            inputs = left_pad([prompts[row] for row in rows], pad_id)
            ids, mask = inputs["input_ids"].to(device), inputs["attention_mask"].to(device)
            stop = StopStrings(self.sampling, self._text, eos_token_ids(self.model)) if self.sampling.stop else None
            criteria = [] if stop is None else [stop]
            seed = derive_seed(self.seed, number)
            tokens = generate(self.model, ids, mask, self.sampling, seed=seed, criteria=criteria)
            yield from zip(rows, self.decode(tokens, None if stop is None else stop.found), strict=True)

    def decode(self, tokens: Tensor, stopped: Mapping[int, tuple[int, str]] | None = None) -> list[Response]:
        """Response tokens [B, N] as texts, each up to its end.

        Args:
            tokens: of the responses.
            stopped: number of tokens and text of the rows that were ended by a stop string.
        """
        eos = frozenset(eos_token_ids(self.model))
        responses = []
        for row, ids in enumerate(tokens.tolist()):
            if stopped is not None and row in stopped:
                length, text = stopped[row]
                responses.append(Response(text, "stop", length))
                continue
            length = next((place for place, token in enumerate(ids) if token in eos), len(ids))
            finished = length < len(ids)
            responses.append(Response(self._text(ids[:length]), "eos" if finished else "length", length + finished))
        return responses

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def write_responses(
    file: ResponseFile, responses: NumberedResponses, bar: bool = True, title: str = "Responses"
) -> str:
    """Write responses while they are generated, with a progress bar that shows the speed.

    Args:
        file: opened.
        responses: with the numbers of their rows in the file.
        bar: show a progress bar.
        title: of the progress bar.

    Returns:
        A summary of all responses in the file, and the speed.
    """
    start, tokens = time.perf_counter(), 0
    style = {"total": len(file.rows), "initial": file.done, "desc": title, "disable": not bar, "leave": False}
    with tqdm(**style, **terminal_bar()) as shown:
        for number, response in responses:
            if number < file.done:
                continue
            file.write(number, response)
            tokens += response.tokens
            shown.set_postfix_str(f"{tokens / (time.perf_counter() - start):.0f} tokens/s", refresh=False)
            shown.update()
    seconds = time.perf_counter() - start
    rate = f"{tokens} tokens in {seconds:.0f} s ({tokens / seconds:.0f} per second)"
    return f"{summary(file.responses)}, {rate}" if tokens else summary(file.responses)


def summary(responses: Sequence[Response]) -> str:
    """Number of responses, and how many are empty or cut off."""
    counts = {
        "empty": sum(not response.text.strip() for response in responses),
        "cut at max_new_tokens": sum(response.finish_reason == "length" for response in responses),
    }
    notes = [f"{count} {kind}" for kind, count in counts.items() if count]
    return ", ".join([f"{len(responses)} responses", *notes])


def batches_of_rank(
    plan: Sequence[list[int]], done: int = 0, rank: int = 0, ranks: int = 1
) -> Iterator[tuple[int, list[int]]]:
    """The batches of one rank with their numbers, without those that are finished.

    Args:
        plan: all batches.
        done: number of rows, from the first on, that are finished.
        rank: of this process.
        ranks: number of processes that share the batches.
    """
    for number, rows in enumerate(plan):
        if number % ranks == rank and max(rows) >= done:
            yield number, rows
