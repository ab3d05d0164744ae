"""The sizes of quantized layers, for a plan: built from a configuration, without weights and without the packages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCK, NESTED_BLOCK = 64, 256  # weights with one scale, and scales with one scale, in bitsandbytes
TABLE_4_BIT, TABLE_8_BIT = 16 * 4, 256 * 4  # bytes of the values that a code stands for


def quantized_bytes(out: int, width: int, settings: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes of a quantized matrix [out, width]: of its codes, and of its scales and tables.

    Args:
        out: number of rows.
        width: number of columns.
        settings: `quantization_config` of transformers, as a mapping.
    """
    weights = out * width
    if not settings.get("load_in_4bit"):
        return weights, 4 * out  # a scale per row
    blocks = -(-weights // BLOCK)
    scales = TABLE_4_BIT + 4 * blocks
    if settings.get("bnb_4bit_use_double_quant"):
        scales = TABLE_4_BIT + blocks + 4 * -(-blocks // NESTED_BLOCK) + TABLE_8_BIT + 4
    return -(-weights // 2), scales


class QuantizedShape(nn.Linear):
    """A linear layer with the bytes of a quantized one, whose forward and backward make the plain weight for a moment.

    Args:
        layer: the plain layer.
        settings: `quantization_config` of transformers, as a mapping.
    """

    def __init__(self, layer: nn.Module, settings: Mapping[str, Any]) -> None:
        nn.Module.__init__(self)
        weight: Any = layer.weight
        is_linear = isinstance(layer, nn.Linear)
        self.out_features, self.in_features = weight.shape if is_linear else weight.shape[::-1]
        codes, scales = quantized_bytes(self.out_features, self.in_features, settings)
        self.weight = nn.Parameter(torch.empty(codes, dtype=torch.uint8, device=weight.device), requires_grad=False)
        self.register_buffer("scales", torch.empty(scales, dtype=torch.uint8, device=weight.device))
        self.bias: Any = layer.bias

    def forward(self, input: Tensor) -> Tensor:
        """Outputs of the layer."""
        found: Tensor = _PlainForAMoment.apply(input, self.out_features)  # type: ignore[no-untyped-call]
        return found if self.bias is None else found + self.bias


class _PlainForAMoment(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, out: int) -> Tensor:
        ctx.width = input.shape[-1]
        return F.linear(input, input.new_empty(out, input.shape[-1]))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        return gradient @ gradient.new_empty(gradient.shape[-1], ctx.width), None


def kept_modules(model: Any) -> list[str]:
    """Names of the modules that transformers leaves out of a quantization: the LM head and what is tied to it.

    Args:
        model: built from a configuration, on the meta device.
    """
    from transformers.quantizers.base import get_keys_to_not_convert

    return sorted(get_keys_to_not_convert(model))


def use_quantized_shapes(model: Any, settings: Any) -> None:
    """Replace the layers of a model without weights that a quantizer would replace: linear layers, not the LM head.

    Args:
        model: built from a configuration, on the meta device.
        settings: of `settings.quantization_of`.
    """
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    given = settings.to_dict()
    skipped = given.get("llm_int8_skip_modules") or given.get("modules_to_not_convert") or []
    kept = [*kept_modules(model), *skipped, *(model._keep_in_fp32_modules or [])]
    kinds = (nn.Linear, Conv1D) if "load_in_4bit" in given else (nn.Linear,)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, kinds) and should_convert_module(name, kept):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, QuantizedShape(layer, given))
