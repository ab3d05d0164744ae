"""Student and teacher of a run as shapes alone: built from their configurations, with numbers that are nowhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from kd_lightning.engine.head import Head
from kd_lightning.models.backbone import SCALES, head_settings, logits
from kd_lightning.models.hf_adapter import (
    base_model,
    config_numbers,
    decoder,
    output_embeddings,
    text_config,
    weight_and_bias,
)
from kd_lightning.models.loading import Role, causal_lm_from_config
from kd_lightning.models.lora import add_adapters
from kd_lightning.teachers.adapter_off import AdapterOffTeacher
from kd_lightning.teachers.base import Teacher
from kd_lightning.teachers.hf import AroundHF, HFTeacher
from kd_lightning.teachers.offloaded import OffloadedTeacher
from kd_lightning.training.student import StudentWithLoss

PURE = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}


def cut(model: Any) -> tuple[nn.Module, Head]:
    """Where shapes say that a model can be cut: what enters its last layer is what its body gives.

    Args:
        model: a Hugging Face causal language model without numbers.

    Returns:
        As `cutting.body_and_head`, but for the factors of the head, which nobody can see in shapes.

    Raises:
        ValueError: there is more between body and head, or there are no such parts.
    """
    base = base_model(model)
    layer = output_embeddings(base)
    body = decoder(base)
    weight, bias = weight_and_bias(layer)
    entered: list[Tensor] = []
    given: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda part, args, output: entered.append(args[0])),
        body.register_forward_hook(lambda part, args, output: given.append(output.last_hidden_state)),
    ]
    ids = torch.zeros(1, 4, dtype=torch.long)
    try:
        with torch.no_grad():
            logits(model, ids, torch.ones_like(ids))
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{type(base).__name__} cannot be cut into body and head: {error}") from None
    finally:
        for handle in handles:
            handle.remove()
    if body is base or len(entered) != 1 or not given or weight is None or weight.ndim != 2:
        raise ValueError(f"{type(base).__name__} cannot be cut into body and head")
    same = entered[0].untyped_storage()._cdata == given[0].untyped_storage()._cdata
    scaled = entered[0].shape == given[0].shape and bool(config_numbers(text_config(base), SCALES))
    if not (same or scaled):
        raise ValueError(f"{type(base).__name__} cannot be cut into body and head: there are layers between")
    return body, Head(weight, bias)


class ShapedStudent(StudentWithLoss):
    """A student without numbers, cut by its shapes."""

    cut = staticmethod(cut)


class ShapedTeacher(AroundHF):
    """A teacher without numbers, cut by its shapes where they say that it can be.

    Args:
        model: the model.
        spread: whether a strategy that spreads models may spread it.
    """

    def __init__(self, model: Any, spread: bool = True) -> None:
        super().__init__(HFTeacher(model))
        self.spread = spread
        self._inner.model = model.eval().requires_grad_(False)  # read already, and without numbers to look at
        with suppress(ValueError):
            self._inner._body, reading = cut(model)
            self._inner._reading = head_settings(reading)

    def load(self, device: torch.device | str = "cpu") -> None:
        """Nothing: shapes are there."""

    def to(self, device: torch.device | str) -> None:
        """Move the shapes."""
        self._inner.to(device)

    def shard(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Let a strategy spread the model over ranks, where it may."""
        if self.spread:
            self._inner.shard(wrap)

    def fingerprint(self) -> str:
        """Nothing tells shapes apart."""
        return ""


class Once:
    """A block of a loss, made once: the first of each size stands for the others, which are like it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.chosen = function, False  # shapes do not compile
        self._found: dict[Any, Any] = {}

    def __call__(self, z: Tensor, *rest: Any) -> Any:
        """What the block gives, whatever its numbers."""
        key = (*z.shape, rest[-1])
        if key not in self._found:
            self._found[key] = self.function(z, *rest)
        return self._found[key]


class FewParts(TorchFunctionMode):
    """Of the many equal parts that a tensor is cut into, one a rank, only the first and the last are made."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one function."""
        kwargs = kwargs or {}
        if func is not torch.chunk or args[1] < 3:
            return func(*args, **kwargs)
        tensor, parts, dim = args[0], args[1], kwargs.get("dim", 0)
        length = tensor.shape[dim]
        step = max(1, -(-length // parts))
        count = max(1, -(-length // step))
        before = (count - 1) * step
        return [*[tensor.narrow(dim, 0, min(step, length))] * (count - 1), tensor.narrow(dim, before, length - before)]


def build_fake_student(module: Any, precision: str, fake: FakeTensorMode) -> None:
    """Give a `DistillationModule` its student with loss.

    Args:
        module: names its student.
        precision: of the trainer.
        fake: whose shapes they are.

    Raises:
        ValueError: the student is no name, or cannot be built.
    """
    if not isinstance(module.student_source, str):
        raise ValueError("plan: the student must be a folder, a hub name or an asset")
    kwargs = dict(module.student_kwargs or {})
    if precision in PURE:
        kwargs["dtype"] = PURE[precision]
    with torch.device("meta"):
        student = causal_lm_from_config(module.student_source, kwargs=kwargs, role="student")
        if module.lora is not None:
            student = add_adapters(student, module.lora)
    _place(student, fake)
    module.loss.token_loss.compiled = Once(module.loss.token_loss.block)
    module.model = ShapedStudent(student.train(), module.loss)
    del module.loss


def build_fake_teacher(module: Any, fake: FakeTensorMode) -> bool:
    """Give a `DistillationModule` its teacher, where it has one, and say whether its layers are offloaded.

    Args:
        module: names its teacher; its student is there.
        fake: whose shapes they are.

    Raises:
        ValueError: the teacher has no configuration, or cannot be built.
    """
    teacher: Teacher | None = module.teacher
    if teacher is None:
        return False
    if isinstance(teacher, AdapterOffTeacher):
        teacher.meet(module)
        return False
    offloaded = isinstance(teacher, OffloadedTeacher)
    inner: Any = teacher._inner if isinstance(teacher, OffloadedTeacher) else teacher
    if not isinstance(inner, HFTeacher) or not isinstance(inner._given, str):
        raise ValueError(f"plan: {type(teacher).__name__} has no configuration to plan with: name the model itself")
    role: Role = "teacher"
    with torch.device("meta"):
        model = causal_lm_from_config(inner._given, kwargs=inner.kwargs, role=role)
    _place(model, fake)
    module.teacher = ShapedTeacher(model, spread=not offloaded)
    return offloaded


def _place(model: nn.Module, fake: FakeTensorMode) -> None:
    """Give every tensor a place to lie in, if only in name; one that has two names stays one."""
    placed: dict[int, tuple[Tensor, Tensor]] = {}
    tables: Iterator[dict[str, Any]] = (
        table for module in model.modules() for table in (module._parameters, module._buffers, vars(module))
    )
    with fake:
        for table in tables:
            for name, tensor in table.items():
                if isinstance(tensor, Tensor):
                    made: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        made = nn.Parameter(made, requires_grad=tensor.requires_grad)
                    table[name] = placed.setdefault(id(tensor), (tensor, made))[1]
