"""Rows of a batch that one of several teachers teaches, as it reads them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kd_lightning.constants import IGNORE_INDEX, TEACHER_FIELDS


def rows_of(batch: Mapping[str, Tensor], rows: Tensor | None) -> dict[str, Tensor]:
    """These rows of a batch, all if None; the first row, without labels, if there are none.

    Args:
        batch: columns of shape [B, …].
        rows: indices [n].
    """
    if rows is None:
        return dict(batch)
    if len(rows):
        return {name: column[rows] for name, column in batch.items()}
    first = {name: column[:1] for name, column in batch.items()}
    return {name: torch.full_like(x, IGNORE_INDEX) if name.endswith("labels") else x for name, x in first.items()}


def with_student_input(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch in which the teacher reads exactly what the student reads, with the same padding."""
    return {**batch, **{own: batch[name] for name, own in TEACHER_FIELDS.items() if own in batch}}
