"""Runs a response source inside a training run."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from kd_lightning.data.base import max_length_of
from kd_lightning.distributed.trainer import data_parallel_rank
from kd_lightning.metrics.per_token import TokenMean
from kd_lightning.rollout.base import ResponseSource, RolloutContext
from kd_lightning.rollout.batches import Batch
from kd_lightning.seeding import run_seed


class RolloutRunner:
    """A response source in a run: what it gives to train on, and what is to be logged of it.

    Args:
        source: the source; None: the data as it is.

    Attributes:
        names: of what has been logged.
        drawn: the last batch that was not the data's own.
    """

    def __init__(self, source: ResponseSource | None) -> None:
        self.source = source
        self.names: set[str] = set()
        self.drawn: Batch | None = None
        self._step, self._micro = -1, 0
        self._clock: float | None = None

    def draw(self, module: Any, batch: Batch) -> tuple[Batch, dict[str, tuple[Tensor, Tensor]]]:
        """The batch to train on, and by name sums and numbers of what is to be logged.

        Args:
            module: a `DistillationModule` in training.
            batch: of the data.
        """
        if self.source is None:
            return batch, {}
        trainer = module.trainer
        self._micro = self._micro + 1 if self._step == trainer.global_step else 0
        self._step = trainer.global_step
        rank, ranks = data_parallel_rank(trainer)
        author = RolloutContext(
            module.model,
            module.teacher,
            seed=run_seed(),
            step=self._step,
            batch=trainer.fit_loop.epoch_loop.total_batch_idx,
            micro=self._micro,
            accumulate=trainer.accumulate_grad_batches,
            rank=rank,
            ranks=ranks,
            max_length=max_length_of(trainer),
        )
        drawn = self.source(batch, author)
        if drawn is not batch:
            self.drawn = drawn
        now = time.perf_counter()
        if self._clock is not None:  # seconds written to the device as a fill, which nobody waits for
            spent, passed = (
                drawn["labels"].new_full((), x, dtype=torch.float32) for x in (author.seconds, now - self._clock)
            )
            author.notes["generate_share"] = (spent, passed)
        self._clock = now
        self.names |= author.notes.keys()
        return drawn, author.notes

    def hear(self, module: Any) -> None:
        """Tell the source how validation went; one before step 0 counts where it went over all rows."""
        self._clock = None
        trainer = module.trainer
        whole = not trainer.sanity_checking or trainer.num_sanity_val_steps == float("inf")
        if self.source is not None and trainer.state.fn == "fit" and whole and "val_ce" in module.evaluation:
            self.source.validated(float(module.evaluation["val_ce"].compute()), trainer.global_step)

    def start(self, module: Any) -> None:
        """Tell the source of a validation that a resumed run skips: one due when its checkpoint had been written."""
        trainer = module.trainer
        due = trainer.fit_loop.epoch_loop._should_check_val_fx
        if (
            self.source is None
            or trainer.global_step == 0
            or not self.source.waits(trainer.global_step)
            or not due(None)
        ):
            return
        mean = TokenMean().to(module.device)
        for loader, count in zip(_listed(trainer.val_dataloaders), trainer.num_val_batches, strict=False):
            for _, batch in zip(range(int(count)), loader, strict=False):
                mean.update(module.evaluate_batch(trainer.strategy.batch_to_device(batch)).values["student_nll"])
        self.source.validated(float(mean.compute()), trainer.global_step)


def _listed(loaders: Any) -> list[Any]:
    return [] if loaders is None else loaders if isinstance(loaders, list) else [loaders]
