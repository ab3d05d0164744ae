"""LoRA students: adapters of PEFT train, the base weights are frozen, and exports have plain merged weights."""

from __future__ import annotations

import copy
import functools
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.nn.modules.module import _IncompatibleKeys
from torch.nn.parallel import DistributedDataParallel

from kd_lightning.atomic_io import atomic_folder
from kd_lightning.models.hf_adapter import base_model, is_peft_model
from kd_lightning.models.quantized.layers import plain_shell, plain_state, quantized_layers

if TYPE_CHECKING:  # takes a second to import, and only a student with adapters needs it
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


ALL_LINEAR = "all-linear"
ADAPTER_PAIR = re.compile(r"(\.lora_(?:embedding_)?)([AB])(?=\.)")  # in names of parameters
PREFIX = "base_model.model."  # of parameter names inside a `PeftModel`


@dataclass
class LoRA:
    r"""Low-rank adapters of frozen weights W: \(W + \frac{\alpha}{r} B A\), A [r, in] and B [out, r], at first B = 0.

    Args:
        r: rank, at least 1.
        alpha: strength, > 0; None: 2r.
        dropout: of the inputs of A, in [0, 1).
        targets: names of layers (`q_proj`, or a longer suffix such as `0.self_attn.q_proj`), or `all-linear`: every
            linear layer except the LM head.
        dora: also train the norms of the rows of W (DoRA, arXiv 2402.09353).

    Raises:
        ValueError: an argument is out of its range.

    Examples:
        >>> from kd_lightning import DistillationModule, LoRA
        >>> module = DistillationModule("asset:student", "asset:teacher", lora=LoRA(r=4, targets="q_proj"))
        >>> module.configure_model()
        >>> sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        1536
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
            raise ValueError(f"lora.dropout must be in [0, 1), got {self.dropout}")
        if not self.targets:
            raise ValueError(f"lora.targets must name at least one layer or be {ALL_LINEAR!r}, got {self.targets!r}")


def add_adapters(model: PreTrainedModel, lora: LoRA) -> PeftModel:
    """Add new adapters to a model; only they require a gradient.

    Args:
        model: a plain Hugging Face causal language model; its layers are replaced in place.
        lora: settings of the adapters.

    Raises:
        ValueError: a target matches no layer (the message lists the layers), or shares its weight with another layer;
            the model has adapters already.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    if adapter_layers(model):
        raise ValueError("lora: the student has adapters already: pass the plain model, or remove lora")
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
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to True")  # a linear layer next to Conv1D
        student: PeftModel = get_peft_model(model, config)
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
            raise ValueError(
                f"lora.targets: {target!r} is not a layer of {type(model).__name__}; its layers are {short}"
            )
        for name in found:
            others = [other for other in owners[id(layers[name].weight)] if other != name]
            if others:
                raise ValueError(
                    f"lora.targets: {name!r} shares its weight with {others[0]!r}, which merged weights could not: "
                    f"remove {target!r}"
                )


def adapter_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """The layers of a model that have an adapter, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: part for name, part in model.named_modules() if isinstance(part, BaseTunerLayer)}


def adapters_are_zero(model: nn.Module) -> bool:
    """Whether a model has adapters that change nothing: of each pair A and B one is zero, and nothing else is trained.

    The adapters of DoRA are never zero in this sense: they scale each row by a quotient that is 1 up to rounding.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    pairs = {name: ADAPTER_PAIR.sub(lambda found: f"{found[1]}{'BA'['AB'.index(found[2])]}", name) for name in trained}
    if not trained or any(partner == name or partner not in trained for name, partner in pairs.items()):
        return False
    return all(_is_zero(trained[name]) or _is_zero(trained[partner]) for name, partner in pairs.items())


