"""Teachers that compute with the student's own weights, such as the student with its adapters disabled."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from kd_lightning.distributed.dtensor import is_sharded
from kd_lightning.distributed.dtensor import tensor_digest as tensor_digest
from kd_lightning.engine.head import Head
from kd_lightning.models.backbone import body_and_head as body_and_head
from kd_lightning.models.backbone import eval_mode, hidden_states
from kd_lightning.models.backbone import logits as logits
from kd_lightning.models.lora import adapter_layers, adapters_disabled
from kd_lightning.teachers.base import RunContext, StudentModel
from kd_lightning.teachers.base import Teacher as Teacher
from kd_lightning.teachers.cached import CachedTeacher as CachedTeacher


class StudentTeacher(Teacher, ABC):
    """The student itself, without dropout and gradient. A subclass decides what it computes, by a context manager."""

    shares_student = True
    starts_as_student = True

    def __init__(self) -> None:
        self._student: StudentModel | None = None

    @abstractmethod
    def as_teacher(self, student: nn.Module) -> AbstractContextManager[None]:
        """A context in which the student computes what the teacher does."""

    @property
    def name(self) -> None:
        """None: its tokenizer is the student's."""
        return None

    @property
    def head(self) -> Head | None:
        """The student's LM head; None if the student cannot be split."""
        return self._attached().head()

    @property
    def is_collective(self) -> bool:
        """Whether the student is sharded."""
        return any(is_sharded(parameter) for parameter in self._attached().student.parameters())

    def attach(self, run: RunContext) -> None:
        """Keep the student."""
        self._student = run.student

    def load(self, device: torch.device | str = "cpu") -> None:
        """Do nothing: the student is loaded."""

    def to(self, device: torch.device | str) -> None:
        """Do nothing: it is on the student's device."""

    @torch.no_grad()
    def hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Hidden states [B, T, H].

        Raises:
            ValueError: the student cannot be split (`head` is None).
        """
        student = self._attached()
        if student.body is None:
            raise ValueError("the student cannot be split into body and head: ask its teacher for logits")
        with self.as_teacher(student.student), eval_mode(student.student):
            return hidden_states(student.body, batch["input_ids"], batch["attention_mask"], student.packed)

    @torch.no_grad()
    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits [B, T, V]."""
        student = self._attached()
        with self.as_teacher(student.student), eval_mode(student.student):
            return logits(student.student, batch["input_ids"], batch["attention_mask"], student.packed)

    def _attached(self) -> StudentModel:
        if self._student is None:
            name = type(self).__name__
            raise ValueError(f"teacher {name} is not attached to a student yet: call `attach(run)` first")
        return self._student


class AdapterOffTeacher(StudentTeacher):
    """The student itself with its adapters disabled: the model it started as, without a second copy.

    Raises:
        ValueError: when the run starts, the student has no adapters.

    Examples:
        >>> from kd_lightning import AdapterOffTeacher, DistillationModule, LoRA
        >>> module = DistillationModule("asset:student", AdapterOffTeacher(), ce_weight=0.5, lora=LoRA(r=4))
        >>> module.teacher.shares_student
        True
    """

    def as_teacher(self, student: nn.Module) -> AbstractContextManager[None]:
        """The student with its adapters disabled."""
        return adapters_disabled(student)

    def attach(self, run: RunContext) -> None:
        """Keep the student."""
        if not adapter_layers(run.student.student):
            raise ValueError("teacher AdapterOffTeacher needs a student with adapters: pass --model.lora.r")
        super().attach(run)

    def fingerprint(self) -> str:
        """SHA-256 over all tensors that do not belong to an adapter."""
        student = self._attached().student
        frozen = ((name, p) for name, p in student.named_parameters() if not p.requires_grad)
        return tensor_digest(itertools.chain(frozen, student.named_buffers()))
