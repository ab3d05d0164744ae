"""The student with its adapters disabled, as the teacher."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kd_lightning.distributed.dtensor import tensor_digest as tensor_digest
from kd_lightning.engine.head import Head
from kd_lightning.models.backbone import body_and_head as body_and_head
from kd_lightning.models.backbone import eval_mode, hidden_states
from kd_lightning.models.backbone import logits as logits
from kd_lightning.models.lora import adapter_layers, adapters_disabled
from kd_lightning.teachers.base import Teacher as Teacher
from kd_lightning.teachers.cached import CachedTeacher as CachedTeacher


class AdapterOffTeacher(Teacher):
    """The student itself with its adapters off: the model it started as, without a second copy.

    Raises:
        ValueError: when the run starts, the student has no adapters.
    """

    def __init__(self) -> None:
        self._model: Any = None

    @property
    def name(self) -> None:
        """None: its tokenizer is the student's."""
        return None

    @property
    def head(self) -> Head | None:
        """The student's; None where it cannot be cut."""
        head: Head | None = self._met().head()
        return head

    def meet(self, module: Any) -> None:
        """Take the student."""
        if not adapter_layers(module.model.student):
            raise ValueError("teacher AdapterOffTeacher needs a student with adapters: give --model.lora.r")
        self._model = module.model

    def load(self, device: torch.device | str = "cpu") -> None:
        """Nothing: the student is there."""

    def to(self, device: torch.device | str) -> None:
        """Nothing: it is where the student is."""

    @torch.no_grad()
    def hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Hidden states [B, T, H]."""
        model = self._met()
        with adapters_disabled(model.student), eval_mode(model.student):
            return hidden_states(model.body, batch["input_ids"], batch["attention_mask"])

    @torch.no_grad()
    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits [B, T, V]."""
        student = self._met().student
        with adapters_disabled(student), eval_mode(student):
            return logits(student, batch["input_ids"], batch["attention_mask"])

    def fingerprint(self) -> str:
        """SHA-256 over the tensors that are not an adapter's."""
        student = self._met().student
        frozen = ((name, p) for name, p in student.named_parameters() if not p.requires_grad)
        return tensor_digest(itertools.chain(frozen, student.named_buffers()))

    def _met(self) -> Any:
        if self._model is None:
            raise ValueError("teacher AdapterOffTeacher has met no student yet: it is given one when a run starts")
        return self._model
