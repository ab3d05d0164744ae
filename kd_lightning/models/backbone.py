"""The cut of a causal language model into body and head, checked against what the model does itself."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_lightning.engine.head import Head, apply_transform
from kd_lightning.models.hf_adapter import (
    base_model,
    config_numbers,
    decoder,
    is_adapted,
    output_embeddings,
    text_config,
    weight_and_bias,
)

# As configurations call them.
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier", "logits_mup_width_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "softcap")


def body_and_head(model: nn.Module) -> tuple[nn.Module, Head]:
    r"""Cut a causal language model where its hidden states become logits, checked against what it does itself.

    The body gives hidden states h, the head says \(\mathrm{logits} = \mathrm{cap}(\mathrm{scale} (h W^\top + b))\).
    Which factors of its configuration a model really applies is seen on a few tokens: what enters the last layer is
    compared with h, what leaves it with \(h W^\top + b\), and in its place noise goes on to the logits, so that a
    factor shows whatever the weights are.

    Args:
        model: a Hugging Face causal language model, also wrapped by PEFT.

    Returns:
        The body, called as `hidden_states(body, input_ids, attention_mask)`, and the head, which holds the model's own
        parameters: a gradient to `head.weight` is one to the model's.

    Raises:
        ValueError: no reading of the model gives its logits (layers between body and head, an encoder, an adapter on
            the head, quantised head …); its whole logits can be used instead.
    """
    base = base_model(model)
    layer = output_embeddings(base)
    weight, bias = _matrix(model, layer)
    body = decoder(base)
    if base.config.is_encoder_decoder or body is base:
        raise _no_cut(model, "it has no body that can be called alone")
    config = text_config(base)
    numbers = config_numbers(config, SCALES)
    scales = list(dict.fromkeys([1.0, *numbers, *(1 / number for number in numbers)]))  # some multiply, some divide
    caps = [None, *(cap for cap in config_numbers(config, SOFTCAPS) if cap > 0)]
    hidden, entered, noise, found = _probe(model, body, layer, max(cap or 1.0 for cap in caps) * max(map(abs, scales)))
    before = next((scale for scale in scales if _agree(scale * hidden, entered, weight.dtype)), None)
    behind = next(
        (
            (scale, cap)
            for scale, cap in itertools.product(scales, caps)
            if _agree(apply_transform(noise, (scale, cap)), found, weight.dtype)
        ),
        None,
    )
    if before is None or behind is None or (before != 1 and bias is not None):
        raise _no_cut(model, "there is more between its body and its logits than a matrix, a factor and a soft-cap")
    return body, Head(weight, bias, scale=before * behind[0], softcap=behind[1])


def hidden_states(body: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Hidden states [B, T, H] of the body that `body_and_head` gave, ready for the head."""
    hidden: Tensor = body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    return hidden


def logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Logits [B, T, V] of a whole model: what is left where `body_and_head` finds no cut."""
    found: Tensor = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    return found


def with_current_weights(model: nn.Module, reading: Head) -> Head:
    """The same reading with the parameters that the model holds now (a strategy may have put others in their place)."""
    weight, bias = weight_and_bias(output_embeddings(model))
    assert weight is not None  # `body_and_head` has checked it
    return dataclasses.replace(reading, weight=weight, bias=bias)


def head_settings(reading: Head) -> Head:
    """What stays of a reading while a strategy changes the parameters: scale and soft-cap, for `head_of`."""
    return dataclasses.replace(reading, weight=reading.weight.new_empty(0, 0), bias=None)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode; after it, every part is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _matrix(model: nn.Module, layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the layer that makes the logits."""
    if is_adapted(layer):
        raise _no_cut(model, "an adapter sits on its head")
    weight, bias = weight_and_bias(layer)
    own = {name for name, _ in layer.named_parameters()} if isinstance(layer, nn.Module) else set()
    if own - {"weight", "bias"}:  # such as a factor that is learnt, and 1 at the start
        raise _no_cut(model, "its last layer has more parameters than weight and bias")
    if weight is None or weight.ndim != 2 or not weight.is_floating_point():
        raise _no_cut(model, "its last layer is not a plain matrix")
    return weight, bias


def _probe(model: nn.Module, body: nn.Module, layer: nn.Module, size: float) -> tuple[Tensor, ...]:
    """What is seen on a few tokens, [N, ·] each: hidden states, what enters the layer, noise put out by it, logits."""
    device = next(layer.parameters()).device
    generator = torch.Generator().manual_seed(0)  # its own: a run's random numbers stay what they were
    vocabulary = next(layer.parameters()).shape[0]
    ids = torch.randint(vocabulary, (2, 6), generator=generator).to(device)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    calls: list[tuple[Tensor, Tensor]] = []

    def put_out_noise(module: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
        if not _agree(F.linear(args[0], module.weight, module.bias), output, output.dtype):
            raise _no_cut(model, "its last layer is not a plain matrix")
        noise = size * torch.randn(output.shape, generator=generator).to(output)
        calls.append((args[0], noise))
        return noise

    handle = layer.register_forward_hook(put_out_noise)
    try:
        with eval_mode(model), torch.no_grad(), torch.autocast(device.type, enabled=False):
            found = logits(model, ids, mask)
            hidden = hidden_states(body, ids, mask)
    except (TypeError, AttributeError) as error:
        raise _no_cut(model, f"its body cannot be called alone ({error})".replace("\n", " ")) from None
    finally:
        handle.remove()
    if len(calls) != 1 or calls[0][0].shape != hidden.shape or calls[0][1].shape != found.shape:
        raise _no_cut(model, "its logits do not come from its hidden states by its last layer alone")
    counted = mask.bool()
    return tuple(x[counted].float() for x in (hidden, *calls[0], found))


def _agree(expected: Tensor, found: Tensor, dtype: torch.dtype) -> bool:
    """Equal up to rounding, in every row."""
    tolerance = max(1e-5, 2 * torch.finfo(dtype).eps)
    return bool(((expected - found).norm(dim=-1) <= tolerance * found.norm(dim=-1)).all())


def _no_cut(model: nn.Module, reason: str) -> ValueError:
    return ValueError(f"{type(model).__name__} cannot be cut into body and head: {reason}")
