"""Sharded tensors: local shards, full tensors, and conversions between them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

TENSOR = "tensor"
"""Name of the mesh dimension over which a vocabulary is split."""


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds only a shard of the tensor."""
    return isinstance(tensor, DTensor)


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's shard, sharing its memory; a tensor that is not sharded as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor, gathered on every rank; a tensor that is not sharded as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    if TENSOR not in (tensor.device_mesh.mesh_dim_names or ()):
        return _on_mesh_device(tensor).full_tensor()
    # `DTensor.full_tensor` warns that it redistributes these placements inefficiently
    return _all_gather(vocabulary_shard(tensor), tensor.device_mesh.get_group(TENSOR))


def vocabulary_shard(tensor: DTensor) -> Tensor:
    """The rows of this rank's part of the vocabulary, gathered from the ranks that share that part.

    The full tensor if it is not split over the vocabulary.
    """
    names = tensor.device_mesh.mesh_dim_names or ()
    if TENSOR not in names:
        return _on_mesh_device(tensor).full_tensor()
    held = local_shard(_on_mesh_device(tensor))
    if len(names) == 1:
        return held
    part = len(tensor) // tensor.device_mesh[TENSOR].size()
    group = tensor.device_mesh.get_group("shard")
    padded = held.new_zeros(-(-part // group.size()), *held.shape[1:])  # the last ranks may hold fewer rows
    padded[: len(held)] = held
    return _all_gather(padded, group)[:part]


def _on_mesh_device(tensor: DTensor) -> DTensor:
    """The same shard on the device of the collectives: an offloaded one is copied from host memory."""
    held = local_shard(tensor)
    if held.device.type == tensor.device_mesh.device_type:
        return tensor
    moved = held.to(tensor.device_mesh.device_type)
    return DTensor.from_local(
        moved, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def _all_gather(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    pieces = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(pieces, part.contiguous(), group=group)
    return torch.cat(pieces)


def row_range(tensor: DTensor) -> tuple[int, int]:
    """Start and stop of the rows of the full tensor that this rank holds; (0, 0) if it holds none."""
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return (offset[0], offset[0] + shape[0]) if shape[0] else (0, 0)


def is_first_replica(tensor: DTensor) -> bool:
    """Whether this rank is the first of those that hold the same rows."""
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    return all(i == 0 for i, kind in zip(coordinate, tensor.placements, strict=True) if kind.is_replicate())


def shard_like(read: Callable[[int, int], Tensor], like: Tensor) -> Tensor:
    """A tensor sharded like another one.

    Args:
        read: `read(start, stop)` returns these rows of the full tensor.
        like: the tensor that it is like; if that one is not sharded, all rows are read.
    """
    if not isinstance(like, DTensor):
        return read(0, len(like))
    held = local_shard(like)
    start, stop = row_range(like)
    piece = read(start, stop).to(held.device) if stop > start else held.new_empty(held.shape)
    return DTensor.from_local(piece, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def full_state_dict(model: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """The state of a model with full tensors on the CPU; tied tensors stay tied. A collective: all ranks must call it.

    Args:
        model: any module.
        keep: whether this rank needs the result; False: it is empty.
    """
    state: dict[str, Tensor] = {}
    found: dict[int, Tensor] = {}
    persistent = model.state_dict().keys()
    for name, tensor in _tensors(model):
        if name not in persistent:
            continue
        if id(tensor) not in found:
            full = full_tensor(tensor.detach())
            found[id(tensor)] = full.cpu() if keep else torch.empty(0)
        if keep:
            state[name] = found[id(tensor)]
    return state


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def tensor_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors. A collective if they are sharded."""
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(full_tensor(tensor.detach()).cpu().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
