"""A teacher and the rows of a batch that it teaches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kd_lightning.constants import IGNORE_INDEX, TEACHER_FIELDS

if TYPE_CHECKING:
    from kd_lightning.teachers.base import Teacher


@dataclass(frozen=True)
class TeacherShare:
    """A teacher and the rows of a batch that it teaches.

    Args:
        teacher: not made of others.
        rows: indices of the rows, [n]; None: all rows. Without any, the teacher must be run all the same, as other
            ranks wait for it; the results are not used.
        member: its name among the teachers of a run; "": there is one.
        reads_student_input: whether it reads what the student reads in a batch in which other teachers do not.
    """

    teacher: Teacher
    rows: Tensor | None = None
    member: str = ""
    reads_student_input: bool = False

    def rows_of(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Its rows of a batch, as it reads them; the first row, without labels, if there are none.

        Args:
            batch: columns of shape [B, …].
        """
        found = dict(batch)
        if self.rows is not None and len(self.rows):
            found = {name: column[self.rows] for name, column in batch.items()}
        elif self.rows is not None:
            first = {name: column[:1] for name, column in batch.items()}
            found = {n: torch.full_like(x, IGNORE_INDEX) if n.endswith("labels") else x for n, x in first.items()}
        return with_student_input(found) if self.reads_student_input else found


def with_student_input(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch with the student's input in the place of the teacher's, of one width and with the same padding."""
    return {**batch, **{own: batch[name] for name, own in TEACHER_FIELDS.items() if own in batch}}
