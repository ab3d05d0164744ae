"""FSDP2: shard student and teacher, layer by layer."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NotRequired, Protocol, TypedDict, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from kd_lightning.engine.head import Head

R = TypeVar("R")


class ShardableStudent(nn.Module):
    """Base class of the module that is sharded as the student: the model and what reads it under one forward."""

    student: nn.Module

    @abstractmethod
    def head(self) -> Head | None:
        """The student's LM head with its current weights; None if the model cannot be split into backbone and head."""

    @abstractmethod
    def call(self, function: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """`function(*args, **kwargs)` with the parameters gathered, for what reads them outside of `forward`."""


class ShardableTeacher(Protocol):
    """What a strategy needs of a teacher."""

    @property
    def head(self) -> Head | None:
        """The teacher's LM head; None if the model cannot be split into backbone and head."""

    def shard(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Replace the model by what `wrap` returns; called again, nothing happens."""


class ShardableTeachers(Protocol):
    """A teacher, which may be made of several."""

    @property
    def members(self) -> Mapping[str, ShardableTeacher]:
        """The teachers that it is made of, by name; itself if it is not made of others."""


class ShardableModule(Protocol):
    """What a strategy needs of the Lightning module."""

    @property
    def model(self) -> ShardableStudent | None:
        """The student with its loss; None before `configure_model`."""

    @property
    def teacher(self) -> ShardableTeachers | None:
        """The teacher, if there is one."""


class ShardingOptions(TypedDict):
    """Arguments of `shard_student` and `shard_teacher`."""

    mesh: DeviceMesh
    layer_mesh: NotRequired[DeviceMesh]
    layer_dtype: torch.dtype | None
    offload_policy: OffloadPolicy


class Root(nn.Module):
    """Owner of the parameters outside of the layers; what reads them runs inside its forward, where they are gathered.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """`function(*args, **kwargs)`."""
        return function(*args, **kwargs)


def shard_student(
    model: ShardableStudent,
    mesh: DeviceMesh,
    layer_mesh: DeviceMesh | None = None,
    layer_dtype: torch.dtype | None = None,
    offload_policy: OffloadPolicy | None = None,
) -> None:
    """Shard a student in place: each layer by itself, the rest as one group that stays gathered until backward.

    Args:
        model: the student with its loss.
        mesh: one dimension to shard over; or two: to replicate and to shard over.
        layer_mesh: the same for the layers; None: `mesh`.
        layer_dtype: dtype that layers are gathered and computed in; None: that of the parameters. Gradients are
            reduced in fp32.
        offload_policy: where the shards are kept; None: on the device.
    """
    shard = functools.partial(fully_shard, offload_policy=offload_policy or OffloadPolicy())
    for layer in transformer_layers(model):
        shard(layer, mesh=layer_mesh or mesh, mp_policy=_precision(layer_dtype))
    sharded = shard(model, mesh=mesh, mp_policy=_precision(None))
    register_fsdp_forward_method(model, "call")
    model.register_forward_hook(_reshard_unless_training)
    hf: Any = model.student  # `generate` of this one object is replaced
    hf.generate = _gathered(model.call, hf.generate, after=sharded.reshard)


def shard_teacher(
    model: nn.Module,
    mesh: DeviceMesh,
    layer_mesh: DeviceMesh | None = None,
    layer_dtype: torch.dtype | None = None,
    offload_policy: OffloadPolicy | None = None,
) -> Root:
    """Shard a frozen model in place; parameters stay gathered only while they are read.

    Args:
        model: a Hugging Face model.
        mesh: as for `shard_student`.
        layer_mesh: as for `shard_student`.
        layer_dtype: as for `shard_student`.
        offload_policy: as for `shard_student`.

    Returns:
        A module that gathers the parameters around a call: `root(function, *args)`.
    """
    root = Root(model)
    shard = functools.partial(fully_shard, offload_policy=offload_policy or OffloadPolicy(), reshard_after_forward=True)
    for layer in transformer_layers(model):
        shard(layer, mesh=layer_mesh or mesh, mp_policy=_precision(layer_dtype))
    shard(root, mesh=mesh, mp_policy=_precision(None))
    hf: Any = model  # `generate` of this one object is replaced
    hf.generate = _gathered(root, hf.generate)
    return root


def _gathered(
    root: Callable[..., Any], generate: Callable[..., R], after: Callable[[], object] | None = None
) -> Callable[..., R]:
    """`generate` with the parameters outside of the layers gathered; all ranks must call it equally often."""

    @functools.wraps(generate)
    def gathered(*args: Any, **kwargs: Any) -> R:
        kwargs["synced_gpus"] = True  # ranks that have finished continue to gather for the others
        found: R = root(generate, *args, **kwargs)
        if after is not None:
            after()
        return found

    return gathered


def transformer_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a model: members of its outermost `ModuleList`s that share no parameter with the rest."""
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


def _precision(dtype: torch.dtype | None) -> MixedPrecisionPolicy:
    """Inputs are cast by autocast, as on one device."""
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _reshard_unless_training(module: nn.Module, args: object, output: object) -> None:
    """Free the gathered parameters if there is no backward to do it: they would be stale after the next update."""
    if not torch.is_grad_enabled():
        assert isinstance(module, FSDPModule)
        module.reshard()
