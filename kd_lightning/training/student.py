"""Student and loss in one forward: body, LM head, loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from kd_lightning.constants import TEACHER_FIELDS, TEACHER_INDEX, TEACHER_POSITIONS
from kd_lightning.distributed.fsdp2 import ShardableStudent
from kd_lightning.distributed.vocab_parallel import head_on_rank
from kd_lightning.engine.head import Head
from kd_lightning.engine.top_k import TopK
from kd_lightning.engine.vocabulary_map import VocabularyMap
from kd_lightning.losses import DistillationLoss, LossParts
from kd_lightning.losses.batch import Alignment
from kd_lightning.models.backbone import body_and_head, head_settings, hidden_states, logits, with_current_weights
from kd_lightning.models.hf_adapter import (
    output_embeddings,
    weight_and_bias,
)
from kd_lightning.models.packing.check import check_packing
from kd_lightning.teachers.base import Teacher, TeacherShare
from kd_lightning.teachers.batches import teacher_batch
from kd_lightning.training.loss_components import component_sums
from kd_lightning.training.routed_pass import RoutedPass

MODEL_INPUTS = ("input_ids", "attention_mask")
NOT_COLUMNS = (*MODEL_INPUTS, "labels", "row_ids", TEACHER_INDEX, TEACHER_POSITIONS, *TEACHER_FIELDS.values())
Split = Callable[[Any], tuple[nn.Module, Head]]  # a model into its body and its LM head


@dataclass(frozen=True)
class ForwardPass:
    """Outputs of both models on one batch, from which any loss can be computed.

    Args:
        student: hidden states if `student_head` is given, else logits; [B, T, H or V].
        student_head: None: the student cannot be split, or the teacher gives full logits.
        teacher: hidden states if `teacher_head` is given, else its distribution; None without a teacher.
        teacher_head: the teacher's LM head.
        labels: [B, T].
        columns: extra inputs per token, [B, T] or [B].
        alignment: how the teacher's tokens correspond to the student's.
    """

    student: Tensor
    student_head: Head | None
    teacher: Tensor | TopK | None
    teacher_head: Head | None
    labels: Tensor
    columns: Mapping[str, Tensor]
    alignment: Alignment

    @property
    def knows_all_tokens(self) -> bool:
        """Whether the teacher's full distribution is known, if there is a teacher."""
        return not isinstance(self.teacher, TopK)

    def loss(self, loss: DistillationLoss) -> LossParts:
        """A loss of these outputs."""
        if self.student_head is None:
            return loss.from_logits(self.student, self.teacher, self.labels, self.columns, *self.alignment)
        models = (self.student, self.student_head, self.teacher, self.teacher_head)
        return loss.from_hidden(*models, self.labels, self.columns, *self.alignment)


