"""Evaluation of a batch, and means over the labeled tokens of a data loader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from kd_lightning.console import progress_bar, progress_bar_enabled
from kd_lightning.distributed.trainer import forward_context
from kd_lightning.losses import DistillationLoss, LossParts
from kd_lightning.losses.loss_parts import measured_tokens
from kd_lightning.metrics.per_token import TokenMean
from kd_lightning.teachers.base import Teacher
from kd_lightning.training.base import StudentTeacherModule
from kd_lightning.training.student import StudentWithLoss


def evaluate_batch(
    model: StudentWithLoss, batch: dict[str, Tensor], teacher: Teacher | None, loss: DistillationLoss
) -> LossParts:
    """A loss of one batch, without gradient and in eval mode."""
    training = model.training
    model.eval()
    with torch.no_grad():
        parts: LossParts = model(batch, teacher, loss)
    model.train(training)
    return parts


def evaluated_batches(
    trainer: L.Trainer, module: StudentTeacherModule, loader: Iterable[Any], numbers: Iterable[int]
) -> Iterator[dict[str, Tensor]]:
    """Values of each labeled token, by name, batch by batch, as validation computes them.

    Args:
        trainer: of the run: moves the batches to its device, and sets the precision.
        module: evaluates them.
        loader: gives the batches.
        numbers: counts the batches; it ends first.
    """
    for _, batch in zip(numbers, loader, strict=False):
        batch = trainer.precision_plugin.convert_input(trainer.strategy.batch_to_device(batch))
        with forward_context(trainer):
            values = module.evaluate_batch(batch).values
        yield values


def limited_batches(loader: Any, limit: int | float) -> int:
    """Number of batches that `limit_…_batches` leaves of a loader.

    Args:
        loader: with a length.
        limit: a share of the batches (float) or their number (int).

    Raises:
        ValueError: the share is above 0 and leaves no batch.
    """
    left = int(limit * len(loader)) if isinstance(limit, float) else min(limit, len(loader))
    if limit and not left:
        raise ValueError(
            f"limit_val_batches and limit_test_batches must leave a batch of {len(loader)}, got {limit}: raise them"
        )
    return left


def sums_and_counts(batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Sum and count of the labeled tokens' values over batches, by name, each [2] in float64.

    With two tokenizers, of those tokens where a value is measured.
    """
    sums: dict[str, Tensor] = {}
    for values in batches:
        for name, value in values.items():
            tokens = measured_tokens(values, name)
            value = value.double()
            count = value.new_tensor(float(value.numel())) if tokens is None else tokens.double().sum()
            total = torch.stack([value.sum(), count])
            sums[name] = sums[name] + total if name in sums else total
    return sums


def token_means(
    trainer: L.Trainer, module: StudentTeacherModule, loader: Any, batches: int, title: str = "Test batches"
) -> dict[str, float]:
    """Means over the labeled tokens of the first `batches` batches, over all ranks."""
    numbers = progress_bar(range(batches), title, shown=progress_bar_enabled(trainer))
    sums = sums_and_counts(evaluated_batches(trainer, module, loader, numbers))
    if trainer.world_size > 1:
        sums = {name: trainer.strategy.reduce(total, reduce_op="sum") for name, total in sums.items()}
    return {name: float(total[0] / total[1]) for name, total in sums.items()}


def validation_ce(trainer: L.Trainer, module: StudentTeacherModule) -> float:
    """Cross entropy of the validation batches as `val/ce` logs it (in fp32), over all ranks."""
    loaders = trainer.val_dataloaders
    listed: Sequence[Any] = [] if loaders is None else loaders if isinstance(loaders, list) else [loaders]
    mean = TokenMean().to(module.device)
    for loader, count in zip(listed, trainer.num_val_batches, strict=False):
        for values in evaluated_batches(trainer, module, loader, range(int(count))):
            mean.update(values["student_nll"])
    return float(mean.compute())
