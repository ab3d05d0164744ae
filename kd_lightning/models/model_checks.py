"""Checks of a loaded model: its weights are finite, it is causal, and which of its parameters a text reaches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from kd_lightning.models.backbone import eval_mode, logits
from kd_lightning.models.hf_adapter import base_model, has_output_embeddings
from kd_lightning.models.quantized.layers import plain_parameters

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedConfig, PreTrainedModel

Role = Literal["student", "teacher", "model"]  # "model": the only one
SHOWN = 4  # modules in a message
EXPERT = "expert"  # in the names of parameters that a few tokens may not be routed to


def check_finite(model: nn.Module, role: Role) -> None:
    """Check that all parameters are finite.

    Raises:
        ValueError: one has NaN or inf; the message names the first.
    """
    for name, parameter in plain_parameters(model):
        if not torch.isfinite(parameter).all():
            bad = "NaN" if torch.isnan(parameter).any() else "inf"
            raise ValueError(f"{role}: the weights of '{name}' contain {bad}")


def check_causal(model: PreTrainedModel, role: Role) -> None:
    """Check that a model gives logits of the next token, and that a token does not change those before it.

    An encoder would see its own labels.

    Raises:
        ValueError: it does not.
    """
    base = base_model(model)
    if not has_output_embeddings(base) or base.config.is_encoder_decoder:
        raise ValueError(
            f"{role} must be a causal language model, such as AutoModelForCausalLM loads, got {type(base).__name__}"
        )
    ids = _few_tokens().to(model.device)
    ids[1, -1] = 0
    with torch.no_grad():
        one, other = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1].float()
    if (one - other).norm() > max(1e-4, 4 * torch.finfo(model.dtype).eps) * one.norm():
        raise ValueError(
            f"{role}: {type(model).__name__} attends to later tokens, so it is not a causal language model "
            f"(some models become one with {role}_kwargs is_decoder: true)"
        )


def freeze_unreached(model: nn.Module) -> str | None:
    """Freeze the parameters that text does not reach: vision and audio towers, projectors, cross-attention to images.

    They would get no gradient: DDP refuses a step with such parameters, and weight decay would shrink them. The logits
    of a few tokens are traced back through autograd's graph, so no gradient is computed. Experts are left as they are,
    because these tokens are not routed to all of them.

    Args:
        model: a Hugging Face causal language model, also one wrapped by PEFT.

    Returns:
        One line that names what was frozen; None if every trainable parameter is reached.
    """
    ids = _few_tokens()
    device = next(model.parameters()).device
    with eval_mode(model), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        found = logits(model, ids.to(device), torch.ones_like(ids, device=device))
    reached = _leaves(found)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    unreached = {name: x for name, x in trainable.items() if id(x) not in reached and EXPERT not in name}
    if not unreached:
        return None
    for parameter in unreached.values():
        parameter.requires_grad_(False)
    modules = _common_prefixes(unreached, trainable.keys() - unreached.keys())
    count = sum(parameter.numel() for parameter in unreached.values())
    more = f" and {len(modules) - SHOWN} more" if len(modules) > SHOWN else ""
    return f"{count:,} parameters are frozen, because text does not reach them: {', '.join(modules[:SHOWN])}{more}"


def text_model_class(config: PreTrainedConfig, classes: Mapping[Any, Any]) -> str | None:
    """Class of the language model inside of a multimodal one; None for a model of text alone.

    Args:
        config: of the model.
        classes: class of the causal language model by class of its configuration.
    """
    text = config.get_text_config(decoder=True)
    if text is config:
        return None
    return classes[type(text)].__name__ if type(text) in classes else f"the language model of a {type(text).__name__}"


def _few_tokens() -> Tensor:
    return torch.arange(8).repeat(2, 1)


def _leaves(result: Tensor) -> set[int]:
    """Ids of the leaf tensors that a result depends on, by autograd's graph."""
    seen: set[Any] = set()
    left = [result.grad_fn]
    leaves = set()
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # only nodes that accumulate a gradient have it
        if variable is not None:
            leaves.add(id(variable))
        left += [following for following, _ in node.next_functions]
    return leaves


def _common_prefixes(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """The shortest dotted prefixes of some names that none of the others has."""
    taken = {".".join(parts[:i]) for parts in (name.split(".") for name in others) for i in range(1, len(parts) + 1)}
    prefixes = []
    for parts in (name.split(".") for name in names):
        dotted = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
        prefixes.append(next((prefix for prefix in dotted if prefix not in taken), dotted[-1]))
    return list(dict.fromkeys(prefixes))
