"""Splits a causal language model into backbone and LM head, and checks the result against the model's own logits."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_lightning.engine.head import Head, apply_transform
from kd_lightning.models.hf_adapter import (
    attends_without_mask,
    base_model,
    config_numbers,
    decoder,
    has_output_embeddings,
    is_adapted,
    is_wrapped,
    output_embeddings,
    text_config,
    weight_and_bias,
)
from kd_lightning.models.packing.layout import PackedLayout
from kd_lightning.models.quantized.layers import is_quantized_weight

# Names of these factors in the configurations of different model families.
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier", "logits_mup_width_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "softcap")


def body_and_head(model: nn.Module) -> tuple[nn.Module, Head]:
    r"""Split a causal language model into backbone and LM head, and check that the two give the model's logits.

    The backbone returns hidden states h; then \(\mathrm{logits} = \mathrm{cap}(\mathrm{scale} (h W^\top + b))\).
    A few tokens show which factors of its configuration a model applies: the input of the last layer is compared with
    h, its output with \(h W^\top + b\), and the logits with what the factors after it make of noise instead of it.

    Args:
        model: a Hugging Face causal language model, also one wrapped by PEFT.

    Returns:
        The backbone, for `hidden_states(backbone, input_ids, attention_mask)`, and the LM head, which shares the
        model's parameters: a gradient to `head.weight` is a gradient to the model's.

    Raises:
        ValueError: no combination of the factors gives the model's logits (layers between backbone and LM head, an
            encoder, an adapter on the LM head, a quantized LM head …); use the `logits` of the model instead.

    Examples:
        >>> from kd_lightning import HFTeacher, body_and_head
        >>> teacher = HFTeacher("asset:teacher")
        >>> teacher.load()
        >>> body, head = body_and_head(teacher.model)
        >>> type(body).__name__, tuple(head.weight.shape)
        ('LlamaModel', (2048, 192))
    """
    if is_wrapped(model):
        raise _not_splittable(
            model,
            "it wraps a model, whose gradients it would not synchronize: wrap a DistillationStep, which splits the "
            "model inside of its forward",
        )
    base = base_model(model)
    if not has_output_embeddings(base):
        raise _not_splittable(model, "it is no causal language model: it has no output embeddings")
    layer = output_embeddings(base)
    weight, bias = _matrix(model, layer)
    body = decoder(base)
    if base.config.is_encoder_decoder or body is base:
        raise _not_splittable(model, "it has no backbone that can be called by itself")
    config = text_config(base)
    numbers = config_numbers(config, SCALES)
    # some model families multiply, some divide
    scales = list(dict.fromkeys([1.0, *numbers, *(1 / number for number in numbers)]))
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
        raise _not_splittable(
            model, "more than a matrix, a factor and a soft-cap is between its backbone and its logits"
        )
    return body, Head(weight, bias, scale=before * behind[0], softcap=behind[1])


def hidden_states(
    body: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, packed: bool = False
) -> Tensor:
    """Hidden states [B, T, H] of a backbone that `body_and_head` has returned: the input of the LM head.

    Args:
        body: the backbone.
        input_ids: [B, T].
        attention_mask: 1 for tokens, 0 for padding, [B, T]; None: nothing is padding.
        packed: whether the backbone reads the rows without padding; at padding, the result is then zero.

    Examples:
        >>> import torch
        >>> from kd_lightning import HFTeacher, body_and_head, hidden_states
        >>> teacher = HFTeacher("asset:teacher")
        >>> teacher.load()
        >>> body, _ = body_and_head(teacher.model)
        >>> tuple(hidden_states(body, torch.tensor([[1, 2, 3]])).shape)
        (1, 3, 192)
    """
    return _outputs(body, "last_hidden_state", input_ids, attention_mask, packed)


def logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, packed: bool = False) -> Tensor:
    """Logits [B, T, V] of a model that `body_and_head` cannot split; the arguments are those of `hidden_states`."""
    return _outputs(model, "logits", input_ids, attention_mask, packed)


def _outputs(model: nn.Module, name: str, input_ids: Tensor, attention_mask: Tensor | None, packed: bool) -> Tensor:
    layout = (
        PackedLayout(attention_mask, attends_without_mask(model)) if packed and attention_mask is not None else None
    )
    if layout is None or layout.is_empty:
        found: Tensor = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[name]
        return found
    outputs = model(input_ids=layout.pack(input_ids), position_ids=layout.position_ids, use_cache=False)
    return layout.unpack(outputs[name])


def with_current_weights(model: nn.Module, head: Head) -> Head:
    """The LM head with the parameters that the model has now: a strategy may have replaced them."""
    weight, bias = weight_and_bias(output_embeddings(model))
    assert weight is not None  # `body_and_head` has checked it
    return dataclasses.replace(head, weight=weight, bias=bias)


def head_settings(head: Head) -> Head:
    """The LM head without its parameters (scale and soft-cap), for `with_current_weights`."""
    return dataclasses.replace(head, weight=head.weight.new_empty(0, 0), bias=None)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the context; afterwards, every module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _matrix(model: nn.Module, layer: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the LM head."""
    if is_adapted(layer):
        raise _not_splittable(model, "its LM head has an adapter")
    weight, bias = weight_and_bias(layer)
    own = {name for name, _ in layer.named_parameters()} if isinstance(layer, nn.Module) else set()
    if own - {"weight", "bias"}:  # such as a learned factor that is 1 at the start
        raise _not_splittable(model, "its LM head has more parameters than weight and bias")
    if is_quantized_weight(weight):
        raise _not_splittable(model, "its LM head is quantized")
    if weight is None or weight.ndim != 2 or not weight.is_floating_point():
        raise _not_splittable(model, "its LM head is not a plain matrix")
    return weight, bias


