"""Which tokens of two vocabularies stand for the same bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class VocabularyMap:
    """Pairs of tokens, one of the student's and one of the teacher's vocabulary, that stand for the same bytes.

    Args:
        student_ids: [K] integers, the student's token of each pair.
        teacher_ids: [K] integers, the teacher's token of each pair.
        student_size: number of tokens of the student's tokenizer.
        teacher_size: number of tokens of the teacher's tokenizer.

    Raises:
        ValueError: the lengths differ, or a token is out of range or in two pairs.
    """

    student_ids: Tensor
    teacher_ids: Tensor
    student_size: int
    teacher_size: int

    def __post_init__(self) -> None:
        for name, ids, size in (
            ("student_ids", self.student_ids, self.student_size),
            ("teacher_ids", self.teacher_ids, self.teacher_size),
        ):
            if ids.ndim != 1 or ids.shape != self.student_ids.shape or ids.dtype != torch.int64:
                raise ValueError(f"{name} must be int64 of one length K, got {ids.dtype} of shape {list(ids.shape)}")
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < size:
                raise ValueError(f"{name} must be in [0, {size}), got {int(ids.min())} to {int(ids.max())}")
            if len(ids.unique()) != len(ids):
                raise ValueError(f"{name} must contain each token at most once")

    @property
    def is_identity(self) -> bool:
        """Whether every token is its own partner."""
        same = self.student_size == self.teacher_size == len(self.student_ids)
        return same and bool((self.student_ids == self.teacher_ids).all())

    @property
    def student_unmapped(self) -> Tensor:
        """Which of the student's tokens have no partner, [student_size]."""
        return _others(self.student_ids, self.student_size)

    @property
    def teacher_unmapped(self) -> Tensor:
        """Which of the teacher's tokens have no partner, [teacher_size]."""
        return _others(self.teacher_ids, self.teacher_size)

    def to(self, device: torch.device | str) -> VocabularyMap:
        """The same on a device."""
        ids = self.student_ids.to(device), self.teacher_ids.to(device)
        return VocabularyMap(*ids, self.student_size, self.teacher_size)


def _others(ids: Tensor, size: int) -> Tensor:
    found = torch.ones(size, dtype=torch.bool, device=ids.device)
    found[ids] = False
    return found
