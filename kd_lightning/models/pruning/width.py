"""Narrower MLPs: the neurons that are most active on the data are kept, in every layer as many."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kd_lightning.models.hf_adapter import text_config
from kd_lightning.models.loading import error_line
from kd_lightning.models.pruning.cut import BUILD_ERRORS, rebuilt, relative_difference
from kd_lightning.models.pruning.layers import layers_of, token_means


@dataclass(frozen=True)
class MLP:
    """The matrices of one layer's MLP by their names in the model.

    Args:
        up: those whose outputs are the neurons (one, or gate and up).
        down: the one whose inputs are the neurons.
        neurons: their number.
    """

    up: tuple[str, ...]
    down: str
    neurons: int


def mlps_of(model: PreTrainedModel) -> list[MLP]:
    """The MLP of each layer.

    Raises:
        ValueError: a layer has none of plain matrices from hidden size to neurons and back (experts, fused matrices).
    """
    name, layers = layers_of(model)
    found = []
    for index, layer in enumerate(layers):
        candidates = [
            mlp
            for path, module in layer.named_modules()
            if (mlp := _mlp(module, f"{name}.{index}.{path}".rstrip("."))) is not None
        ]
        if len(candidates) != 1:
            raise ValueError(
                f"the width of {type(model).__name__} cannot be pruned: layer {index} must have one MLP of plain "
                f"matrices, got {len(candidates)}"
            )
        found.append(candidates[0])
    return found


def _mlp(module: nn.Module, path: str) -> MLP | None:
    """The MLP whose matrices are children of this module."""
    linear = {name: child for name, child in module.named_children() if type(child) is nn.Linear}
    down = [
        (name, x) for name, x in linear.items() if name in ("down_proj", "fc2", "c_proj", "dense_4h_to_h", "fc_out")
    ]
    if len(down) != 1 or len(linear) not in (2, 3):
        return None
    last, neurons = down[0]
    up = tuple(name for name, x in linear.items() if name != last and x.out_features == neurons.in_features)
    if len(up) != len(linear) - 1:
        return None
    return MLP(tuple(f"{path}.{name}" for name in up), f"{path}.{last}", neurons.in_features)


def neuron_activity(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> list[Tensor]:
    """Mean absolute activation of the neurons of each layer over the tokens of the data, [neurons] in fp64 each.

    Args:
        model: a causal language model.
        batches: `input_ids` and `attention_mask`, [B, T].

    Reference: Muralidharan et al., Minitron, arXiv 2407.14679.
    """

    def activity(tokens: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
        inputs: Tensor = args[0]
        return inputs[tokens].abs().sum(0, dtype=torch.float64)

    return token_means(model, [model.get_submodule(mlp.down) for mlp in mlps_of(model)], activity, batches)


def cut_mlp(model: PreTrainedModel, activity: Sequence[Tensor], width: int) -> PreTrainedModel:
    """A model whose MLPs have the `width` most active neurons of each layer, in eval mode. All neurons: the same model.

    Args:
        model: a causal language model.
        activity: of the neurons of each layer, from `neuron_activity`.
        width: neurons per layer.

    Raises:
        ValueError: `width` is not in [1, neurons of a layer], or layers have different numbers of neurons, which the
            configuration cannot say.
    """
    mlps = mlps_of(model)
    neurons = {mlp.neurons for mlp in mlps}
    config = copy.deepcopy(model.config)
    text = text_config(model)
    if len(neurons) != 1 or text.to_dict().get("intermediate_size") not in neurons:
        raise ValueError(
            f"the width of {type(model).__name__} cannot be pruned: its layers must have intermediate_size neurons, "
            f"got {sorted(neurons)}"
        )
    (most,) = neurons
    if not 1 <= width <= most:
        raise ValueError(f"mlp_width must be in [1, {most}], the number of neurons of a layer, got {width}")
    kept = [values.topk(width).indices.sort().values for values in activity]
    state = model.state_dict()
    for mlp, indices in zip(mlps, kept, strict=True):
        for name in mlp.up:
            for key in (f"{name}.weight", f"{name}.bias"):
                if key in state:
                    state[key] = state[key].index_select(0, indices.to(model.device))
        state[f"{mlp.down}.weight"] = state[f"{mlp.down}.weight"].index_select(1, indices.to(model.device))
    config.get_text_config(decoder=True).intermediate_size = width
    try:
        narrower = rebuilt(model, config, state)
    except BUILD_ERRORS as error:
        raise ValueError(f"the width of {type(model).__name__} cannot be pruned: {error_line(error)}") from None
    difference = relative_difference(model, narrower, _without_neurons(model, mlps, kept))
    if not difference <= 64 * torch.finfo(model.dtype).eps:
        raise ValueError(
            f"the width of {type(model).__name__} cannot be pruned: something else reads its neurons (relative "
            f"difference {difference:.1e})"
        )
    return narrower


@contextmanager
def _without_neurons(model: PreTrainedModel, mlps: Sequence[MLP], kept: Sequence[Tensor]) -> Iterator[None]:
    """While it is entered, neurons that are not kept are 0."""

    def hook(indices: Tensor) -> Any:
        def keep(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            (x,) = args
            mask = torch.zeros(x.shape[-1], dtype=x.dtype, device=x.device).index_fill(0, indices.to(x.device), 1)
            return (x * mask,)

        return keep

    with ExitStack() as stack:
        for mlp, indices in zip(mlps, kept, strict=True):
            handle = model.get_submodule(mlp.down).register_forward_pre_hook(hook(indices))
            stack.callback(handle.remove)
        yield
