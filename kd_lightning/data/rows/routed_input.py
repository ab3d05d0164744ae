"""The inputs of several teachers of which one or more have a tokenizer of their own; each row names its teacher."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from kd_lightning.constants import TEACHER_POSITIONS
from kd_lightning.data.alignment.rows import ALIGNED_COLUMNS
from kd_lightning.data.rows.teacher_input import AddTeacherInput, TeacherInput
from kd_lightning.data.text.text_tokenizer import TextTokenizer

MEMBER = "teacher_member"
"""Column of a tokenized row: the number of its teacher; -1: it names none."""


@dataclasses.dataclass(frozen=True)
class RoutedInput:
    """What each of several teachers reads.

    Args:
        inputs: by teacher, in their order.
        column: field of a row with the name of its teacher.
        default: the teacher of rows that name none of them; None: there is none.
    """

    inputs: Mapping[str, TeacherInput]
    column: str
    default: str | None = None

    @property
    def columns(self) -> Mapping[str, str]:
        """Columns of a row besides those that every input has, and the type of each."""
        return {**ALIGNED_COLUMNS, MEMBER: "int32"}

    def settings(self, student: TextTokenizer) -> list[Any]:
        """Changes when the same row is read in another way."""
        inputs = [[name, own.settings(student)] for name, own in self.inputs.items()]
        return ["routed 1", self.column, self.default, inputs]

    def member(self, fields: Mapping[str, Any]) -> str | None:
        """The teacher of a row with these fields; None: it names none (`IndexColumn` refuses it)."""
        name = fields.get(self.column)
        return name if isinstance(name, str) and name in self.inputs else self.default

    def of_row(self, fields: Mapping[str, Any]) -> TeacherInput:
        """How the teacher of a row with these fields reads it; the first one of a row that names none."""
        name = self.member(fields)
        return self.inputs[next(iter(self.inputs)) if name is None else name]

    def adder(self, student: TextTokenizer) -> AddRoutedInput:
        """Adds the columns of `with_teacher_input` to a row."""
        return AddRoutedInput(self, student)


class AddRoutedInput:
    """Adds the columns of `with_teacher_input` to a tokenized row, for the teacher that it names.

    Args:
        routed: the inputs of the teachers.
        student: the tokenizer of the rows.
    """

    def __init__(self, routed: RoutedInput, student: TextTokenizer) -> None:
        self.routed = routed
        self.adders = {name: AddTeacherInput(own, student) for name, own in routed.inputs.items()}
        self.numbers = {name: number for number, name in enumerate(routed.inputs)}

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The new columns, and those of the student that change."""
        name = self.routed.member(json.loads(row["row"]))
        found = self.adders[next(iter(self.adders)) if name is None else name](row)
        if TEACHER_POSITIONS not in found:
            found |= {TEACHER_POSITIONS: _positions(found["label_mask"], found["teacher_label_mask"])}
            found |= {"spelled_otherwise": False, "no_pairs": False, "labels": 0, "aligned_labels": 0}
        return {**found, MEMBER: -1 if name is None else self.numbers[name]}


def _positions(student: list[bool], teacher: list[bool]) -> list[int]:
    """With one tokenizer, the position of the teacher's k-th label for the student's; -1 for what is no label."""
    places = (n for n, is_label in enumerate(teacher) if is_label)
    return [next(places) if is_label else -1 for is_label in student]
