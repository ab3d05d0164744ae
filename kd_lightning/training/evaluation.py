"""Token means over the batches of a loader."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch

from kd_lightning.console import progress_bar, progress_bar_enabled


def limited_batches(loader: Any, limit: int | float) -> int:
    """How many batches of a loader `limit_…_batches` leaves: a share of them, or so many.

    Raises:
        ValueError: the share is above 0 and leaves none.
    """
    left = int(limit * len(loader)) if isinstance(limit, float) else min(limit, len(loader))
    if limit and not left:
        raise ValueError(f"limit_val_batches and limit_test_batches must leave a batch of {len(loader)}, got {limit}")
    return left


def token_means(
    trainer: L.Trainer, module: Any, loader: Any, batches: int, title: str = "Test batches"
) -> dict[str, float]:
    """Means over the counted tokens of the first `batches` batches, on all ranks together."""
    sums: dict[str, torch.Tensor] = {}
    numbers = progress_bar(range(batches), title, shown=progress_bar_enabled(trainer))
    for _, batch in zip(numbers, loader, strict=False):
        values = module.evaluate_batch(trainer.strategy.batch_to_device(batch)).values
        for name, value in values.items():
            value = value.double()
            total = torch.stack([value.sum(), value.new_tensor(float(value.numel()))])
            sums[name] = sums[name] + total if name in sums else total
    if trainer.world_size > 1:
        sums = {name: trainer.strategy.reduce(total, reduce_op="sum") for name, total in sums.items()}
    return {name: float(total[0] / total[1]) for name, total in sums.items()}
