"""Responses that a server writes with the student's weights, ahead of the steps that train on them."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from kd_lightning.data.base import DistillationDataModule
from kd_lightning.distributed.dtensor import is_sharded
from kd_lightning.engine.label_mask import next_token_mask
from kd_lightning.models.background_calls import BackgroundCalls
from kd_lightning.models.generate import Sampling
from kd_lightning.models.hf_adapter import text_config
from kd_lightning.rollout.batches import Batch, prompts
from kd_lightning.schedules import check_number
from kd_lightning.serving.server import Server
from kd_lightning.teachers.base import Teacher

COLDEST = 0.01
"""Lowest temperature above 0 that is sent: vLLM raises lower ones to it."""


@dataclass(frozen=True)
class Upcoming:
    """The batch of the data after the present one.

    Args:
        step: the step that trains on it.
        batch: None: it is not known yet.
    """

    step: int
    batch: Batch | None


@dataclass(frozen=True)
class Request:
    """A response to be written.

    Args:
        step: the step that trains on it.
        row: number of the row.
        ids: tokens of the prompt.
        sampling: how it is sampled.
        seed: of the sample.
    """

    step: int
    row: int
    ids: tuple[int, ...]
    sampling: Sampling
    seed: int


class ServedWriter:
    """Lets a server write responses with the student's weights, with a bound on their age.

    While a step trains, the server writes the responses of the next batch. The weights are published when the responses
    to a step's prompts would otherwise be written by weights that are more than `max_staleness` steps older.

    Args:
        server: writes.
        max_staleness: largest number of optimizer steps between the weights that write a response and those that are
            trained on it, at least 0; 0: the weights are published before each step that needs responses, which waits.

    Raises:
        ValueError: `max_staleness` is not a whole number of at least 0.
    """

    def __init__(self, server: Server, max_staleness: int) -> None:
        self.server, self.max_staleness = server, max_staleness
        self._calls = BackgroundCalls(server.requests)
        self._pending: dict[Request, tuple[Future[list[int]], int]] = {}  # with the step of the weights
        self._dropped: list[Future[list[int]]] = []
        self._published: int | None = None
        self._student: PreTrainedModel | None = None
        self._probe: list[int] = []
        self._folder = ""

    def check(self, student: PreTrainedModel, teacher: Teacher | None, sampling: Sampling) -> None:
        """Check that the server can write what this process would generate; sends nothing.

        Raises:
            ValueError: it cannot.
        """
        self.server.check(student)
        if 0 < sampling.temperature < COLDEST:
            raise ValueError(
                f"temperature must be 0 or at least {COLDEST} with a writer (vLLM raises lower ones), got "
                f"{sampling.temperature:g}"
            )
        known, own = None if teacher is None else teacher.vocabulary, int(text_config(student).vocab_size)
        if known is not None and known < own:
            raise ValueError(
                f"writer must be None if the student has more tokens than the teacher, got {own} and {known}: a server "
                "would write tokens that the teacher does not have"
            )
        if any(is_sharded(parameter) for parameter in student.parameters()):
            raise ValueError("writer must be None if the strategy shards the student (fsdp2): use ddp")

    def start(
        self, student: PreTrainedModel, data: DistillationDataModule, sampling: Sampling, folder: str | None
    ) -> None:
        """Connect to the server at the start of a run. A collective: all ranks must call it.

        Args:
            student: whose weights are published.
            data: of the run.
            sampling: how responses are sampled.
            folder: of the run; None: it writes no files.

        Raises:
            ValueError: the server refuses or does not answer, or has no room for a response.
        """
        self.server.connect(data.tokenizer, student)
        limits = [limit for limit in (data.max_length, self.server.max_length) if limit is not None]
        sampling.max_prompt_tokens(student, min(limits, default=None))
        self.check(student, None, sampling)
        self._pending, self._dropped, self._published = {}, [], None
        self._student = student
        self._probe = list(data.generation_rows("train", first=1)[0]["prompt_ids"])
        if folder is None:
            folder = tempfile.mkdtemp()
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._folder = folder

    def take(self, requests: Sequence[Request], step: int) -> tuple[list[list[int]], list[int]]:
        """The responses to a batch of this step; waits for them. A collective: all ranks must call it.

        Returns:
            Tokens of each response with its end, and its age in steps.

        Raises:
            ValueError: the server refuses, does not answer, or has other weights.
        """
        self.publish(step, step)
        known, self._pending = self._pending, {}
        calls = [known.pop(request) if request in known else self._ask(request) for request in requests]
        for future, _ in known.values():
            future.cancel()
            self._dropped.append(future)
        try:
            found = [future.result() for future, _ in calls]
        except BaseException:
            self._calls.cancel()
            self.server.close()
            raise
        self._dropped = [future for future in self._dropped if not future.done()]
        return found, [step - written for _, written in calls]

    def ask_ahead(self, requests: Sequence[Request]) -> None:
        """Ask for the responses to the next batch; does not wait."""
        for request in requests:
            if request not in self._pending:
                self._pending[request] = self._ask(request)

    def publish(self, now: int, step: int) -> bool:
        """Publish the weights if those of the server are too old for a step. A collective: all ranks must call it.

        Args:
            now: number of optimizer steps done.
            step: that trains on the responses.

        Returns:
            Whether the server can write for this step now.
        """
        if self._student is None:
            raise ValueError("the writer is not connected yet: a Trainer does it at the start of `fit`")
        if step - now > self.max_staleness:
            return False
        if self._published is None or step - self._published > self.max_staleness:
            for future in [*self._dropped, *(future for future, _ in self._pending.values())]:
                if not future.cancel():
                    future.exception()  # a server that reloads its model must not have requests
            self._pending, self._dropped = {}, []
            if dist.is_initialized():
                dist.barrier()
            self.server.publish(self._student, now, self._folder, self._probe)
            self._published = now
        return True

    def _ask(self, request: Request) -> tuple[Future[list[int]], int]:
        assert self._published is not None
        return self._calls.submit(lambda: self._respond(request)), self._published

    def _respond(self, request: Request) -> list[int]:
        """The tokens of a response; called in threads."""
        return self.server.respond(request.ids, request.sampling, request.seed, f"row {request.row}").ids

    def __deepcopy__(self, memo: dict[int, Any]) -> ServedWriter:
        """A writer for the same server; connections cannot be copied."""
        return ServedWriter(self.server, self.max_staleness)


def served_writer(server: Server | None, max_staleness: int) -> ServedWriter | None:
    """The writer of a source; None: its responses are generated in this process.

    Raises:
        ValueError: an argument is out of its range, or there is a bound without a server.
    """
    if isinstance(max_staleness, bool) or not isinstance(max_staleness, int):
        raise ValueError(f"max_staleness must be a whole number of steps, got {max_staleness!r}")
    check_number("max_staleness", max_staleness, 0)
    if server is None:
        if max_staleness > 0:
            raise ValueError(f"max_staleness must be 0 without a writer, got {max_staleness}: pass writer=Server(…)")
        return None
    if not isinstance(server, Server):
        raise ValueError(f"writer must be a Server or None, got {server!r}")
    return ServedWriter(server, max_staleness)


def numbered_prompts(batch: Batch) -> list[tuple[int, tuple[int, ...]]]:
    """Number and prompt of each row that gets a response."""
    labeled = next_token_mask(batch["labels"]).any(1).tolist()
    ids, mask = prompts(batch)
    numbers = batch["row_ids"].tolist() if "row_ids" in batch else range(len(labeled))
    rows = zip(numbers, ids.cpu(), mask.bool().cpu(), labeled, strict=True)
    return [(int(number), tuple(row[there].tolist())) for number, row, there, answered in rows if answered]


def as_tokens(responses: Sequence[Sequence[int]], labeled: Tensor) -> tuple[Tensor, Tensor]:
    """Responses of the rows that get one, padded on the right.

    Args:
        responses: tokens of each.
        labeled: rows that get a response, [B].

    Returns:
        Tokens and which of them are part of a response, [B, N].
    """
    width = max(1, *map(len, responses)) if responses else 1
    tokens = torch.zeros(len(labeled), width, dtype=torch.long)
    live = torch.zeros(len(labeled), width, dtype=torch.bool)
    for row, response in zip(labeled.nonzero().flatten().tolist(), responses, strict=True):
        tokens[row, : len(response)] = torch.tensor(response, dtype=torch.long)
        live[row, : len(response)] = True
    return tokens.to(labeled.device), live.to(labeled.device)
