"""Schedules and token weights outside of Lightning: one call after each optimizer step moves them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from kd_lightning.losses.distillation import DistillationLoss
from kd_lightning.losses.loss_parts import LossParts


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
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must be in [0, 1], got {progress}")
    update_from_means(loss, progress, step_means([parts] if isinstance(parts, LossParts) else list(parts), group))


def step_means(parts: Sequence[LossParts], group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """Means of a step by name, as schedules read them; sums of token weights as `weight_sums/PATH`.

    Args:
        parts: results of the loss on the batches of the step.
        group: as in `update_schedules`.
    """
    sums: dict[str, Tensor] = {}
    for part in parts:
        found = {f"value/{name}": (x * part.weights).sum() for name, x in part.values.items()}
        found |= {f"mean/{name}": torch.stack(list(x)) for name, x in {**part.by_response, **part.components}.items()}
        found |= {f"weights/{path}": x for path, x in part.token_weights.items()}
        for name, x in {**found, "divisor": part.divisor}.items():
            x = x.detach().double()
            sums[name] = sums[name] + x if name in sums else x
    if group is not None:
        for name in sorted(sums):
            dist.all_reduce(sums[name], group=group)
    divisor = sums.pop("divisor", torch.ones(())).clamp_min(1)
    means = {}
    for name, x in sums.items():
        kind, _, rest = name.partition("/")
        if kind == "weights":
            means[f"weight_sums/{rest}"] = x.float()
        else:
            means[rest] = (x[0] / x[1] if kind == "mean" else x / divisor).float()
    return means


def update_from_means(loss: DistillationLoss, progress: float, means: Mapping[str, Tensor]) -> None:
    """Move every schedule and every token weight of a loss.

    Args:
        loss: its objective and `ce_weight` hold them.
        progress: share of the run that is done, in [0, 1].
        means: of the step over all ranks, by name; sums of token weights as `weight_sums/PATH`.
    """
    for schedule in loss.schedules().values():
        schedule.update(progress, dict(means))
    for path, part in loss.objective.weighted().items():
        if (sums := means.get(f"weight_sums/{path}")) is not None:  # None: the teacher was not run
            part.update(sums)
