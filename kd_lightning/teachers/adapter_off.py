"""The student with its adapters disabled, as the teacher."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from kd_lightning.distributed.dtensor import tensor_digest as tensor_digest
from kd_lightning.engine.head import Head
from kd_lightning.models.backbone import body_and_head as body_and_head
from kd_lightning.models.backbone import eval_mode, hidden_states
from kd_lightning.models.backbone import logits as logits
from kd_lightning.models.lora import adapter_layers, adapters_disabled
from kd_lightning.teachers.base import RunContext, StudentModel
from kd_lightning.teachers.base import Teacher as Teacher
from kd_lightning.teachers.cached import CachedTeacher as CachedTeacher


class AdapterOffTeacher(Teacher):
    """The student itself with its adapters disabled: the model it started as, without a second copy.

    Raises:
        ValueError: when the run starts, the student has no adapters.
    """

    shares_student = True

    def __init__(self) -> None:
        self._student: StudentModel | None = None

    @property
    def name(self) -> None:
        """None: its tokenizer is the student's."""
        return None

    @property
    def head(self) -> Head | None:
        """The student's LM head; None if the student cannot be split."""
        return self._attached().head()

    def attach(self, run: RunContext) -> None:
        """Keep the student."""
        if not adapter_layers(run.student.student):
            raise ValueError("teacher AdapterOffTeacher needs a student with adapters: pass --model.lora.r")
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
            raise ValueError("the student cannot be split into body and head: ask AdapterOffTeacher for its logits")
        with adapters_disabled(student.student), eval_mode(student.student):
            return hidden_states(student.body, batch["input_ids"], batch["attention_mask"])

    @torch.no_grad()
    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits [B, T, V]."""
        student = self._attached().student
        with adapters_disabled(student), eval_mode(student):
            return logits(student, batch["input_ids"], batch["attention_mask"])

    def fingerprint(self) -> str:
        """SHA-256 over all tensors that do not belong to an adapter."""
        student = self._attached().student
        frozen = ((name, p) for name, p in student.named_parameters() if not p.requires_grad)
        return tensor_digest(itertools.chain(frozen, student.named_buffers()))

    def _attached(self) -> StudentModel:
        if self._student is None:
            raise ValueError("teacher AdapterOffTeacher is not attached to a student yet: call `attach(run)` first")
        return self._student
