"""Norm of gradients that are sharded in different ways, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from kd_lightning.distributed.dtensor import local_shard


@torch.no_grad()
def clip_norm(parameters: Iterable[Tensor], bound: float, device: torch.device) -> Tensor:
    """Scale gradients so that their norm over all ranks is at most `bound`, however each of them is sharded.

    Args:
        parameters: the same on every rank; those without a gradient are skipped.
        bound: > 0.
        device: of the collectives.

    Returns:
        The norm before clipping.
    """
    parameters = list(parameters)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = gradient_norm(parameters, device)
    factor = (bound / (norm + 1e-6)).clamp_max(1.0)
    for grad in grads:
        local_shard(grad).mul_(factor.to(grad.device))
    return norm


def gradient_norm(parameters: Iterable[Tensor], device: torch.device) -> Tensor:
    """Norm of all gradients over all ranks, 0-d, however each of them is sharded. Does not synchronize with the host.

    Args:
        parameters: the same on every rank; those without a gradient are skipped.
        device: of the collectives.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not grads:
        return torch.zeros((), device=device)
    if not any(isinstance(grad, DTensor) for grad in grads):  # replicated: the same on every rank
        norms = torch._foreach_norm([grad.float() if grad.dtype.itemsize < 4 else grad for grad in grads])
        norm: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(device, torch.float32) for norm in norms]))
        return norm
    total = torch.zeros((), device=device)
    for grad in grads:
        total += (torch.linalg.vector_norm(local_shard(grad), dtype=torch.float32) ** 2).to(device) / _replicas(grad)
    dist.all_reduce(total)
    return total.sqrt()


def _replicas(tensor: Tensor) -> int:
    """Number of ranks that hold each element."""
    ranks = dist.get_world_size()
    if not isinstance(tensor, DTensor):
        return ranks
    for i, placement in enumerate(tensor.placements):
        if not placement.is_replicate():
            ranks //= tensor.device_mesh.size(i)
    return ranks
