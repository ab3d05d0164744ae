"""Generates the responses of one pass over the training data, on all ranks, resumably."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import lightning.pytorch as L
import torch
from transformers import PreTrainedModel

from kd_lightning.console import progress_bar_enabled
from kd_lightning.data.base import DistillationDataModule, GenerationRow
from kd_lightning.data.collate import SIDES
from kd_lightning.distributed.collectives import all_gather_objects
from kd_lightning.distributed.dtensor import tensor_digest
from kd_lightning.distributed.trainer import data_parallel_rank
from kd_lightning.generation.batch_generator import (
    BatchGenerator,
    NumberedResponses,
    length_batches,
    write_responses,
)
from kd_lightning.generation.response_file import Response, ResponseFile
from kd_lightning.models.generate import Sampling
from kd_lightning.seeding import derive_seed, run_seed

T = TypeVar("T")
NumberedBatch = tuple[int, list[int]]


class ResponsePass(ABC):
    """Writes the responses to training prompts into a file per rank, and gathers them.

    A run that is killed continues its files.
    """

    side: str

    @abstractmethod
    def responses(
        self, trainer: L.Trainer, rows: Sequence[GenerationRow], folder: Path, number: int
    ) -> dict[int, Response]:
        """The responses of all ranks by `index` of the rows; every rank calls this.

        Args:
            trainer: the Trainer of the run.
            rows: the rows whose prompts are answered, at least one.
            folder: folder of the files.
            number: number of the pass, from 0; it determines the samples.
        """

    def file_path(self, trainer: L.Trainer, folder: Path, number: int) -> Path:
        """This rank's file of a pass."""
        return folder / f"{self.side}-pass-{number:04d}.{trainer.global_rank}-of-{trainer.world_size}.jsonl"

    def file(
        self,
        trainer: L.Trainer,
        rows: Sequence[GenerationRow],
        folder: Path,
        number: int,
        model: str,
        settings: Mapping[str, object],
    ) -> ResponseFile:
        """This rank's file of a pass, to be opened.

        Args:
            trainer: the Trainer of the run.
            rows: of this rank, in the order of the file.
            folder: folder of the files.
            number: number of the pass.
            model: identifies the weights.
            settings: of generation.
        """
        fields = [{"row_id": row["index"], "prompt": row["prompt"]} for row in rows]
        return ResponseFile(self.file_path(trainer, folder, number), fields, model, settings, start_over=True)


@dataclass(frozen=True)
class PassGenerator(ResponsePass):
    """Generates responses to training prompts with a model in this process.

    The responses depend on the weights and the run's seed alone.

    Args:
        side: "teacher" or "student", whose responses these are.
        model: the model that generates, on its device.
        datamodule: the data module of the prompts.
        sampling: how responses are sampled.
        batch_size: prompts per batch on each rank.
        device: the device of the inputs; the parameters of an offloaded model are elsewhere.
    """

    side: str
    model: PreTrainedModel
    datamodule: DistillationDataModule
    sampling: Sampling
    batch_size: int
    device: torch.device

    def responses(
        self, trainer: L.Trainer, rows: Sequence[GenerationRow], folder: Path, number: int
    ) -> dict[int, Response]:
        """The responses of all ranks by `index` of the rows; see `ResponsePass`."""
        longest = self.sampling.max_prompt_tokens(self.model, self.datamodule.max_length)
        prompts = [row["prompt_ids"][-longest:] for row in rows]
        own = self._own_batches(trainer, prompts)
        order = list(dict.fromkeys(row for _, batch in own for row in batch))
        line = {row: number for number, row in enumerate(order)}
        seed = derive_seed(run_seed(), SIDES[self.side], number)
        tokenizer = self.datamodule.tokenizer_of(self.side)
        generator = BatchGenerator(self.model, tokenizer, self.sampling, seed, self.device)
        title = f"{self.side}, pass {number}"
        settings = {**vars(self.sampling), "seed": seed, "batch_size": self.batch_size}
        with self.file(trainer, [rows[row] for row in order], folder, number, self._weights(), settings) as file:
            done = min(gathered(trainer, {trainer.global_rank: _batches_done(file, own)}).values())
            responses: NumberedResponses = (
                (line[row], response) for row, response in generator.generate(prompts, own[done:])
            )
            write_responses(file, responses, progress_bar_enabled(trainer), title)
            own_responses = {rows[row]["index"]: file.responses[number] for row, number in line.items()}
        return gathered(trainer, own_responses)

    def _own_batches(self, trainer: L.Trainer, prompts: Sequence[Sequence[int]]) -> list[NumberedBatch]:
        """This rank's batches with their numbers; every rank has equally many, as the model may be sharded."""
        rank, ranks = data_parallel_rank(trainer)
        batches = list(enumerate(length_batches([len(prompt) for prompt in prompts], self.batch_size)))
        own = batches[rank::ranks]
        return own + batches[:1] * (-(-len(batches) // ranks) - len(own))

    def _weights(self) -> str:
        """A hash of the model's weights. A collective if they are sharded."""
        return tensor_digest(itertools.chain(self.model.named_parameters(), self.model.named_buffers()))[:16]


def _batches_done(file: ResponseFile, batches: Sequence[NumberedBatch]) -> int:
    ends = itertools.accumulate(len(batch) for _, batch in batches)
    return sum(end <= file.done for end in ends)


def gathered(trainer: L.Trainer, own: Mapping[int, T]) -> dict[int, T]:
    """The entries of all ranks, on every rank."""
    return {key: value for part in all_gather_objects(own, trainer.world_size) for key, value in part.items()}
