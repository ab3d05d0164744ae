"""The norm of gradients that are sharded in several ways, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from kd_lightning.distributed.dtensor import local_shard


@torch.no_grad()
def clip_norm(parameters: Iterable[Tensor], bound: float, device: torch.device) -> Tensor:
    """Scale gradients so that their norm over all ranks is at most `bound`, wherever each of them is sharded.

    Args:
        parameters: the same on every rank; those without a gradient are left out.
        bound: > 0.
        device: where ranks talk.

    Returns:
        The norm before.
    """
    parameters = list(parameters)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = gradient_norm(parameters, device)
    factor = (bound / (norm + 1e-6)).clamp_max(1.0)
    for grad in grads:
        local_shard(grad).mul_(factor.to(grad.device))
    return norm


def gradient_norm(parameters: Iterable[Tensor], device: torch.device) -> Tensor:
    """Norm of all gradients over all ranks, 0-d, wherever each of them is sharded; the host waits for nothing.

    Args:
        parameters: the same on every rank; those without a gradient are left out.
        device: where ranks talk.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not grads:
        return torch.zeros((), device=device)
    if not any(isinstance(grad, DTensor) for grad in grads):  # the same on every rank
        norms = torch._foreach_norm([grad.float() if grad.dtype.itemsize < 4 else grad for grad in grads])
        norm: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(device, torch.float32) for norm in norms]))
        return norm
    total = torch.zeros((), device=device)
    for grad in grads:
        total += (torch.linalg.vector_norm(local_shard(grad), dtype=torch.float32) ** 2).to(device) / _copies(grad)
    dist.all_reduce(total)
    return total.sqrt()


def _copies(tensor: Tensor) -> int:
    """On how many ranks each element is."""
    ranks = dist.get_world_size()
    if not isinstance(tensor, DTensor):
        return ranks
    for i, kind in enumerate(tensor.placements):
        if not kind.is_replicate():
            ranks //= tensor.device_mesh.size(i)
    return ranks
