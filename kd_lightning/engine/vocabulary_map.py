"""The tokens that two tokenizers share."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_lightning.divergences import described


@dataclass(frozen=True, eq=False)
class VocabularyMap:
    r"""Pairs of a student's and a teacher's token that stand for the same bytes.

    A divergence compares the two distributions on K + 1 outcomes: the K pairs, and on each side all tokens without a
    partner together. Merging outcomes cannot increase an f-divergence, so that its value is a lower bound. Where only
    one side has tokens without a partner, both distributions are conditioned on the pairs:
    \(p_v / \sum_{u \in \mathrm{pairs}} p_u\), which is no bound. Reduces to the plain loss where every token has itself
    as its partner, and to the plain loss of the permuted teacher where all tokens have one.

    Args:
        student_ids: the student's tokens, int64 [K], each at most once.
        teacher_ids: their partners, int64 [K], each at most once.
        student_size: number of tokens of the student's tokenizer; columns of its logits from there on are cut off.
        teacher_size: number of tokens of the teacher's tokenizer.

    Raises:
        ValueError: an argument is of another type, a token is outside of its vocabulary or has two partners.

    Examples:
        >>> import torch
        >>> from kd_lightning import VocabularyMap
        >>> tokens = VocabularyMap(torch.tensor([0, 2]), torch.tensor([1, 0]), student_size=3, teacher_size=2)
        >>> tokens.student_of_teacher, tokens.student_rest  # token 1 of the student has no partner
        (tensor([2, 0]), tensor([1]))
    """

    student_ids: Tensor
    teacher_ids: Tensor
    student_size: int
    teacher_size: int

    def __post_init__(self) -> None:
        sides = (
            ("student", self.student_ids, self.student_size),
            ("teacher", self.teacher_ids, self.teacher_size),
        )
        for side, ids, size in sides:
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{side}_size must be an integer ≥ 1, got {described(size)}")
            if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.ndim != 1:
                given = f"{ids.dtype} of shape {list(ids.shape)}" if isinstance(ids, Tensor) else described(ids)
                raise ValueError(f"{side}_ids must be an int64 tensor [K], got {given}")
        if not len(self.student_ids) or len(self.student_ids) != len(self.teacher_ids):
            raise ValueError(
                "student_ids and teacher_ids must have the same length, at least 1, got "
                f"{len(self.student_ids)} and {len(self.teacher_ids)}"
            )
        for side, ids, size in sides:
            outside = ids[(ids < 0) | (ids >= size)]
            if len(outside):
                raise ValueError(f"{side}_ids must be in [0, {size}), got {int(outside[0])}")
            twice = torch.nonzero(torch.bincount(ids, minlength=size) > 1)
            if len(twice):
                raise ValueError(f"{side}_ids must contain each token at most once, got {int(twice[0])} twice")

    @functools.cached_property
    def is_identity(self) -> bool:
        """Whether both vocabularies have the same size and every token is its own partner."""
        full = self.student_size == self.teacher_size == len(self.student_ids)
        return full and bool((self.student_ids == self.teacher_ids).all())

    @property
    def student_unmapped(self) -> bool:
        """Whether the student has tokens without a partner."""
        return len(self.student_ids) < self.student_size

    @property
    def teacher_unmapped(self) -> bool:
        """Whether the teacher has tokens without a partner."""
        return len(self.teacher_ids) < self.teacher_size

    @property
    def is_one_sided(self) -> bool:
        """Whether only one side has tokens without a partner: both distributions are then conditioned on the pairs."""
        return self.student_unmapped != self.teacher_unmapped

    @property
    def has_rest(self) -> bool:
        """Whether both sides have tokens without a partner: the divergence then has K + 1 outcomes."""
        return self.student_unmapped and self.teacher_unmapped

    @functools.cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's tokens of all pairs, in the order of the student's, [K] each."""
        student_ids, order = self.student_ids.sort()
        return student_ids, self.teacher_ids[order]

    @functools.cached_property
    def student_shared(self) -> Tensor:
        """Whether each of the student's tokens has a partner, [student_size]."""
        shared = torch.zeros(self.student_size, dtype=torch.bool, device=self.student_ids.device)
        return shared.index_fill_(0, self.student_ids, True)

    @functools.cached_property
    def teacher_shared(self) -> Tensor:
        """Whether each of the teacher's tokens has a partner, [teacher_size]."""
        return self.student_of_teacher >= 0

    @functools.cached_property
    def student_rest(self) -> Tensor:
        """The student's tokens without a partner."""
        return torch.nonzero(~self.student_shared).flatten()

    @functools.cached_property
    def teacher_rest(self) -> Tensor:
        """The teacher's tokens without a partner."""
        return torch.nonzero(~self.teacher_shared).flatten()

    @functools.cached_property
    def student_of_teacher(self) -> Tensor:
        """The partner of each of the teacher's tokens, [teacher_size]; −1: none."""
        partners = torch.full((self.teacher_size,), -1, device=self.teacher_ids.device)
        return partners.index_copy_(0, self.teacher_ids, self.student_ids)

    @functools.cached_property
    def _on_devices(self) -> dict[torch.device, VocabularyMap]:
        return {self.student_ids.device: self}

    def to(self, device: torch.device | str) -> VocabularyMap:
        """This map on a device; the same object for the same device."""
        device = torch.device(device)
        if device not in self._on_devices:
            ids = (self.student_ids.to(device), self.teacher_ids.to(device))
            self._on_devices[device] = VocabularyMap(*ids, self.student_size, self.teacher_size)
        return self._on_devices[device]
