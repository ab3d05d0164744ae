"""Numbers and names that several packages share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

SOURCES = ("dataset", "teacher", "student")
"""Origins of a response; the column `source` contains indices into this tuple."""

IGNORE_INDEX = -100
"""Label of tokens without a label, such as prompts and padding; the loss ignores them."""

TEACHER_FIELDS = {
    "input_ids": "teacher_input_ids",
    "attention_mask": "teacher_attention_mask",
    "labels": "teacher_labels",
}
"""Fields of a batch in which the teacher has an input of its own, by the student's field that they replace."""

Field = TypeVar("Field")


def teacher_view(batch: Mapping[str, Field]) -> Mapping[str, Field]:
    """The batch as the teacher reads it: with the fields of its own input, if there are any, under the usual names."""
    return {**batch, **{name: batch[own] for name, own in TEACHER_FIELDS.items() if own in batch}}


TEACHER_POSITIONS = "teacher_positions"
"""Column [B, T] of a batch of two tokenizers: for a label of the student at t, the position s of the teacher such
that both have read the same bytes of the response before t and s; -1: there is none."""

TEACHER_INDEX = "teacher_index"
"""Column of a batch: the number of the teacher of each row among the teachers of a `RoutedTeacher`."""


def moves_objective(path: str) -> bool:
    """Whether a schedule at this dotted path changes the objective itself, not `ce_weight` or the responses."""
    return path != "ce_weight" and not path.startswith("responses.")
