"""The responses of one pass over the training data, written by a server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as L
from transformers import PreTrainedModel

from kd_lightning.console import progress_bar_enabled
from kd_lightning.data.base import DistillationDataModule, GenerationRow
from kd_lightning.data.collate import SIDES
from kd_lightning.distributed.trainer import data_parallel_rank
from kd_lightning.generation.batch_generator import NumberedResponses, write_responses
from kd_lightning.generation.pass_generator import ResponsePass, gathered
from kd_lightning.generation.response_file import Response
from kd_lightning.models.generate import Sampling
from kd_lightning.seeding import derive_seed, run_seed
from kd_lightning.serving.server import Server


@dataclass(frozen=True)
class ServedPass(ResponsePass):
    """Asks a server for the responses to training prompts, by token ids; each rank asks for its own rows.

    A response depends on the weights, the run's seed, and the number of its row. The file names the weights' step.

    Args:
        side: "teacher" or "student", whose responses these are.
        server: connected, with the weights that write.
        sampling: how responses are sampled.
        datamodule: the data module of the prompts; a prompt that leaves no room for a response keeps its last tokens.
        student: whose weights the server has; None: it has its own.
    """

    side: str
    server: Server
    sampling: Sampling
    datamodule: DistillationDataModule
    student: PreTrainedModel | None

    def responses(
        self, trainer: L.Trainer, rows: Sequence[GenerationRow], folder: Path, number: int
    ) -> dict[int, Response]:
        """The responses of all ranks by `index` of the rows; see `ResponsePass`."""
        rank, ranks = data_parallel_rank(trainer)
        own = rows[rank::ranks]
        longest = _longest_prompt(self.server, self.student, self.datamodule, self.sampling)
        prompts = [row["prompt_ids"][-longest:] for row in own]
        seed = derive_seed(run_seed(), SIDES[self.side], number)
        seeds = [derive_seed(seed, row["index"]) for row in own]
        names = [row["index"] for row in own]
        settings = {**self.sampling.settings(), "seed": seed}
        with self.file(trainer, own, folder, number, self.server.written_by, settings) as file:
            completions = self.server.generate(prompts, self.sampling, seeds, file.done, names)
            responses: NumberedResponses = (
                (line, Response(found.text, found.finish_reason, len(found.ids))) for line, found in completions
            )
            write_responses(file, responses, progress_bar_enabled(trainer), f"{self.side}, pass {number}")
            return gathered(trainer, dict(zip(names, file.responses, strict=True)))


def connect(
    server: Server, student: PreTrainedModel | None, datamodule: DistillationDataModule, sampling: Sampling
) -> None:
    """Connect a server that will generate responses to prompts of the data; all ranks must call it.

    Args:
        server: that will generate.
        student: whose weights will be published; None: the server keeps its own.
        datamodule: the data module of the prompts.
        sampling: how responses will be sampled.

    Raises:
        ValueError: the server fails, has no way to be given the weights, or there is no room for a prompt.
    """
    server.connect(datamodule.tokenizer, student)
    _longest_prompt(server, student, datamodule, sampling)


def _longest_prompt(
    server: Server, student: PreTrainedModel | None, datamodule: DistillationDataModule, sampling: Sampling
) -> int:
    """Tokens of the longest prompt that leaves room for a response, in this process and on the server.

    Raises:
        ValueError: there is no room for a prompt.
    """
    if server.max_length is not None and sampling.max_new_tokens >= server.max_length:
        raise ValueError(
            f"max_new_tokens must be less than the {server.max_length} tokens that the served model reads "
            f"(max_model_len), got {sampling.max_new_tokens}"
        )
    limits = [limit for limit in (datamodule.max_length, server.max_length) if limit is not None]
    return sampling.max_prompt_tokens(student, min(limits, default=None))
