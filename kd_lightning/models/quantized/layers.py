"""Quantized layers of a loaded model, and the plain weights that they compute with."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.models.hf_adapter import base_model, is_peft_model, output_embeddings
from kd_lightning.models.quantized.settings import saved_method
from kd_lightning.models.quantized.sizes import BLOCK, QuantizedShape

TRAINED_UNDER = ("bitsandbytes", "torchao")  # the methods whose layers pass on a gradient


def is_quantized_weight(weight: object) -> bool:
    """Whether a weight is quantized: a tensor class of bitsandbytes or torchao."""
    return type(weight).__module__.partition(".")[0] in ("bitsandbytes", "torchao")


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The quantized layers of a model, by name; also those of a plan, which have sizes alone."""
    return {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, QuantizedShape) or is_quantized_weight(part._parameters.get("weight"))
    }


def is_quantized(model: nn.Module) -> bool:
    """Whether a model has a quantized layer."""
    return bool(quantized_layers(model))


def plain_weight(layer: nn.Module) -> Tensor:
    """The weight that a quantized layer computes with, [out, in]; [in, out] if the layer was a `Conv1D`."""
    weight: Any = layer.weight
    if type(weight).__module__.startswith("torchao"):
        return weight.dequantize().detach()  # type: ignore[no-any-return]
    from bitsandbytes import functional
    from transformers.pytorch_utils import Conv1D

    if weight.dtype.itemsize == 1 and hasattr(layer, "state"):  # 8 bits: only those layers have a state
        state: Any = layer.state
        scales = weight.SCB if state.SCB is None else state.SCB
        found: Tensor = functional.int8_vectorwise_dequant(weight.data, scales)
    else:
        found = functional.dequantize_4bit(weight.data, weight.quant_state)
    is_transposed = issubclass(getattr(layer, "source_cls", nn.Linear), Conv1D)  # set by transformers
    return found.detach().T.contiguous() if is_transposed else found.detach()


def plain_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a model by name, one at a time; of a quantized layer the weight that it computes with."""
    layers = quantized_layers(model)
    for name, parameter in model.named_parameters():
        owner, _, own = name.rpartition(".")
        yield name, plain_weight(layers[owner]) if owner in layers and own == "weight" else parameter


def plain_state(layer: nn.Module) -> dict[str, Tensor]:
    """Weight and bias of a quantized layer, as those of a plain one."""
    found, bias = {"weight": plain_weight(layer)}, layer._parameters.get("bias")
    return found if bias is None else {**found, "bias": bias.detach()}


def count_parameters(model: nn.Module, trainable: bool = False) -> int:
    """Number of parameters of a model; those of a quantized layer are those of the plain one.

    Args:
        model: any module.
        trainable: count those alone that require a gradient.
    """
    layers = quantized_layers(model)
    whole = {id(part._parameters["weight"]): part for part in layers.values()}
    found = 0
    for parameter in model.parameters():
        if parameter.requires_grad or not trainable:
            part: Any = whole.get(id(parameter))
            found += parameter.numel() if part is None else part.out_features * part.in_features
    return found


def plain_shell(model: Any) -> Any:
    """The same model without tensors and without a quantization, for `save_pretrained` with plain tensors."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    config.dtype = model.dtype
    with torch.device("meta"):
        shell = type(model)(config)
    shell.generation_config = model.generation_config
    return shell


def prepare_layers(model: nn.Module) -> None:
    """Make the layers of bitsandbytes compute the same everywhere, and let them be copied and moved.

    On a CPU with AVX512-BF16, 4-bit layers pack their weights again in the first pass without a gradient. Packed layers
    compute in bfloat16, and no gradient goes through them. The package has no switch; it asks each layer. 8-bit layers
    move their scales away from the weight in their first pass; a weight that is moved afterwards would lose them.
    """
    for layer in quantized_layers(model).values():
        part: Any = layer
        if hasattr(part, "support_avx512bf16_for_cpu"):  # a 4-bit layer of bitsandbytes
            part.state_dict()  # packed weights are unpacked in place before they are saved
            part.support_avx512bf16_for_cpu = False
        elif hasattr(part, "state") and part.state.SCB is not None:  # an 8-bit layer that has run
            part.weight.CB, part.weight.SCB = part.state.CB, part.state.SCB


def check_widths(model: nn.Module, role: str) -> None:
    """Check that the CPU kernel of bitsandbytes reads the 4-bit layers right.

    Its version 0.50.2 counts the blocks of 64 weights, which share a scale, from the begin of each row, but they are
    saved from the begin of the matrix. Rows of an odd length are read by another kernel.

    Raises:
        ValueError: the rows of a layer on a CPU are not whole blocks.
    """
    for name, layer in quantized_layers(model).items():
        part: Any = layer
        width = part.in_features
        if hasattr(part, "support_avx512bf16_for_cpu") and part.weight.device.type == "cpu":
            if width % BLOCK and width % 2 == 0:
                own = name.rpartition(".")[2]
                raise ValueError(
                    f"{role}: on a CPU, bitsandbytes reads 4-bit layers wrongly unless their input size is a multiple "
                    f"of {BLOCK}, and {name!r} has {width}: leave it out (quantization_config.llm_int8_skip_modules: "
                    f"[{own}]), or use load_in_8bit or a GPU"
                )


def check_not_quantized(model: nn.Module, role: str) -> None:
    """Check that a model that FSDP2 is about to shard has no quantized layer.

    Raises:
        ValueError: it has one.
    """
    if is_quantized(model):
        raise ValueError(
            f"{role}: a quantized model cannot be sharded by fsdp2, which shards plain tensors: use --trainer.strategy "
            f"ddp, or remove quantization_config from {role}_kwargs"
        )


def check_head(model: nn.Module, role: str) -> None:
    """Check that the LM head is not quantized: the loss reads its matrix.

    Raises:
        ValueError: it is.
    """
    layer = output_embeddings(base_model(model))
    if isinstance(layer, nn.Module) and is_quantized_weight(layer._parameters.get("weight")):
        raise ValueError(
            f"{role}: its LM head is quantized, but the loss reads its matrix: leave it out (add lm_head to "
            "llm_int8_skip_modules or modules_to_not_convert, or leave these unset)"
        )


def check_trainable(model: Any, role: str, has_adapters: bool) -> None:
    """Check that a quantized student trains adapters, and that its layers pass on an exact gradient.

    Args:
        model: the student.
        role: for the message.
        has_adapters: whether adapters are added to it.

    Raises:
        ValueError: its own weights would be trained, or a layer has no exact gradient.
    """
    layers = quantized_layers(model)
    saved = getattr(base_model(model).config, "quantization_config", None)
    if saved is None and not layers:
        return
    method = saved_method(saved if isinstance(saved, Mapping) else saved.to_dict()) if saved is not None else "torchao"
    if method not in TRAINED_UNDER:
        raise ValueError(
            f"{role}: a model quantized by {method} cannot be a student: use its original and "
            f"{role}_kwargs.quantization_config"
        )
    if not has_adapters and not is_peft_model(model):
        raise ValueError(
            f"{role}: quantized weights cannot be trained: train adapters (--model.lora.r 8), or remove "
            f"quantization_config from {role}_kwargs"
        )
    for name, layer in layers.items():
        if "DynamicActivation" in str(saved) or getattr(layer.weight, "act_quant_kwargs", None) is not None:
            raise ValueError(
                f"{role}: '{name}' also quantizes its inputs, and no gradient goes through that: use quant_type: "
                "int8_weight_only"
            )
