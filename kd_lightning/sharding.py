"""Models whose parameters are spread over ranks: how they are cut, gathered where they are read, and made whole."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from kd_lightning.engine import Head

TENSOR = "tensor"  # the dimension of a mesh along which a vocabulary is split


class Root(nn.Module):
    """What holds the parameters around the layers: whatever reads them runs inside its forward, and finds them whole.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """What `function(*args, **kwargs)` gives."""
        return function(*args, **kwargs)


def shard_student(
    model: nn.Module,
    mesh: DeviceMesh,
    layer_mesh: DeviceMesh | None = None,
    layer_dtype: torch.dtype | None = None,
    offload_policy: OffloadPolicy | None = None,
) -> None:
    """Shard a `StudentWithLoss`: each layer by itself, the rest as one group that is there from forward to backward.

    Args:
        model: the student with its loss; both are left in their place.
        mesh: one dimension to shard over; or two: to replicate and to shard over.
        layer_mesh: the same for the layers; None: `mesh`.
        layer_dtype: what layers are gathered and computed in; None: as they are. Gradients are summed in fp32.
        offload_policy: where the shards are.
    """
    student: Any = model.student
    shard = functools.partial(fully_shard, offload_policy=offload_policy or OffloadPolicy())
    for layer in layers(model):
        shard(layer, mesh=layer_mesh or mesh, mp_policy=_policy(layer_dtype))
    shard(model, mesh=mesh, mp_policy=_policy(None))
    register_fsdp_forward_method(model, "call")
    model.register_forward_hook(_reshard_unless_training)
    student.generate = _inside(model.call, student.generate, then=model.reshard)  # type: ignore[arg-type]


def shard_teacher(
    model: nn.Module,
    mesh: DeviceMesh,
    layer_mesh: DeviceMesh | None = None,
    layer_dtype: torch.dtype | None = None,
    offload_policy: OffloadPolicy | None = None,
) -> Root:
    """Shard a frozen model, and give what its parameters are gathered by: nothing is whole longer than it is read.

    Args:
        model: a Hugging Face model; left in its place.
        mesh: as for `shard_student`.
        layer_mesh: as for `shard_student`.
        layer_dtype: as for `shard_student`.
        offload_policy: as for `shard_student`.
    """
    hf: Any = model
    root = Root(model)
    shard = functools.partial(fully_shard, offload_policy=offload_policy or OffloadPolicy(), reshard_after_forward=True)
    for layer in layers(model):
        shard(layer, mesh=layer_mesh or mesh, mp_policy=_policy(layer_dtype))
    shard(root, mesh=mesh, mp_policy=_policy(None))
    hf.generate = _inside(root, hf.generate)
    return root


def _inside(root: Callable[..., Any], generate: Callable[..., Any], then: Callable[[], Any] | None = None) -> Any:
    """Let a model's `generate` run with the parameters around the layers gathered; all ranks call it equally often."""

    @functools.wraps(generate)
    def gathered(*args: Any, **kwargs: Any) -> Any:
        kwargs["synced_gpus"] = True  # ranks that are done go on gathering for the others
        found = root(generate, *args, **kwargs)
        if then is not None:
            then()
        return found

    return gathered


def layers(model: nn.Module) -> list[nn.Module]:
    """The repeated parts of a model: members of its outermost `ModuleList`s that share no parameter with the rest."""
    found: dict[int, nn.Module] = {}
    _collect(model, found)
    owners: dict[int, set[int]] = {}
    for module in found.values():
        for parameter in module.parameters():
            owners.setdefault(id(parameter), set()).add(id(module))
    inside = {id(part) for module in found.values() for part in module.modules()}
    for part in model.modules():
        if id(part) not in inside:
            for parameter in part.parameters(recurse=False):
                owners.setdefault(id(parameter), set()).add(0)
    return [
        module
        for module in found.values()
        if (own := list(module.parameters())) and all(len(owners[id(parameter)]) == 1 for parameter in own)
    ]


def _collect(module: nn.Module, found: dict[int, nn.Module]) -> None:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            found |= {id(member): member for member in child}
        else:
            _collect(child, found)


def _policy(dtype: torch.dtype | None) -> MixedPrecisionPolicy:
    """Inputs are left to autocast, as on one device."""
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _reshard_unless_training(module: Any, args: Any, output: Any) -> None:
    """Without a backward nobody would: the whole parameters would outlive the next change of the shards."""
    if not torch.is_grad_enabled():
        module.reshard()


