"""Runs a response source inside a training run."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Trainer

from kd_lightning.data.base import datamodule_of, max_length_of
from kd_lightning.distributed.trainer import (
    data_parallel_rank,
    is_fast_dev_run,
    is_overfitting,
    validation_is_due,
)
from kd_lightning.engine.sequence_stats import Mean
from kd_lightning.rollout.base import ResponseSource, RolloutContext
from kd_lightning.rollout.batches import Batch
from kd_lightning.rollout.served import Upcoming
from kd_lightning.seeding import run_seed
from kd_lightning.teachers.base import StudentModel, Teacher


class RolloutRunner:
    """A response source in a run: gives the batch to train on, and tells the source how validation went.

    Args:
        source: the source; None: batches are trained on as the data gives them.

    Attributes:
        names: of the values that have been logged.
    """

    def __init__(self, source: ResponseSource | None) -> None:
        self.source = source
        self.names: set[str] = set()
        self._generated: Batch | None = None
        self._step, self._micro = -1, 0
        self._clock: float | None = None
        self._trainer: Trainer | None = None
        self._announced: deque[Batch] = deque()  # training batches that are read ahead

    def read_ahead(self, trainer: Trainer | None) -> None:
        """Learn of the batches of the data ahead of their use; call it before the loaders are created."""
        datamodule = datamodule_of(trainer)
        if datamodule is not None and self.source is not None and self.source.served is not None:
            self._trainer = trainer
            datamodule.look_ahead(self._announce)

    def _announce(self, batch: Batch) -> None:
        if self._trainer is not None and self._trainer.training:  # not a batch of validation
            self._announced.append(batch)

    def start(self, trainer: Trainer, student: StudentModel) -> None:
        """Connect a server that generates, before the first step. A collective: all ranks must call it.

        Args:
            trainer: of the run.
            student: its weights are published.

        Raises:
            ValueError: the server fails, or the data module is not one of this package.
        """
        source, datamodule = self.source, datamodule_of(trainer)
        if source is None or source.served is None or source.sampling is None:
            return
        if datamodule is None:
            raise ValueError(
                "writer needs the tokenizer of the data: pass a data module of kd_lightning, or writer=None"
            )
        folder = None if is_fast_dev_run(trainer) else trainer.default_root_dir
        model: Any = student.student
        source.served.start(model, datamodule, source.sampling, folder)

    def draw(
        self, batch: Batch, student: StudentModel, teacher: Teacher | None, trainer: Trainer
    ) -> tuple[Batch, dict[str, Mean]]:
        """The batch to train on, and values to log, each as a sum and a count.

        Args:
            batch: of the data.
            student: generates responses.
            teacher: None: there is none.
            trainer: of the run.
        """
        if self.source is None:
            return batch, {}
        self._micro = self._micro + 1 if self._step == trainer.global_step else 0
        self._step = trainer.global_step
        rank, ranks = data_parallel_rank(trainer)
        data = datamodule_of(trainer)
        context = RolloutContext(
            student,
            teacher,
            seed=run_seed(),
            step=self._step,
            batch=trainer.fit_loop.epoch_loop.total_batch_idx,
            micro=self._micro,
            accumulate=trainer.accumulate_grad_batches,
            rank=rank,
            ranks=ranks,
            max_length=max_length_of(trainer),
            translate=data.teacher_response if data is not None and data.has_two_tokenizers else None,
            upcoming=self._upcoming(batch, trainer),
        )
        drawn = self.source(batch, context)
        if drawn is not batch:
            self._generated = drawn
        now = time.perf_counter()
        if self._clock is not None:  # `new_full` fills on the device: nothing waits for the two numbers
            generating, passed = (
                drawn["labels"].new_full((), x, dtype=torch.float32) for x in (context.seconds, now - self._clock)
            )
            context.notes["generate_share"] = Mean(generating, passed)
        self._clock = now
        self.names |= context.notes.keys()
        return drawn, context.notes

    def _upcoming(self, batch: Batch, trainer: Trainer) -> Upcoming | None:
        """The next batch of the data and its step, the same step on all ranks; None: no batch follows in this pass."""
        if self._trainer is not trainer or is_overfitting(trainer):
            return None
        place = next((n for n, other in enumerate(self._announced) if _same_rows(batch, other)), -1)
        for _ in range(place + 1):
            self._announced.popleft()
        done = trainer.fit_loop.epoch_loop.batch_idx + 1
        step = trainer.global_step + int(done % trainer.accumulate_grad_batches == 0)
        if done >= trainer.num_training_batches or 0 <= trainer.max_steps <= step:
            self._announced.clear()  # what was read ahead beyond a limit never comes
            return None
        return Upcoming(step, self._announced[0] if self._announced else None)

    def take_generated_batch(self) -> Batch | None:
        """The last batch of generated responses, once; None if there is no new one."""
        batch, self._generated = self._generated, None
        return batch

    def after_validation(self, trainer: Trainer, validation_ce: Callable[[], float | None]) -> None:
        """Give the source the cross entropy of a validation.

        A validation before step 0 is used only if it read all validation rows.

        Args:
            trainer: of the run.
            validation_ce: computes it, over all ranks; None: not measured.
        """
        self._clock = None
        complete = not trainer.sanity_checking or trainer.num_sanity_val_steps == float("inf")
        if self.source is None or trainer.state.fn != "fit" or not complete:
            return
        loss = validation_ce()
        if loss is not None:
            self.source.validated(loss, trainer.global_step)

    def after_resume(self, trainer: Trainer, validation_ce: Callable[[], float]) -> None:
        """Run the validation that a resumed run skips: it was due when the checkpoint was saved.

        Args:
            trainer: of the run.
            validation_ce: runs the validation and returns its cross entropy, over all ranks.
        """
        step = trainer.global_step
        if self.source is not None and step > 0 and self.source.waits(step) and validation_is_due(trainer):
            self.source.validated(validation_ce(), step)


def _same_rows(batch: Batch, other: Batch) -> bool:
    """Whether two batches hold the same rows; one may be on another device."""
    names = [name for name in ("row_ids", "input_ids") if name in batch]
    return all(batch[name].shape == other[name].shape for name in names) and all(
        torch.equal(batch[name].cpu(), other[name].cpu()) for name in names
    )
