"""A model with some of the layers of another one, which must compute what that one computes without the others."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from kd_lightning.models.backbone import eval_mode
from kd_lightning.models.hf_adapter import input_embeddings, num_embeddings, set_number_of_layers
from kd_lightning.models.loading import error_line
from kd_lightning.models.pruning.layers import layers_of, without_layers

auto: Any = transformers  # the factories of transformers are not typed
PER_LAYER = re.compile(r"layer|block|attention|mlp|rope")
"""Names of settings that may be lists with one entry per layer."""
FIRST_LAYERS = ("first_k_dense_replace", "max_window_layers", "num_dense_layers")
"""Settings that count layers from the first one on."""
BUILD_ERRORS = (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError)


def cut_layers(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A model of the kept layers alone, with the same embeddings, norms and LM head, in eval mode.

    All layers: the same model, bit for bit. Configuration and lists of layer types follow. The result is compared with
    the model itself, whose other layers return their input, on a few tokens.

    Args:
        model: a causal language model.
        kept: indices of layers, increasing.

    Raises:
        ValueError: `kept` is empty, not increasing or out of range; the architecture cannot be cut: it has no list of
            layers, or a layer's computation depends on its position.
    """
    name, layers = layers_of(model)
    count = len(layers)
    increasing = all(a < b for a, b in itertools.pairwise(kept))
    if not kept or not increasing or kept[0] < 0 or kept[-1] >= count:
        raise ValueError(
            f"layers must be increasing indices in [0, {count}), as the model has {count} layers, got {list(kept)}"
        )
    config = _cut_config(model, kept, count)
    try:
        smaller = rebuilt(model, config, _renumbered(model.state_dict(), name, kept))
    except BUILD_ERRORS as error:
        raise _not_cut(model, f"its cut configuration does not fit its weights ({error_line(error)})") from None
    _check(model, smaller, kept)
    return smaller


def rebuilt(model: PreTrainedModel, config: PreTrainedConfig, state: dict[str, Tensor]) -> PreTrainedModel:
    """A model with another configuration and other weights, with the generation config of this one, in eval mode.

    Raises:
        Exception: one of `BUILD_ERRORS`: configuration and weights do not fit.
    """
    found: PreTrainedModel = auto.AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    found.load_state_dict(state)
    found.generation_config = copy.deepcopy(model.generation_config)
    torch.nn.Module.to(found, model.device).train(False)
    return found


def _renumbered(state: dict[str, Tensor], name: str, kept: Sequence[int]) -> dict[str, Tensor]:
    """The state of the kept layers under their new numbers, and of everything else."""
    numbers = {old: new for new, old in enumerate(kept)}
    found, prefix = {}, f"{name}."
    for key, tensor in state.items():
        if key.startswith(prefix):
            number, rest = key.removeprefix(prefix).split(".", 1)
            if int(number) in numbers:
                found[f"{prefix}{numbers[int(number)]}.{rest}"] = tensor
        else:
            found[key] = tensor
    return found


def _cut_config(model: PreTrainedModel, kept: Sequence[int], count: int) -> PreTrainedConfig:
    config = copy.deepcopy(model.config)
    text = config.get_text_config(decoder=True)
    settings = text.to_dict()
    for key, value in settings.items():
        if isinstance(value, (list, tuple)) and len(value) == count and PER_LAYER.search(key):
            setattr(text, key, [value[index] for index in kept])
        elif key in FIRST_LAYERS and isinstance(value, int):
            setattr(text, key, sum(index < value for index in kept))
    set_number_of_layers(text, len(kept))
    return config


def _check(model: PreTrainedModel, smaller: PreTrainedModel, kept: Sequence[int]) -> None:
    """Compare the logits of a few tokens."""
    try:
        difference = relative_difference(model, smaller, without_layers(layers_of(model)[1], kept))
    except BUILD_ERRORS as error:
        raise _not_cut(model, f"it does not run without some of its layers ({error_line(error)})") from None
    if not difference <= 16 * torch.finfo(model.dtype).eps:
        raise _not_cut(
            model, f"the computation of a layer depends on its position (relative difference {difference:.1e})"
        )


@torch.inference_mode()
def relative_difference(
    model: PreTrainedModel, smaller: PreTrainedModel, skipping: AbstractContextManager[None]
) -> float:
    """Relative difference of the logits of a few tokens.

    Args:
        model: the whole model.
        smaller: the cut model, in eval mode.
        skipping: makes the whole model leave out what was cut.
    """
    generator = torch.Generator().manual_seed(0)  # a separate generator: the random numbers of the run do not change
    ids = torch.randint(num_embeddings(input_embeddings(model)) or 2, (2, 12), generator=generator).to(model.device)
    mask = torch.ones_like(ids)
    with eval_mode(model), skipping:
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
    found = smaller(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def _not_cut(model: PreTrainedModel, reason: str) -> ValueError:
    return ValueError(f"{type(model).__name__} cannot be pruned to these layers: {reason}")