def _probe(model: nn.Module, body: nn.Module, layer: nn.Module, size: float) -> tuple[Tensor, ...]:
    """Hidden states, inputs of the LM head, the noise that replaced its outputs, and logits of a few tokens, [N, ·]."""
    device = next(layer.parameters()).device
    generator = torch.Generator().manual_seed(0)  # a separate generator: the random numbers of the run do not change
    vocabulary = next(layer.parameters()).shape[0]
    ids = torch.randint(vocabulary, (2, 6), generator=generator).to(device)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    calls: list[tuple[Tensor, Tensor]] = []

    def replace_by_noise(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        weight, bias = weight_and_bias(module)
        if weight is None or not _agree(F.linear(args[0], weight, bias), output, output.dtype):
            raise _not_splittable(model, "its LM head is not a plain matrix")
        noise = size * torch.randn(output.shape, generator=generator).to(output)
        calls.append((args[0], noise))
        return noise

    handle = layer.register_forward_hook(replace_by_noise)
    try:
        with eval_mode(model), torch.no_grad(), torch.autocast(device.type, enabled=False):
            found = logits(model, ids, mask)
            hidden = hidden_states(body, ids, mask)
    except (TypeError, AttributeError) as error:
        raise _not_splittable(model, f"its backbone cannot be called by itself ({error})".replace("\n", " ")) from None
    finally:
        handle.remove()
    if len(calls) != 1 or calls[0][0].shape != hidden.shape or calls[0][1].shape != found.shape:
        raise _not_splittable(model, "its logits are not computed from its hidden states by its LM head alone")
    tokens = mask.bool()
    return tuple(x[tokens].float() for x in (hidden, *calls[0], found))


def _agree(expected: Tensor, found: Tensor, dtype: torch.dtype) -> bool:
    """Whether two tensors are equal up to rounding, in every row."""
    tolerance = max(1e-5, 2 * torch.finfo(dtype).eps)
    return bool(((expected - found).norm(dim=-1) <= tolerance * found.norm(dim=-1)).all())


def _not_splittable(model: nn.Module, reason: str) -> ValueError:
    return ValueError(f"{type(model).__name__} cannot be split into backbone and LM head: {reason}")
