"""A teacher whose layers stay in host memory and are copied to the device one at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.distributed.dtensor import tensor_digest as tensor_digest
from kd_lightning.distributed.fsdp2 import transformer_layers
from kd_lightning.models.backbone import body_and_head as body_and_head
from kd_lightning.models.backbone import logits as logits
from kd_lightning.models.quantized.layers import is_quantized
from kd_lightning.teachers.base import Teacher as Teacher
from kd_lightning.teachers.cached import CachedTeacher as CachedTeacher
from kd_lightning.teachers.hf import CausalLMTeacher


class OffloadedTeacher(CausalLMTeacher):
    """A Hugging Face model whose layers stay in host memory and are copied to the device one at a time.

    All other modules (embedding, last norm, LM head) stay on the device.

    Args:
        path: as for `HFTeacher`.
        kwargs: as for `HFTeacher`.

    Examples:
        >>> from kd_lightning import DistillationModule, OffloadedTeacher
        >>> module = DistillationModule("asset:student", OffloadedTeacher("asset:teacher", {"dtype": "bfloat16"}))
        >>> module.teacher.layers_on_host
        True
    """

    layers_on_host = True

    def __init__(self, path: str, kwargs: dict[str, Any] | None = None) -> None:
        super().__init__(path, kwargs)
        self._device = torch.device("cpu")
        self._copies: list[_CopyDuringForward] = []

    def read_model(self) -> Any:
        """The model, in host memory.

        Raises:
            ValueError: as for `HFTeacher`; it is quantized.
        """
        model = super().read_model()
        if is_quantized(model):
            raise ValueError(
                "OffloadedTeacher: the layers of a quantized model cannot be copied one at a time: use HFTeacher, or "
                "remove quantization_config from its kwargs"
            )
        return model

    def to(self, device: torch.device | str) -> None:
        """Move all modules but the layers, and copy the layers to this device from now on."""
        device = torch.device(device)
        if device == self._device:
            return
        model = self._loaded()
        for copy in self._copies:
            copy.remove()
        layers = transformer_layers(model)
        inside = {id(module) for layer in layers for module in layer.modules()}
        moved: dict[int, Tensor] = {}  # a tied weight stays tied
        for module in model.modules():
            if id(module) not in inside:
                for table, name, tensor in _tensors(module):
                    table[name] = moved.setdefault(id(tensor), _on_device(tensor, device))
        self._copies = [_CopyDuringForward(layer, device) for layer in layers]
        self._device = device

    def shard(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Do nothing: every rank keeps its own copy in host memory."""


class _CopyDuringForward:
    """Hooks that copy a layer to a device before its forward and drop the copy after it."""

    def __init__(self, layer: nn.Module, device: torch.device) -> None:
        self.device = device
        self.on_host = [(table, name, tensor) for part in layer.modules() for table, name, tensor in _tensors(part)]
        if device.type == "cuda":  # copies from page-locked memory are asynchronous
            self.on_host = [(table, name, _page_locked(tensor)) for table, name, tensor in self.on_host]
            self._restore()
        before = layer.register_forward_pre_hook(self._copy)
        after = layer.register_forward_hook(self._restore, always_call=True)
        self.handles = (before, after)

    def _copy(self, *_: Any) -> None:
        for table, name, tensor in self.on_host:
            table[name] = _on_device(tensor, self.device)

    def _restore(self, *_: Any) -> None:
        for table, name, tensor in self.on_host:
            table[name] = tensor

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()


def _tensors(module: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    """A module's own parameters and buffers, each with the dict that holds it."""
    tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    return [(table, name, tensor) for table in tables for name, tensor in table.items() if tensor is not None]


def _on_device(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.device == device:
        return tensor
    copy = tensor.detach().to(device, non_blocking=True)
    return nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy


def _page_locked(tensor: Tensor) -> Tensor:
    pinned = tensor.detach().pin_memory()
    return nn.Parameter(pinned, requires_grad=False) if isinstance(tensor, nn.Parameter) else pinned
