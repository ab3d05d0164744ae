"""The layers of a causal language model: where they are, what a pass does without some of them, and which matter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from kd_lightning.models.backbone import eval_mode
from kd_lightning.models.hf_adapter import decoder, number_of_layers

Measure = Callable[[Tensor, tuple[Any, ...], dict[str, Any], Any], Tensor]


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
    _check_kept(count, kept)
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

    def influence(tokens: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
        before, after = _hidden(args, kwargs)[tokens], _output(output)[tokens]
        return (1 - F.cosine_similarity(before.float(), after.float(), dim=-1)).sum(dtype=torch.float64)

    return [float(x) for x in token_means(model, layers_of(model)[1], influence, batches)]


def token_means(
    model: PreTrainedModel, modules: Iterable[nn.Module], measure: Measure, batches: Iterable[dict[str, Tensor]]
) -> list[Tensor]:
    """Means over the tokens of the data, one per module.

    Args:
        model: is run on the batches.
        modules: of the model.
        measure: called with the tokens that are not padding [B, T], and with arguments, keyword arguments and output of
            a module; the sum over these tokens.
        batches: `input_ids` and `attention_mask`, [B, T].
    """
    sums: dict[int, Tensor] = {}
    count, tokens = 0, torch.empty(0)

    def hook(index: int) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            found = measure(tokens, args, kwargs, output).cpu()
            sums[index] = sums[index] + found if index in sums else found

        return add

    with ExitStack() as stack, eval_mode(model), torch.inference_mode():
        for index, module in enumerate(modules):
            stack.callback(module.register_forward_hook(hook(index), with_kwargs=True).remove)
        for batch in batches:
            tokens = batch["attention_mask"].bool()
            count += int(tokens.sum())
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return [sums[index] / max(count, 1) for index in sorted(sums)]


def most_influential(influence: Sequence[float], kept: int) -> list[int]:
    """Indices of the `kept` layers with the largest influence, in their order; of equal ones the earlier.

    Raises:
        ValueError: `kept` is not in [1, number of layers].
    """
    _check_kept(len(influence), kept)
    return sorted(sorted(range(len(influence)), key=lambda index: -influence[index])[:kept])


def _check_kept(count: int, kept: int) -> None:
    if not 1 <= kept <= count:
        raise ValueError(f"layers must be in [1, {count}], the number of layers of the model, got {kept}")


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
