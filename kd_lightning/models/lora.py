"""A student that learns in low-rank adapters: PEFT inside, its own weights frozen, and plain weights in the export."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:  # a second to import, and only a student with adapters needs it
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer


ALL_LINEAR = "all-linear"
PREFIX = "base_model.model."  # of a plain model's names inside a `PeftModel`


@dataclass
class LoRA:
    r"""Learnt beside a frozen weight W: \(W + \frac{\alpha}{r} B A\), with A [r, in] and B [out, r], B = 0 first.

    Args:
        r: rank, at least 1.
        alpha: strength, > 0; None: 2r.
        dropout: of what enters A, in [0, 1).
        targets: names of the layers (`q_proj`, or a longer end such as `0.self_attn.q_proj`), or `all-linear`: every
            linear layer but the head.
        dora: learn the length of W's rows as well (DoRA, arXiv 2402.09353).

    Raises:
        ValueError: an argument is out of its range.
    """

    r: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    targets: str | list[str] = ALL_LINEAR
    dora: bool = False

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"lora.r must be at least 1, got {self.r}")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise ValueError(f"lora.alpha must be > 0 or null (2r), got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout must lie in [0, 1), got {self.dropout}")
        if not self.targets:
            raise ValueError(f"lora.targets must name at least one layer or be {ALL_LINEAR!r}, got {self.targets!r}")


def add_adapters(model: nn.Module, lora: LoRA) -> PeftModel:
    """The model with fresh adapters, which alone require a gradient.

    Args:
        model: a plain Hugging Face causal language model; its layers are replaced in place.
        lora: what to put where.

    Raises:
        ValueError: a target matches no layer (the model's layers are named), is a kind of layer that has no adapter, or
            shares its weight with another layer; the model has adapters already.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    if adapter_layers(model):
        raise ValueError("lora: the student has adapters already; give the plain model, or leave lora out")
    hf: Any = model
    names = ALL_LINEAR
    if lora.targets != ALL_LINEAR:
        names = [lora.targets] if isinstance(lora.targets, str) else list(lora.targets)  # type: ignore[assignment]
        _check_targets(model, list(names))
    config = LoraConfig(
        r=lora.r,
        lora_alpha=2 * lora.r if lora.alpha is None else lora.alpha,  # type: ignore[arg-type]  # PEFT computes a ratio
        lora_dropout=lora.dropout,
        target_modules=names,
        use_dora=lora.dora,
        fan_in_fan_out=any(isinstance(part, Conv1D) for part in model.modules()),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT's own call
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to True")  # of a linear layer beside Conv1D
        student: PeftModel = get_peft_model(hf, config)
    return student


def _check_targets(model: nn.Module, targets: list[str]) -> None:
    from transformers.pytorch_utils import Conv1D

    layers = {name: part for name, part in model.named_modules() if isinstance(part, (nn.Linear, nn.Embedding, Conv1D))}
    owners: dict[int, list[str]] = {}
    for name, part in layers.items():
        owners.setdefault(id(part.weight), []).append(name)
    for target in targets:
        found = [name for name in layers if name == target or name.endswith(f".{target}")]
        if not found:
            short = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise ValueError(f"lora.targets: {target!r} is no layer of {type(model).__name__}; its layers are {short}")
        for name in found:
            others = [other for other in owners[id(layers[name].weight)] if other != name]
            if others:
                raise ValueError(
                    f"lora.targets: {name!r} shares its weight with {others[0]!r}, which an exported student could no "
                    f"longer do: leave {target!r} out"
                )


def adapter_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """The layers of a model that carry an adapter, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: part for name, part in model.named_modules() if isinstance(part, BaseTunerLayer)}


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model says what it said before it had adapters.

    PEFT's own switch turns the adapters' `requires_grad` off and on again as well, which is not everywhere undone:
    a copy of a parameter that a strategy makes inside would learn nothing for good.
    """
    layers = [(layer, layer.disable_adapters) for layer in adapter_layers(model).values()]
    for layer, _ in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, before in layers:
            layer._disable_adapters = before


def exclude_base_weights(module: nn.Module) -> None:
    """From now on `module.state_dict()` holds no frozen parameter of its `model.student`, and loading misses none.

    Args:
        module: has its student, whose frozen parameters come from elsewhere, as `model.student` or is given it later.
    """
    module.register_state_dict_post_hook(_drop_frozen)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_post_hook(_accept_without_frozen)  # type: ignore[no-untyped-call]


def _frozen(module: nn.Module) -> set[str]:
    parameters = module.named_parameters(remove_duplicate=False)
    return {name for name, x in parameters if name.startswith("model.student.") and not x.requires_grad}


def _drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in _frozen(module):
        state.pop(prefix + name, None)


def _accept_without_frozen(module: nn.Module, found: Any) -> None:
    frozen = _frozen(module)
    found.missing_keys[:] = [name for name in found.missing_keys if name not in frozen]


def merged_state_dict(student: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a student with adapters is without them: every adapter multiplied into its weight, names as a plain model's.

    One layer at a time: there is no second copy of the model.

    Args:
        student: its layers say how; nothing in it changes.
        state: the student's tensors by name, each of them whole.
    """
    layers = adapter_layers(student)
    merged: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not any(name.startswith(f"{layer}.") for layer in _above(name) if layer in layers):
            merged[name.removeprefix(PREFIX)] = tensor
    for name, layer in layers.items():
        tensors = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        base = _merged(layer, tensors)
        merged |= {f"{name.removeprefix(PREFIX)}.{key}": value for key, value in base.state_dict().items()}
    return merged


def save_adapter(student: Any, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write the adapter as PEFT keeps it, for `PeftModel.from_pretrained(model, folder)`.

    Args:
        student: a model with adapters.
        state: its tensors by name, each of them whole.
        folder: is there already.
    """
    student.save_pretrained(folder, state_dict=dict(state), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # a form to be filled in


def _above(name: str) -> Iterator[str]:
    """Names of the modules that hold the tensor of this name."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _merged(layer: Any, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The plain layer with the adapter in its weight, from tensors that may lie elsewhere than the layer's own."""
    own = [*layer.named_parameters(), *layer.named_buffers()]
    memo: dict[int, Any] = {
        id(old): nn.Parameter(tensors[name].detach().clone(), requires_grad=False)
        if isinstance(old, nn.Parameter)
        else tensors.get(name, old).detach().clone()
        for name, old in own
    }
    twin = copy.deepcopy(layer, memo)
    twin.merge()
    base: nn.Module = twin.get_base_layer()
    return base
