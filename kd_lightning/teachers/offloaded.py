"""A teacher whose layers stay in host memory and are copied to the device one at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.distributed.dtensor import tensor_digest as tensor_digest
from kd_lightning.distributed.fsdp2 import transformer_layers
from kd_lightning.models.backbone import body_and_head as body_and_head
from kd_lightning.models.backbone import logits as logits
from kd_lightning.teachers.base import Teacher as Teacher
from kd_lightning.teachers.cached import CachedTeacher as CachedTeacher
from kd_lightning.teachers.hf import AroundHF, HFTeacher


class OffloadedTeacher(AroundHF):
    """A Hugging Face model whose layers wait in host memory and visit the device one at a time.

    What stands around the layers (embedding, last norm, head) stays on the device.

    Args:
        path: as for `HFTeacher`.
        kwargs: as for `HFTeacher`.
    """

    def __init__(self, path: str, kwargs: dict[str, Any] | None = None) -> None:
        super().__init__(HFTeacher(path, kwargs))
        self._device = torch.device("cpu")
        self._visits: list[_Visit] = []

    def load(self, device: torch.device | str = "cpu") -> None:
        """Read the model into host memory, and let its layers visit the device."""
        self._inner.load()
        self.to(device)

    def to(self, device: torch.device | str) -> None:
        """Move what stands around the layers, and send the layers to another device from now on."""
        device = torch.device(device)
        if device == self._device:
            return
        for visit in self._visits:
            visit.end()
        parts = transformer_layers(self.model)
        inside = {id(module) for part in parts for module in part.modules()}
        moved: dict[int, Tensor] = {}  # a tied weight stays one
        for module in self.model.modules():
            if id(module) not in inside:
                for table, name, tensor in _tensors(module):
                    table[name] = moved.setdefault(id(tensor), _at(tensor, device))
        self._visits = [_Visit(part, device) for part in parts]
        self._device = device


class _Visit:
    """Hooks that copy a layer to a device before its forward and drop the copy after it."""

    def __init__(self, layer: nn.Module, device: torch.device) -> None:
        self.device = device
        self.home = [(table, name, tensor) for module in layer.modules() for table, name, tensor in _tensors(module)]
        if device.type == "cuda":  # from page-locked memory the host need not wait for the copy
            self.home = [(table, name, _page_locked(tensor)) for table, name, tensor in self.home]
            self._leave()
        before = layer.register_forward_pre_hook(self._arrive)
        after = layer.register_forward_hook(self._leave, always_call=True)
        self.handles = (before, after)

    def _arrive(self, *_: Any) -> None:
        for table, name, tensor in self.home:
            table[name] = _at(tensor, self.device)

    def _leave(self, *_: Any) -> None:
        for table, name, tensor in self.home:
            table[name] = tensor

    def end(self) -> None:
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()


def _tensors(module: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    """A module's own parameters and buffers, each with the table that it stands in."""
    tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    return [(table, name, tensor) for table in tables for name, tensor in table.items() if tensor is not None]


def _at(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.device == device:
        return tensor
    copy = tensor.detach().to(device, non_blocking=True)
    return nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy


def _page_locked(tensor: Tensor) -> Tensor:
    pinned = tensor.detach().pin_memory()
    return nn.Parameter(pinned, requires_grad=False) if isinstance(tensor, nn.Parameter) else pinned