def checkpoint_activations(model: Any) -> None:
    """Let a Hugging Face model compute its layers again in backward.

    Raises:
        ValueError: it cannot.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(f"activation_checkpointing: {type(model).__name__} cannot compute its layers again")
    model.activation_checkpointing_enable({"use_reentrant": False})


# ------------------------------------------------------------------------------------------------ shards and the whole
def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds a part of the tensor only."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, sharing its memory; a tensor that is not sharded as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered on every rank; one that is not sharded as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    if TENSOR not in (tensor.device_mesh.mesh_dim_names or ()):
        return _there(tensor).full_tensor()
    return _gathered(_part(tensor), tensor.device_mesh.get_group(TENSOR))  # torch says it would do this badly


def split_vocabulary(model: Any, mesh: DeviceMesh, role: str) -> None:
    """Give each rank of a group its part of a model's head (and of its embedding, where they are one).

    Args:
        model: a Hugging Face model.
        mesh: one dimension, called `tensor`.
        role: `student` or `teacher`, for the error.

    Raises:
        ValueError: the vocabulary cannot be divided by the size of the group.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied, learns = head.weight is embedding.weight, head.weight.requires_grad
    if len(head.weight) % mesh.size():
        raise ValueError(
            f"strategy.tensor_parallel_size must divide the {role}'s vocabulary, {len(head.weight)}, got {mesh.size()}"
        )
    parallelize_module(head, mesh, ColwiseParallel(output_layouts=Replicate()), src_data_rank=None)
    if tied:
        parallelize_module(embedding, mesh, RowwiseParallel(input_layouts=Replicate()), src_data_rank=None)
        head.weight = embedding.weight
    for parameter in (*head.parameters(), *(embedding.parameters() if tied else ())):
        parameter.requires_grad_(learns)


def here(head: Head) -> Head:
    """A head with what this rank needs of it: its part of a vocabulary that is split, else all; ranks ask together."""
    if not isinstance(head.weight, DTensor):
        return head
    mesh = head.weight.device_mesh
    split = TENSOR in (mesh.mesh_dim_names or ())
    bias = head.bias
    return dataclasses.replace(
        head,
        weight=_part(head.weight),
        bias=_part(bias) if isinstance(bias, DTensor) else bias,
        group=mesh.get_group(TENSOR) if split else None,
    )


def _part(tensor: DTensor) -> Tensor:
    """The rows of this rank's part of the vocabulary, gathered from those that share it."""
    names = tensor.device_mesh.mesh_dim_names or ()
    if TENSOR not in names:
        return _there(tensor).full_tensor()
    held = local(_there(tensor))
    if len(names) == 1:
        return held
    part = len(tensor) // tensor.device_mesh[TENSOR].size()
    group = tensor.device_mesh.get_group("shard")
    padded = held.new_zeros(-(-part // group.size()), *held.shape[1:])  # the last of them may hold fewer
    padded[: len(held)] = held
    return _gathered(padded, group)[:part]


def _there(tensor: DTensor) -> DTensor:
    """The same shard where ranks talk: an offloaded one comes from host memory."""
    held = local(tensor)
    if held.device.type == tensor.device_mesh.device_type:
        return tensor
    moved = held.to(tensor.device_mesh.device_type)
    return DTensor.from_local(
        moved, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def _gathered(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    pieces = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(pieces, part.contiguous(), group=group)
    return torch.cat(pieces)


def rows(tensor: DTensor) -> tuple[int, int]:
    """First row of the whole tensor that this rank holds, and the one after its last; equal where it holds none."""
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return (offset[0], offset[0] + shape[0]) if shape[0] else (0, 0)


def writes(tensor: DTensor) -> bool:
    """Whether this rank is the first of those that hold the same rows."""
    place = tensor.device_mesh.get_coordinate()
    assert place is not None
    return all(i == 0 for i, kind in zip(place, tensor.placements, strict=True) if kind.is_replicate())


def shard_of(read: Callable[[int, int], Tensor], like: Tensor) -> Tensor:
    """A tensor sharded like another one.

    Args:
        read: gives rows of the whole tensor.
        like: the tensor in whose place it will stand; one that is not sharded gets all rows.
    """
    if not isinstance(like, DTensor):
        return read(0, len(like))
    held = local(like)
    start, stop = rows(like)
    piece = read(start, stop).to(held.device) if stop > start else held.new_empty(held.shape)
    return DTensor.from_local(piece, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def whole_state(model: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """The state of a model with every tensor whole, on the CPU; names that are one tensor stay one.

    Args:
        model: any module; all ranks call this together.
        keep: whether this rank wants the result; otherwise it is empty.
    """
    state: dict[str, Tensor] = {}
    found: dict[int, Tensor] = {}
    persistent = model.state_dict().keys()
    for name, tensor in _tensors(model):
        if name not in persistent:
            continue
        if id(tensor) not in found:
            full = whole(tensor.detach())
            found[id(tensor)] = full.cpu() if keep else full.new_empty(0)
        if keep:
            state[name] = found[id(tensor)]
    return state


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
