"""Student and loss under one forward: body, head, loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from kd_lightning.distributed.fsdp2 import ShardableStudent
from kd_lightning.distributed.vocab_parallel import head_on_rank
from kd_lightning.engine.head import Head
from kd_lightning.engine.top_k import TopK
from kd_lightning.losses import DistillationLoss, LossParts
from kd_lightning.models.backbone import body_and_head, head_settings, hidden_states, logits, with_current_weights
from kd_lightning.teachers.base import Teacher
from kd_lightning.training.loss_components import component_sums

MODEL_INPUTS = ("input_ids", "attention_mask")
NOT_COLUMNS = (*MODEL_INPUTS, "labels", "row_ids")


class StudentWithLoss(ShardableStudent):
    """Student and loss under one forward, body -> head -> loss: what DDP and FSDP2 wrap as a whole.

    Args:
        student: a Hugging Face causal LM.
        loss: the loss it is trained on.
    """

    cut = staticmethod(body_and_head)

    def __init__(self, student: nn.Module, loss: DistillationLoss) -> None:
        super().__init__()
        self.student = student
        self.loss = loss
        self._reading: Head | None = None
        self._body: list[nn.Module] = []  # in a list: a second name for a part of the student, not a second part
        try:
            body, reading = self.cut(student)
            self._reading = head_settings(reading)
            self._body.append(body)
        except ValueError as error:
            rank_zero_info(f"student: {error}; its whole logits are used instead")

    def head(self) -> Head | None:
        """The student's head as it stands now (a strategy may have put other tensors in the parameters' place)."""
        return None if self._reading is None else head_on_rank(with_current_weights(self.student, self._reading))

    @property
    def body(self) -> nn.Module | None:
        """What gives the student's hidden states; None where it cannot be cut."""
        return self._body[0] if self._body else None

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the student has logits for."""
        student: Any = self.student
        return int(student.get_output_embeddings().weight.shape[0])

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `function(*args, **kwargs)` gives: whatever reads the student outside of `forward` goes through here.

        A strategy that shards the parameters gathers them around both.
        """
        return function(*args, **kwargs)

    def forward(
        self,
        batch: dict[str, Tensor],
        teacher: Teacher | None,
        loss: DistillationLoss | None = None,
        beside: DistillationLoss | None = None,
    ) -> LossParts:
        """Undivided loss of one batch; position t is scored on the label at t + 1.

        Args:
            batch: `input_ids`, `attention_mask`, `labels` of shape [B, T], and columns of shape [B] or [B, T].
            teacher: read here, without gradient; None where nothing asks for it.
            loss: another loss on the same models (monitors in validation); None: the one it was built with.
            beside: its monitors are measured on the same hidden states and their means join `by_response`, where the
                teacher's whole distribution is known. The loss is computed as without it, bit by bit.
        """
        loss = loss or self.loss
        labels = batch["labels"][:, 1:]
        rows = {
            name: column[:, 1:] if column.ndim == 2 else column
            for name, column in batch.items()
            if name not in NOT_COLUMNS
        }
        inputs = {name: batch[name] for name in MODEL_INPUTS}
        head, teacher_head = self.head(), None if teacher is None else teacher.head
        told: Tensor | TopK | None = None
        if teacher is not None and (head is None or teacher_head is None):
            told = teacher.logits(batch)[:, :-1]
        if head is not None and not isinstance(told, Tensor):
            teacher_hidden = told if teacher is None or teacher_head is None else teacher.hidden(batch)[:, :-1]
            hidden = hidden_states(self._body[0], **inputs)[:, :-1]

            def read(loss: DistillationLoss) -> LossParts:
                return loss.from_hidden(hidden, head, teacher_hidden, teacher_head, labels, rows)
        else:
            student_logits = logits(self.student, **inputs)[:, :-1]

            def read(loss: DistillationLoss) -> LossParts:
                return loss.from_logits(student_logits, told, labels, rows)

        found = read(loss)
        if beside is not None and teacher is not None and not isinstance(told, TopK):  # a top k has no tail to measure
            with torch.no_grad():
                found.by_response.update(component_sums(beside, read(beside)))
        return found
