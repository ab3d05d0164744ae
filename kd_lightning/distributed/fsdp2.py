"""FSDP2: wrap student and teacher, layer by layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method


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
    for layer in transformer_layers(model):
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
    for layer in transformer_layers(model):
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


def transformer_layers(model: nn.Module) -> list[nn.Module]:
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
