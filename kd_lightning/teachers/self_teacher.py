"""The student as its own teacher: as it is now, as its average over the steps, or as it started."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from kd_lightning.constants import TEACHER_FIELDS
from kd_lightning.distributed.dtensor import local_shard, tensor_digest
from kd_lightning.engine.head import Head
from kd_lightning.models.backbone import head_settings
from kd_lightning.models.lora import adapters_are_zero
from kd_lightning.schedules import check_number
from kd_lightning.teachers.adapter_off import AdapterOffTeacher, StudentTeacher
from kd_lightning.teachers.base import RunContext, StudentModel, Teacher, TokenizedData
from kd_lightning.teachers.hf import CausalLMTeacher

MODES = ("live", "ema", "frozen")
OWN_INPUT = TEACHER_FIELDS["input_ids"]  # in a batch whose teacher reads something else than the student
LIVE_NEEDS_INPUT = (
    "teacher SelfTeacher(mode='live') is the student itself, and its loss is zero without an input of its own: set "
    "data.teacher_prompt (or data.teacher_chat_template), or pass mode='ema' or mode='frozen'"
)


class SelfTeacher(Teacher):
    r"""The student as its own teacher, at another time: now, as an average over its steps, or as it started.

    \(\bar\theta \leftarrow d\,\bar\theta + (1 - d)\,\theta\) after every optimizer step, for the trained parameters θ
    of the student: all of them, or its adapters. The teacher computes without dropout and gradient, in the dtype of the
    student. The average is kept in fp32 (or the student's dtype, if that is wider). It is part of the checkpoint, and
    fsdp2 shards it as it shards the student. With an input of the teacher's own (`data.teacher_prompt`) this is
    on-policy self-distillation or prompt distillation. Without one, the divergence is zero at the start in every mode,
    and `ema` and `frozen` only make sense with `ce_weight` > 0.

    Reduces to `live` at decay 0 and to `frozen` at decay 1, both exactly. `frozen` with adapters that start at zero is
    `AdapterOffTeacher`, which needs no second copy and no state. Other than that `frozen` keeps a copy of the trained
    parameters, also in checkpoints.

    Args:
        mode: `live`: the student now; `ema`: its exponential moving average; `frozen`: what it started as.
        decay: d in [0, 1], for `ema`.

    Raises:
        ValueError: an argument is out of range; when the run starts: the mode is `live`, and the teacher reads what the
            student reads.

    Reference: Zhao et al., arXiv 2601.18734; Shenfeld et al., arXiv 2601.19897.

    Examples:
        >>> from kd_lightning import DistillationModule, SelfTeacher
        >>> module = DistillationModule("asset:student", SelfTeacher("ema", decay=0.99), ce_weight=0.5)
        >>> module.configure_model()
        >>> module.teacher.shares_student  # it is a copy
        False
    """

    starts_as_student = True

    def __init__(self, mode: Literal["live", "ema", "frozen"] = "live", decay: float = 0.999) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        check_number("decay", decay, 0, 1)
        self.mode, self.decay = mode, decay
        self.shares_student = mode == "live"
        self._student: StudentModel | None = None
        self._source: _LiveStudent | AdapterOffTeacher | _StudentCopy | None = None

    @property
    def name(self) -> None:
        """None: its tokenizer is the student's."""
        return None

    @property
    def head(self) -> Head | None:
        """Its LM head; None if the student cannot be split."""
        return self._attached().head

    @property
    def state(self) -> nn.Module | None:
        """The average in fp32, or what the student started as; None if the student's own weights are enough."""
        return self._attached().state

    @property
    def is_collective(self) -> bool:
        """Whether the parameters that it computes with are sharded."""
        return self._attached().is_collective

    def check_data(self, data: TokenizedData) -> None:
        """Check that a teacher that is the student itself reads something else.

        Raises:
            ValueError: it reads what the student reads.
        """
        if self.mode == "live" and not data.teacher_has_own_input:
            raise ValueError(LIVE_NEEDS_INPUT)

    def check_cacheable(self) -> None:
        """Check that it does not change during the run.

        Raises:
            ValueError: it does.
        """
        if self.mode != "frozen":
            raise ValueError(f"SelfTeacher(mode={self.mode!r}) changes with every step and cannot be cached")

    def attach(self, run: RunContext) -> None:
        """Keep the student, and copy what will be averaged or kept; attached to the same student again, keep all."""
        if run.data is not None:
            self.check_data(run.data)
        if self._student is run.student:
            return
        self._student = run.student
        if self.mode == "live":
            self._source = _LiveStudent()
        elif self.mode == "frozen" and adapters_are_zero(run.student.student):
            self._source = AdapterOffTeacher()
        else:
            self._source = _StudentCopy(run.student, 1.0 if self.mode == "frozen" else self.decay)
        self._source.attach(run)
        self.shares_student = self._source.shares_student
        self.model = self._source.model

    def load(self, device: torch.device | str = "cpu") -> None:
        """Move to a device; nothing is read."""
        self._attached().load(device)

    def to(self, device: torch.device | str) -> None:
        """Move to a device, and compute in the student's dtype from now on."""
        self._attached().to(device)

    def shard(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Let a strategy shard the copy, if there is one."""
        self._attached().shard(wrap)

    def after_step(self) -> None:
        """Update the average."""
        self._attached().after_step()

    def hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Hidden states [B, T, H]."""
        return self._asked(batch).hidden(batch)

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits [B, T, V]."""
        return self._asked(batch).logits(batch)

    def fingerprint(self) -> str:
        """A digest of the weights that it computes with now."""
        return self._attached().fingerprint()

    def _asked(self, batch: Mapping[str, Tensor]) -> _LiveStudent | AdapterOffTeacher | _StudentCopy:
        if self.mode == "live" and OWN_INPUT not in batch:
            raise ValueError(LIVE_NEEDS_INPUT)
        return self._attached()

    def _attached(self) -> _LiveStudent | AdapterOffTeacher | _StudentCopy:
        if self._source is None:
            raise ValueError("teacher SelfTeacher is not attached to a student yet: call `attach(run)` first")
        return self._source


class _LiveStudent(StudentTeacher):
    """The student as it is now; generation by this teacher is generation by the student."""

    def attach(self, run: RunContext) -> None:
        """Keep the student."""
        super().attach(run)
        self.model = run.student.student

    def as_teacher(self, student: nn.Module) -> AbstractContextManager[None]:
        """The student as it is."""
        return nullcontext()

    def fingerprint(self) -> str:
        """SHA-256 over all tensors of the student."""
        student = self._attached().student
        return tensor_digest([*student.named_parameters(), *student.named_buffers()])


class _StudentCopy(CausalLMTeacher):
    """A copy of the student in which the trained parameters are averages; frozen parameters are the student's own.

    Args:
        student: with its weights at the start.
        decay: of the average, in [0, 1]; 1: the copy stays as it is.
    """

    def __init__(self, student: StudentModel, decay: float) -> None:
        original = student.student
        model: Any = copy.deepcopy(original, _copies(original))
        super().__init__(model)
        self._original, self._decay = student, decay
        self._trained = [name for name, parameter in original.named_parameters() if parameter.requires_grad]
        self.model = model.eval().requires_grad_(False)
        head, body = student.head(), student.body
        if head is not None and body is not None:
            names = {id(module): name for name, module in original.named_modules()}
            self._body, self._head = model.get_submodule(names[id(body)]), head_settings(head)
        self.average = _AveragedParameters()
        self._set_average(self._copied())

    @property
    def state(self) -> nn.Module:
        """The averages."""
        return self.average

    def load(self, device: torch.device | str = "cpu") -> None:
        """Move to a device."""
        self.to(device)

    def shard(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Let a strategy shard the copy, and with it the averages."""
        if not self.is_sharded:
            super().shard(wrap)
            self._set_average(self._copied())

    def to(self, device: torch.device | str) -> None:
        """Move to a device, and compute in the dtype that the student has by now."""
        model, device = self._loaded(), torch.device(device)
        held = itertools.chain(model.parameters(), model.buffers())
        if not self.is_sharded and any(tensor.device != device for tensor in held):
            model.to(device)
        dtypes = {theirs.dtype for own, theirs in self._pairs() if own.dtype != theirs.dtype}
        for dtype in dtypes:  # the precision of the run has cast the student after it was copied
            self._set_average({name: average.clone() for name, average in self.average.named_tensors()})
            (model if self._gathered is None else self._gathered).to(dtype)
        if dtypes:
            self._write()

    @torch.no_grad()
    def after_step(self) -> None:
        """Update the averages, and the copy if it computes in another dtype."""
        if self._decay == 1:
            return
        for (_, average), (_, theirs) in zip(self.average.named_tensors(), self._pairs(), strict=True):
            held = local_shard(average)
            held.lerp_(local_shard(theirs).detach().to(held.dtype), 1 - self._decay)
        self._write()

    @torch.no_grad()
    def _write(self) -> None:
        """Copy the averages into the copy; where the two are the same tensors, nothing happens."""
        for (_, average), (own, _) in zip(self.average.named_tensors(), self._pairs(), strict=True):
            if own is not average:
                local_shard(own).copy_(local_shard(average))

    def _copied(self) -> dict[str, Tensor]:
        """The trained parameters of the copy in fp32 at least; themselves if they are that already."""
        own = dict(self._loaded().named_parameters())
        return {name: own[name].to(torch.promote_types(own[name].dtype, torch.float32)) for name in self._trained}

    def _set_average(self, tensors: Mapping[str, Tensor]) -> None:
        self.average.replace(tensors)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each trained parameter of the copy and of the student; a strategy may have replaced both."""
        own, theirs = dict(self._loaded().named_parameters()), dict(self._original.student.named_parameters())
        return ((own[name], theirs[name]) for name in self._trained)


def _copies(model: nn.Module) -> dict[int, Any]:
    """What a copy of a model has for each of its tensors: frozen parameters themselves, and clones of all others.

    `copy.deepcopy` would clone the others too, but not the fake tensors of a plan.
    """
    found: dict[int, Any] = {}
    for x in model.parameters():
        found[id(x)] = nn.Parameter(x.detach().clone(), requires_grad=False) if x.requires_grad else x
    for module in model.modules():
        for tensor in (*module._buffers.values(), *vars(module).values()):
            if isinstance(tensor, Tensor):
                found.setdefault(id(tensor), tensor.detach().clone())
    return found


class _AveragedParameters(nn.Module):
    """Averages by the name of the parameter, in which every dot is a slash; they follow the device, never the dtype."""

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Hold these tensors; a parameter is held itself."""
        for name, tensor in tensors.items():
            held = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach(), requires_grad=False)
            self.register_parameter(name.replace(".", "/"), held)

    def named_tensors(self) -> Iterable[tuple[str, Tensor]]:
        """Name of the parameter and average, in the order of the student's parameters."""
        return [(name.replace("/", "."), tensor) for name, tensor in self._parameters.items() if tensor is not None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the device only: casting the module must not round the averages."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).device)

        return super()._apply(moved, recurse)  # type: ignore[no-untyped-call,no-any-return]
