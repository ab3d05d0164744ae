"""The data of a run as one of several teachers reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from kd_lightning.constants import IGNORE_INDEX, TEACHER_INDEX
from kd_lightning.engine.vocabulary_map import VocabularyMap
from kd_lightning.teachers.base import TokenizedData, TokenizedText
from kd_lightning.teachers.routing.share import with_student_input


class RowsOfMember:
    """The data of a run as one of the teachers reads it: rows of the others have no labels.

    Args:
        data: with the column of `RoutedTeacher`.
        number: of the teacher.
        name: of the teacher.
    """

    def __init__(self, data: TokenizedData, number: int, name: str) -> None:
        self._data, self._number, self._name = data, number, name

    def for_member(self, name: str) -> TokenizedText:
        """What one of several teachers reads."""
        return self._data.for_member(name)

    @property
    def _own(self) -> TokenizedText:
        return self._data.for_member(self._name)

    @property
    def reads_student_input(self) -> bool:
        """Whether the teacher reads what the student reads in batches in which other teachers do not."""
        return self._data.teacher_has_own_input and not self._own.teacher_has_own_input

    @property
    def splits(self) -> Sequence[str]:
        """Names of the splits that are loaded."""
        return self._data.splits

    @property
    def text_tokenizer(self) -> Any:
        """The `TextTokenizer` that turned the rows into tokens."""
        return self._own.text_tokenizer

    @property
    def teacher_text_tokenizer(self) -> Any:
        """The same for the teacher's input."""
        return self._own.teacher_text_tokenizer

    @property
    def vocabulary_map(self) -> VocabularyMap | None:
        """The tokens that student and teacher share; None: they have one tokenizer."""
        return self._own.vocabulary_map

    @property
    def teacher_has_own_input(self) -> bool:
        """Whether the teacher reads something else than the student."""
        return self._own.teacher_has_own_input

    def every_row(self, split: str) -> Iterator[dict[str, Tensor]]:
        """Batches with every row of a split; those of other teachers without labels."""
        yield from map(self._masked, self._data.every_row(split))

    def _masked(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        others = (batch[TEACHER_INDEX] != self._number).unsqueeze(1)
        masked = {name: x for name, x in batch.items() if name.endswith("labels")}
        found = {**batch, **{name: x.masked_fill(others, IGNORE_INDEX) for name, x in masked.items()}}
        return with_student_input(found) if self.reads_student_input else found

    def longest(self, role: str = "student") -> int:
        """Number of tokens of the longest row, of the teacher's own rows if its input is its own."""
        return self._own.longest(role)

    def look_ahead(self, callback: Callable[[dict[str, Tensor]], None]) -> None:
        """Call `callback(batch)` with each batch ahead, in which rows of the other teachers have no labels."""
        self._data.look_ahead(lambda batch: callback(self._masked(batch)))

    def row_locations(self, split: str, row_ids: list[int]) -> list[str]:
        """File and line of each of these rows."""
        return self._data.row_locations(split, row_ids)

    def add_index_column(self, name: str, field: str, values: Sequence[str], default: str | None = None) -> None:
        """Give every batch a column: the index of each row's field among these values."""
        self._data.add_index_column(name, field, values, default)

    def index_column(self, name: str, split: str) -> Mapping[int, int]:
        """The index of every row of a split, by `row_ids`."""
        return self._data.index_column(name, split)
