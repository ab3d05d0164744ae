"""What a loss is computed from: the tokens with a label, and the logits of both models there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kd_lightning.divergences import described
from kd_lightning.engine.alignment import TeacherPositions, label_log_probs
from kd_lightning.engine.block_logits import LABEL_PAIRED, PAIRED
from kd_lightning.engine.head import Head
from kd_lightning.engine.label_mask import LabelMask
from kd_lightning.engine.logit_source import DifferentiableLogits, GivenLogits, LogitSource, ProjectedLogits
from kd_lightning.engine.mapped_logits import MappedLogits
from kd_lightning.engine.top_k import TopK, TopKLogits, mapped_top_k
from kd_lightning.engine.validation import check_tensor
from kd_lightning.engine.vocabulary_map import VocabularyMap


@dataclass(frozen=True)
class Outputs:
    """The outputs of one model: logits, or hidden states with an LM head.

    Args:
        tensor: logits [..., V], or hidden states [..., H].
        head: the LM head; None: `tensor` has logits.
    """

    tensor: Tensor
    head: Head | None = None

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.tensor.shape[-1] if self.head is None else self.head.vocabulary

    @property
    def shape(self) -> torch.Size:
        """Shape of the tokens."""
        return self.tensor.shape[:-1]

    def logits(self, index: Tensor, vocabulary: int) -> DifferentiableLogits:
        """Logits of some tokens of the flattened batch, cut to the first entries of the vocabulary."""
        flat = self.tensor.reshape(-1, self.tensor.shape[-1])
        if self.head is None:
            return GivenLogits(flat, index, vocabulary)
        return ProjectedLogits(flat, self.head, index, vocabulary)


class Alignment(NamedTuple):
    """How the teacher's tokens correspond to the student's; arguments as in `DistillationLoss.from_logits`."""

    teacher_labels: Tensor | None
    vocabulary_map: VocabularyMap | None
    teacher_positions: Tensor | None

    def tokens(self, name: str, x: object, labels: Tensor) -> Tensor:
        """A tensor in the shape that the teacher's tokens must have.

        Args:
            name: of the teacher's argument, for messages.
            x: the teacher's outputs, [..., T', V], or the log-probabilities of its top k.
            labels: the student's.

        Raises:
            ValueError: with `teacher_positions`, x has not as many rows as the labels.
        """
        if self.teacher_positions is None:
            return labels if self.teacher_labels is None else self.teacher_labels
        check_tensor(name, x)
        assert isinstance(x, Tensor)
        if x.ndim != labels.ndim + 1 or x.shape[:-2] != labels.shape[:-1]:
            raise ValueError(
                f"{name} must have the labels' rows {list(labels.shape[:-1])} and two more dimensions, got "
                f"{list(x.shape)}"
            )
        return x[..., 0]

    def vocabulary(self, student: Outputs, teacher: Outputs | TopK | None) -> int:
        """Width of the student's logits.

        Raises:
            ValueError: the map is of another type, or has more tokens than a model.
        """
        sizes = self.vocabulary_map
        if sizes is None:
            return student.vocabulary if teacher is None else min(student.vocabulary, teacher.vocabulary)
        if not isinstance(sizes, VocabularyMap):
            raise ValueError(f"vocabulary_map must be a VocabularyMap or None, got {described(sizes)}")
        for side, size, model in (("student", sizes.student_size, student), ("teacher", sizes.teacher_size, teacher)):
            if isinstance(model, Outputs) and size > model.vocabulary:
                raise ValueError(
                    f"{side}_size of the vocabulary_map must be at most the {side}'s vocabulary {model.vocabulary}, "
                    f"got {size}"
                )
        return sizes.student_size

    def different_vocabularies(self, teacher: Outputs | TopK | None) -> VocabularyMap | None:
        """The map; None where the first `student_size` tokens of both models are the same."""
        found = self.vocabulary_map
        if found is None or not found.is_identity:
            return found
        return found if isinstance(teacher, TopK) and teacher.vocabulary != found.student_size else None


class Batch:
    """The tokens of a batch that have a label, and both models' logits there.

    Args:
        student: its outputs, in the shape of the labels.
        teacher: its outputs, or its top k, in the shape of `alignment.tokens`; None: no teacher.
        labels: integers [B, T] or [T]; −100: no label.
        alignment: how the teacher's tokens correspond to the student's.

    Attributes:
        mask: the tokens with a label.
        student: the student's logits.
        teacher: the teacher's logits; None: no teacher.
        map: the tokens that both models share, on the device of the labels; None: their vocabularies are the same.
        positions: the teacher's position of each token; None: that of its label.

    Raises:
        ValueError: vocabularies, labels or positions do not match.
    """

    def __init__(self, student: Outputs, teacher: Outputs | TopK | None, labels: Tensor, alignment: Alignment) -> None:
        vocabulary = alignment.vocabulary(student, teacher)
        found = alignment.different_vocabularies(teacher)
        self.map = None if found is None else found.to(labels.device)
        self.mask = LabelMask(labels, vocabulary)
        self.student = student.logits(self.mask.index, vocabulary)
        self.teacher: LogitSource | None = None
        self.positions: TeacherPositions | None = None
        self._outputs, self._own_labels = teacher, alignment.teacher_labels
        if teacher is None:
            return
        if alignment.teacher_positions is None:
            index = self.mask.index_in(alignment.teacher_labels)
        else:
            check_tensor("teacher_positions", alignment.teacher_positions)
            self.positions = TeacherPositions(self.mask, alignment.teacher_positions, teacher.shape[-1])
            index = self.positions.index
        if isinstance(teacher, TopK):
            self.teacher = self._top_k(teacher.select(index))
        elif self.map is None:
            self.teacher = teacher.logits(index, vocabulary)
        else:
            self.teacher = MappedLogits(teacher.logits(index, self.map.teacher_size), self.map)

    def _top_k(self, known: TopK) -> TopKLogits:
        if self.positions is not None:  # the ids of a token without a partner may be anything
            ids = torch.where(self.positions.paired.unsqueeze(-1), known.ids, 0)
            known = TopK(ids, known.log_probs, known.log_tail, known.vocabulary)
        return TopKLogits(known) if self.map is None else mapped_top_k(known, self.map)

    @property
    def merges(self) -> bool:
        """Whether tokens of different vocabularies are merged into one outcome."""
        return self.map is not None and (self.map.has_rest or isinstance(self._outputs, TopK))

    @property
    def is_aligned(self) -> bool:
        """Whether tokens or labels may have no partner."""
        return self.teacher is not None and (self.map is not None or self.positions is not None)

    def pairs(self) -> dict[str, Tensor]:
        """Whether each token has a partner in the teacher's input, and its label one besides, [N]."""
        if not self.is_aligned:
            return {}
        labels = self.mask.labels
        paired = torch.ones_like(labels, dtype=torch.bool) if self.positions is None else self.positions.paired
        return {PAIRED: paired, LABEL_PAIRED: paired if self.map is None else paired & self.map.student_shared[labels]}

    def chunk_columns(self, t: float, dtype: torch.dtype, chunk: int | None) -> dict[str, Tensor]:
        """What `ChunkLikelihood` reads, [N] each, from one more projection of both models.

        Raises:
            ValueError: an argument that this needs is missing or does not match.
        """
        positions, own, outputs = self.positions, self._own_labels, self._outputs
        if positions is None or own is None:
            missing = "teacher_positions" if positions is None else "teacher_labels"
            raise ValueError(f"{missing} must be given for ChunkLikelihood, got None")
        if not isinstance(outputs, Outputs):
            raise ValueError("ChunkLikelihood cannot be computed from a teacher's top-k log-probabilities")
        if own.shape != outputs.shape:
            raise ValueError(
                f"teacher_labels must have the shape of the teacher's tokens {list(outputs.shape)}, got "
                f"{list(own.shape)}"
            )
        vocabulary = self.student.vocabulary if self.map is None else self.map.teacher_size
        mask = LabelMask(own, vocabulary, "teacher_labels", "the teacher's vocabulary")
        teacher = label_log_probs(outputs.logits(mask.index, vocabulary), mask, t, dtype, chunk)
        return positions.chunk_columns(label_log_probs(self.student, self.mask, t, dtype, chunk), teacher, mask)