class StudentWithLoss(ShardableStudent):
    """Student and loss in one forward, body -> LM head -> loss: the unit that DDP and FSDP2 wrap.

    Args:
        student: a Hugging Face causal LM; None: `set_student` follows.
        loss: the training loss.

    Attributes:
        packed: whether the models read rows without padding.
    """

    student: nn.Module

    def __init__(self, student: nn.Module | None, loss: DistillationLoss) -> None:
        super().__init__()
        self.register_module("student", None)  # before the loss: the order of parameters in checkpoints
        self.loss = loss
        self._head: Head | None = None  # its settings alone: the weights are read from the model each time
        self._body: list[nn.Module] = []  # kept in a list so that it is not registered as a second submodule
        self._vocabulary_maps: dict[str, VocabularyMap | None] = {}  # by the name of a teacher, "" if there is one
        self.packed = False
        if student is not None:
            self.set_student(student)

    def set_student(self, student: nn.Module, split: Split = body_and_head) -> None:
        """Set the student and split it into body and LM head.

        Args:
            student: a Hugging Face causal LM.
            split: how it is split; it raises a ValueError for a model that cannot be split.
        """
        self.student = student
        try:
            body, head = split(student)
            self._head = head_settings(head)
            self._body = [body]
        except ValueError as error:
            rank_zero_info(f"student: {error}; full logits are used instead")

    def pack_rows(self, check: bool = True) -> None:
        """Let the models read rows without padding, teachers that are attached from now on as well.

        Args:
            check: whether the student is checked; not on fake tensors.

        Raises:
            ValueError: the student does not keep packed rows apart.
        """
        if check and not self.packed:
            check_packing(self.student, self.body, "student")
        self.packed = True

    def use_vocabulary_map(self, vocabulary_map: VocabularyMap | None, member: str = "") -> None:
        """Set the tokens that student and teacher share; None: they have one tokenizer.

        Args:
            vocabulary_map: their map.
            member: name of the teacher if there are several.
        """
        self._vocabulary_maps[member] = vocabulary_map

    @property
    def has_student(self) -> bool:
        """Whether the student is loaded."""
        return self._modules["student"] is not None

    def head(self) -> Head | None:
        """The student's LM head with its current weights (a strategy may have replaced the parameters)."""
        return None if self._head is None else head_on_rank(with_current_weights(self.student, self._head))

    @property
    def body(self) -> nn.Module | None:
        """The module that returns the student's hidden states; None if the student cannot be split."""
        return self._body[0] if self._body else None

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the student has logits for."""
        weight, _ = weight_and_bias(output_embeddings(self.student))
        assert weight is not None
        return int(weight.shape[0])

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`function(*args, **kwargs)`: everything that reads the student outside of `forward` goes through here.

        A strategy that shards the parameters gathers them around both.
        """
        return function(*args, **kwargs)

    def forward(
        self,
        batch: dict[str, Tensor],
        teacher: Teacher | None,
        loss: DistillationLoss | None = None,
        components: DistillationLoss | None = None,
    ) -> LossParts:
        """Undivided loss of one batch; the prediction at position t is compared with the label at t + 1.

        Args:
            batch: `input_ids`, `attention_mask`, `labels` of shape [B, T], and columns of shape [B] or [B, T]; if the
                teacher has an input of its own, the fields of `TEACHER_FIELDS` of shape [B, Tt].
            teacher: run without gradient; None if the loss does not use it.
            loss: another loss on the same models (for evaluation); None: the training loss.
            components: a loss whose monitors are measured on the same outputs as well; their means are added to
                `components`. Skipped with a top-k teacher. The training loss is not affected.
        """
        outputs = self._run_models(batch, teacher)
        parts = outputs.loss(loss or self.loss)
        if components is not None and teacher is not None and outputs.knows_all_tokens:
            with torch.no_grad():
                parts.components.update(component_sums(components, outputs.loss(components)))
        return parts

    def _run_models(self, batch: dict[str, Tensor], teacher: Teacher | None) -> ForwardPass | RoutedPass:
        """Run the teachers, then the student; hidden states if possible, else full logits."""
        shares = [] if teacher is None else teacher.shares(batch)
        if len(shares) > 1:
            return self._run_routed(batch, shares)
        return self._run_pair(batch, shares[0] if shares else None)

    def _run_pair(self, batch: dict[str, Tensor], share: TeacherShare | None) -> ForwardPass:
        """Run a teacher on all rows, then the student."""
        teacher, member = (None, None) if share is None else (share.teacher, share.member)
        batch = batch if share is None else share.rows_of(batch)
        inputs = {name: batch[name] for name in MODEL_INPUTS}
        columns = self._columns(batch, member)
        head, teacher_head = self.head(), None if teacher is None else teacher.head
        known: Tensor | TopK | None = None
        if teacher is not None and (head is None or teacher_head is None):
            known, teacher_head = teacher.logits(teacher_batch(batch))[:, :-1], None
        if head is None or self.body is None or isinstance(known, Tensor):
            return ForwardPass(logits(self.student, **inputs, packed=self.packed)[:, :-1], None, known, None, *columns)
        if teacher is not None and teacher_head is not None:
            known = teacher.hidden(teacher_batch(batch))[:, :-1]
        return ForwardPass(
            hidden_states(self.body, **inputs, packed=self.packed)[:, :-1], head, known, teacher_head, *columns
        )

    def _run_routed(self, batch: dict[str, Tensor], shares: list[TeacherShare]) -> RoutedPass:
        """Run each teacher on its rows, then the student once on all rows."""
        head = self.head()
        views = [share.rows_of(batch) for share in shares]
        known = [self._run_teacher(view, share.teacher, head) for share, view in zip(shares, views, strict=True)]
        inputs = {name: batch[name] for name in MODEL_INPUTS}
        if head is None or self.body is None:
            outputs, head = logits(self.student, **inputs, packed=self.packed)[:, :-1], None
        else:
            outputs = hidden_states(self.body, **inputs, packed=self.packed)[:, :-1]
        passes = []
        for share, view, (teacher, teacher_head) in zip(shares, views, known, strict=True):
            rows = share.rows
            if rows is None or not len(rows):  # run for the other ranks
                continue
            own, columns = outputs[rows], self._columns(view, share.member)
            if head is not None and isinstance(teacher, Tensor) and teacher_head is None:
                passes.append((rows, ForwardPass(head.logits(own), None, teacher, None, *columns)))
            else:
                passes.append((rows, ForwardPass(own, head, teacher, teacher_head, *columns)))
        return RoutedPass(passes, batch["labels"][:, 1:])

    @staticmethod
    def _run_teacher(rows: dict[str, Tensor], teacher: Teacher, head: Head | None) -> tuple[Tensor | TopK, Head | None]:
        """Hidden states and LM head of a teacher on its rows, or its distribution without a head."""
        own, teacher_head = teacher_batch(rows), teacher.head
        if head is None or teacher_head is None:
            return teacher.logits(own)[:, :-1], None
        return teacher.hidden(own)[:, :-1], teacher_head

    def _columns(self, batch: dict[str, Tensor], member: str | None) -> tuple[Tensor, dict[str, Tensor], Alignment]:
        """Labels and extra inputs per token, each without the first token, and how the teacher's tokens correspond.

        Args:
            batch: of the data, or rows of it.
            member: name of the teacher, "" if there is one; None: there is none.
        """
        columns = {name: column for name, column in batch.items() if name not in NOT_COLUMNS}
        shifted = {name: column[:, 1:] if column.ndim == 2 else column for name, column in columns.items()}
        own = None if member is None else batch.get(TEACHER_FIELDS["labels"])
        read = None if member is None else batch.get(TEACHER_POSITIONS)
        alignment = Alignment(
            None if own is None else own[:, 1:],
            None if read is None or member is None else self._vocabulary_maps.get(member),
            None if read is None else (read[:, 1:] - 1).clamp_min(-1),  # its distribution of a token stands before it
        )
        return batch["labels"][:, 1:], shifted, alignment
