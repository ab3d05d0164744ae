"""Numbers and names that several packages share."""

from __future__ import annotations

SOURCES = ("dataset", "teacher", "student")
"""Origins of a response; the column `source` contains indices into this tuple."""

IGNORE_INDEX = -100
"""Label of tokens without a label, such as prompts and padding; the loss ignores them."""


TEACHER_INDEX = "teacher_index"
"""Column of a batch: the number of the teacher of each row among the teachers of a `RoutedTeacher`."""


def moves_objective(path: str) -> bool:
    """Whether a schedule at this dotted path changes the objective itself, not `ce_weight` or the responses."""
    return path != "ce_weight" and not path.startswith("responses.")
