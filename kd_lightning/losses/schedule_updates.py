"""Schedules and token weights outside of Lightning: one call after each optimizer step moves them all."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch import Tensor

from kd_lightning.divergences import WeightedTokens
from kd_lightning.losses.accumulation import AccumulationWindow
from kd_lightning.losses.distillation import DistillationLoss
from kd_lightning.losses.loss_parts import LossParts
from kd_lightning.schedules import Schedule


def update_schedules(
    loss: DistillationLoss,
    progress: float,
    parts: LossParts | Sequence[LossParts],
    group: dist.ProcessGroup | None = None,
) -> None:
    """Move every schedule and every token weight of a loss, as the Lightning module does after its optimizer step.

    Args:
        loss: its objective and `ce_weight` hold them.
        progress: share of the run that is done, in [0, 1].
        parts: results of the loss on the batches of the step.
        group: ranks that read different rows; all of them must call. None: this process alone.

    Raises:
        ValueError: `progress` is not in [0, 1].

    Examples:
        >>> import torch
        >>> from kd_lightning import DistillationLoss, ForwardKL, Linear, update_schedules
        >>> loss = DistillationLoss(ForwardKL(), ce_weight=Linear(1.0, 0.0))
        >>> parts = loss.from_logits(torch.zeros(2, 4), torch.eye(2, 4), torch.tensor([0, 1]))
        >>> update_schedules(loss, 0.25, parts)  # a quarter of the run is done
        >>> loss.ce_weight()
        tensor(0.7500)
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must be in [0, 1], got {progress}")
    window = AccumulationWindow(loss.reduction)
    for part in [parts] if isinstance(parts, LossParts) else parts:
        window.add(part)
    _, means = window.close(functools.partial(_sum_over, group))
    update_from_means(loss.schedules(), loss.objective.weighted(), progress, means)


def update_from_means(
    schedules: Mapping[str, Schedule],
    weighted: Mapping[str, WeightedTokens],
    progress: float,
    means: Mapping[str, Tensor],
) -> None:
    """Move schedules and token weights.

    Args:
        schedules: by any name.
        weighted: by their dotted path in the objective.
        progress: share of the run that is done, in [0, 1].
        means: of the step over all ranks, by name; sums of token weights as `weight_sums/PATH`.
    """
    for schedule in schedules.values():
        schedule.update(progress, means)
    for path, part in weighted.items():
        if (sums := means.get(f"weight_sums/{path}")) is not None:  # None: the teacher was not run
            part.update(sums)


def _sum_over(group: dist.ProcessGroup | None, totals: Tensor) -> Tensor:
    if group is not None:
        dist.all_reduce(totals, group=group)
    return totals
