"""The layers of a causal language model: where they are, what a pass does without some of them, and which matter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from kd_lightning.models.backbone import eval_mode
from kd_lightning.models.hf_adapter import decoder, number_of_layers


def layers_of(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of a model's layers, and its name in the model.

    Raises:
        ValueError: there is no such list, or more than one.
    """
    count, body = number_of_layers(model), decoder(model)
    inside = {module for module in body.modules() if isinstance(module, nn.ModuleList)}
    named = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and module in inside and len(module) == count
    ]
    shallowest = min((name.count(".") for name, _ in named), default=0)
    found = [(name, module) for name, module in named if name.count(".") == shallowest]
    if len(found) != 1:
        names = ", ".join(name for name, _ in found) or "none"
        raise ValueError(
            f"{type(model).__name__} cannot be pruned: it must have one list of its {count} layers, got {names}"
        )
    return found[0]


def evenly_spaced(count: int, kept: int) -> list[int]:
    """Indices of `kept` of `count` layers, the first and the last among them; of one, the first.

    Raises:
        ValueError: `kept` is not in [1, count].
    """
    if not 1 <= kept <= count:
        raise ValueError(f"layers must be in [1, {count}], the number of layers of the model, got {kept}")
    return [0] if kept == 1 else [round(n * (count - 1) / (kept - 1)) for n in range(kept)]


@contextmanager
def without_layers(layers: nn.ModuleList, kept: Iterable[int]) -> Iterator[None]:
    """While it is entered, layers that are not kept return their input."""
    removed = set(range(len(layers))) - set(kept)
    with ExitStack() as stack:
        for index in removed:
            handle: RemovableHandle = layers[index].register_forward_hook(_return_input, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def block_influence(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> list[float]:
    r"""\(1 - \cos(x, f(x))\) of each layer f, the mean over the tokens of the data; 0: the layer changes nothing.

    Args:
        model: a causal language model.
        batches: `input_ids` and `attention_mask`, [B, T].

    Reference: Men et al., ShortGPT, arXiv 2403.03853.
    """
    _, layers = layers_of(model)
    sums = torch.zeros(len(layers), dtype=torch.float64)
    count, mask = 0, torch.empty(0)

    def hook(index: int) -> Any:
        def measure(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before, after = _hidden(args, kwargs), _output(output)
            cosine = F.cosine_similarity(before[mask].float(), after[mask].float(), dim=-1)
            sums[index] += (1 - cosine).sum(dtype=torch.float64)

        return measure

    with ExitStack() as stack, eval_mode(model), torch.inference_mode():
        for index, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(hook(index), with_kwargs=True).remove)
        for batch in batches:
            mask = batch["attention_mask"].bool()
            count += int(mask.sum())
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return [float(x) for x in sums / max(count, 1)]


def most_influential(influence: Sequence[float], kept: int) -> list[int]:
    """Indices of the `kept` layers with the largest influence, in their order; of equal ones the earlier.

    Raises:
        ValueError: `kept` is not in [1, number of layers].
    """
    if not 1 <= kept <= len(influence):
        raise ValueError(f"layers must be in [1, {len(influence)}], the number of layers of the model, got {kept}")
    return sorted(sorted(range(len(influence)), key=lambda index: -influence[index])[:kept])


def _return_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    hidden = _hidden(args, kwargs)
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that a layer is called with: its first argument, or the one of this name."""
    found: Tensor = args[0] if args else kwargs["hidden_states"]
    return found


def _output(output: Any) -> Tensor:
    """The hidden states that a layer returns, alone or as the first of a tuple."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found