def _is_zero(parameter: Tensor) -> bool:
    try:
        return not parameter.any()
    except DataDependentOutputException:  # a fake tensor of a plan, whose adapters are new
        return True


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Inside the context, the model computes what it computed without adapters.

    PEFT's `disable_adapter` also switches the adapters' `requires_grad` off and on. A strategy that copies a parameter
    inside the context would keep it off, so only the private flag of the layers is set here.
    """
    layers = [(layer, layer.disable_adapters) for layer in adapter_layers(model).values()]
    for layer, _ in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, before in layers:
            layer._disable_adapters = before


def exclude_frozen_weights(module: nn.Module, name: str) -> None:
    """Leave the frozen parameters of a submodule out of `module.state_dict()`, and do not expect them when it loads.

    The scales of a quantized layer are no parameters of it; they are left out as well. Quantized weights are not sent
    to other ranks by DDP either: every rank has read them, and torchao's cannot be sent.

    Args:
        module: the module whose state is saved.
        name: of the submodule, such as `model.student`.
    """
    drop, accept = functools.partial(_drop_frozen, name), functools.partial(_accept_without_frozen, name)
    module.register_state_dict_post_hook(drop)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_post_hook(accept)  # type: ignore[no-untyped-call]
    if layers := quantized_layers(module):
        ignored = [f"{layer}.weight" for layer in layers]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)  # type: ignore[no-untyped-call]


def _frozen(name: str, module: nn.Module) -> set[str]:
    parameters = module.named_parameters(remove_duplicate=False)
    return {key for key, x in parameters if key.startswith(f"{name}.") and not x.requires_grad}


def _drop_frozen(name: str, module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    frozen = _frozen(name, module)
    layers = [f"{layer}." for layer in quantized_layers(module)]
    for key in [key.removeprefix(prefix) for key in state if key.startswith(prefix)]:
        if key in frozen or any(key.startswith(layer) for layer in layers):
            state.pop(prefix + key)


def _accept_without_frozen(name: str, module: nn.Module, keys: _IncompatibleKeys) -> None:
    frozen = _frozen(name, module)
    keys.missing_keys[:] = [key for key in keys.missing_keys if key not in frozen]


def merged_state_dict(student: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a plain model: every adapter is merged into its weight, and names are those without PEFT.

    Works on one layer at a time, without a second copy of the model.

    Args:
        student: a model with adapters; it does not change.
        state: the full tensors of the student by name.
    """
    layers = adapter_layers(student)
    quantized = quantized_layers(student)
    merged: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not any(layer in layers or layer in quantized for layer in _above(name)):
            merged[name.removeprefix(PREFIX)] = tensor
    for name, part in quantized.items():
        if not any(above in layers for above in _above(name)):
            plain = plain_state(part)
            merged |= {f"{name.removeprefix(PREFIX)}.{key}": value for key, value in plain.items()}
    for name, layer in layers.items():
        tensors = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        is_plain = f"{name}.base_layer" not in quantized
        base = _merged(layer, tensors).state_dict() if is_plain else _merged_into_plain(layer, tensors)
        merged |= {f"{name.removeprefix(PREFIX)}.{key}": value for key, value in base.items()}
    return merged


def save_adapter(student: PeftModel, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write the adapter in the format of PEFT, for `PeftModel.from_pretrained(model, folder)`.

    Args:
        student: a model with adapters.
        state: its full tensors by name.
        folder: exists.
    """
    student.save_pretrained(str(folder), state_dict=dict(state), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # an empty template of a model card


def save_plain_model(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    path: Path,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Save model, generation config and tokenizer, with adapters merged into the weights. Atomic.

    Args:
        student: the model.
        tokenizer: its tokenizer; None: none is saved.
        path: the folder; an existing one is replaced by a complete one.
        state: the full tensors of a sharded model; None: those of `student`.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # a bar of a single step
    model, tensors = student, None if state is None else dict(state)
    if is_peft_model(student):
        model = base_model(student)
        tensors = merged_state_dict(student, student.state_dict() if tensors is None else tensors)
        if quantized_layers(model):
            model = plain_shell(model)
            tensors = {name: tensor.to(model.config.dtype) for name, tensor in tensors.items()}
    with atomic_folder(path) as part:
        model.save_pretrained(part, state_dict=tensors)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        for file in part.iterdir():
            shutil.copymode(part / "config.json", file)  # safetensors creates files that only the owner can read


def _above(name: str) -> Iterator[str]:
    """Names of the modules that contain the tensor of this name, innermost first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _merged(layer: BaseTunerLayer, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The plain layer with the adapter merged into its weight, computed from `tensors` instead of the layer's own."""
    module: Any = layer  # a layer of PEFT is an `nn.Module`, which its base class does not declare
    own = [*module.named_parameters(), *module.named_buffers()]
    memo: dict[int, Any] = {
        id(old): nn.Parameter(tensors[name].detach().clone(), requires_grad=False)
        if isinstance(old, nn.Parameter)
        else tensors.get(name, old).detach().clone()
        for name, old in own
    }
    twin = copy.deepcopy(module, memo)
    twin.merge()
    base: nn.Module = twin.get_base_layer()
    return base


def _merged_into_plain(layer: BaseTunerLayer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a plain layer: the weight that a quantized layer computes with, and the adapter merged into it."""
    adapted: Any = layer
    (adapter,) = adapted.active_adapters
    a, b = tensors[f"lora_A.{adapter}.weight"].float(), tensors[f"lora_B.{adapter}.weight"].float()
    plain = plain_state(adapted.get_base_layer())
    weight = plain["weight"].float()
    update = adapted.scaling[adapter] * (b @ a).to(weight.device)
    merged = weight + (update.T if adapted.fan_in_fan_out else update)
    norms = tensors.get(f"lora_magnitude_vector.{adapter}.weight")
    if norms is not None:  # DoRA
        merged = norms.float().to(weight.device)[:, None] * merged / merged.norm(dim=1, keepdim=True)
    return {**plain, "weight": merged}
