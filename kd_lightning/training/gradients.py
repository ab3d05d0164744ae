"""Gradients and optimizers: the division by the accumulation window, clipping, and the state restored at a resume."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from kd_lightning.distributed.dtensor import is_sharded, local_shard
from kd_lightning.distributed.grad_norm import clip_norm


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters of an optimizer."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def learning_rate(optimizer: Optimizer) -> float:
    """The learning rate that was configured, before any scheduler."""
    group = optimizer.param_groups[0]
    return float(group.get("initial_lr", group["lr"]))


def scale_gradients(optimizer: Optimizer, factor: Tensor) -> None:
    """Multiply all gradients by a 0-d tensor, in place."""
    grads = [local_shard(p.grad) for p in parameters_of(optimizer) if p.grad is not None]
    torch._foreach_mul_(grads, factor)


def clip_sharded_gradients(
    optimizer: Optimizer, bound: float | None, algorithm: str | None, device: torch.device
) -> bool:
    """Clip by the norm over all ranks if parameters are sharded in several ways; False: nothing was done.

    Args:
        optimizer: of the run.
        bound: largest norm; None or 0: no clipping.
        algorithm: Lightning's `gradient_clip_algorithm`.
        device: for collectives.
    """
    parameters = parameters_of(optimizer)
    if not bound or algorithm not in (None, "norm") or not any(is_sharded(p) for p in parameters):
        return False
    clip_norm(parameters, bound, device)
    return True


def check_restored_optimizer(optimizer: Optimizer, configured: float) -> None:
    """Check an optimizer whose state may come from a checkpoint.

    Args:
        optimizer: of a run that has started.
        configured: the learning rate it was built with.

    Raises:
        ValueError: the checkpoint holds the state of another optimizer class.
    """
    if missing := optimizer.defaults.keys() - optimizer.param_groups[0].keys():
        raise ValueError(
            f"the checkpoint was saved with another optimizer than {type(optimizer).__name__} (it has no "
            f"{', '.join(sorted(missing))}): resume with the optimizer of the checkpoint, or start a new run"
        )
    restored = learning_rate(optimizer)
    if restored != configured:
        rank_zero_warn(
            f"learning rate {restored:g} restored from the checkpoint; the configured {configured:g} is ignored"
        )
