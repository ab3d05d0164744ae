"""The rows of a data module as one of several teachers reads them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from kd_lightning.data.alignment.responses import ResponseTranslator
from kd_lightning.data.alignment.two_tokenizers import TeacherResponse, TokenizerShares, TwoTokenizers
from kd_lightning.data.alignment.vocabulary import vocabulary_map
from kd_lightning.data.rows.teacher_input import TeacherInput
from kd_lightning.data.text.text_tokenizer import TextTokenizer
from kd_lightning.data.tokenization import masked_id
from kd_lightning.engine.vocabulary_map import VocabularyMap


class RoutedRows(Protocol):
    """A data module whose rows name their teachers."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's."""

    @property
    def pad_id(self) -> int:
        """The token id of padding."""

    @property
    def text_tokenizer(self) -> TextTokenizer:
        """How the student's rows become token ids."""

    @property
    def splits(self) -> list[str]:
        """The splits that are loaded."""

    def rows_of_member(self, split: str, name: str) -> Any:
        """The tokenized rows of a split that name a teacher."""

    def shares(self, key: str, rows: Any, known: VocabularyMap) -> TokenizerShares | None:
        """How much two tokenizers share over tokenized rows."""


class MemberRows(TwoTokenizers):
    """The rows that one of several teachers teaches, as this teacher reads them.

    Args:
        data: the data module.
        name: of the teacher.
        own: what it reads.

    Raises:
        ValueError: the tokens of one of the two tokenizers cannot be read as bytes.
    """

    def __init__(self, data: RoutedRows, name: str, own: TeacherInput) -> None:
        self._data, self.name, self.own = data, name, own
        self._map = None if own.tokenizer is None else vocabulary_map(data.tokenizer, own.tokenizer)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's."""
        return self._data.tokenizer

    @property
    def pad_id(self) -> int:
        """The token id of padding in the student's input."""
        return self._data.pad_id

    @property
    def splits(self) -> list[str]:
        """The loaded splits with rows of this teacher."""
        return [split for split in self._data.splits if len(self._data.rows_of_member(split, self.name))]

    @property
    def text_tokenizer(self) -> TextTokenizer:
        """How the student's rows become token ids."""
        return self._data.text_tokenizer

    @property
    def teacher_text_tokenizer(self) -> TextTokenizer:
        """How this teacher's conversations become token ids."""
        return self.own.text_tokenizer(self.text_tokenizer)

    @property
    def has_two_tokenizers(self) -> bool:
        """Whether this teacher reads other tokens than the student."""
        return self.own.tokenizer is not None

    @property
    def teacher_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of this teacher."""
        return self.tokenizer if self.own.tokenizer is None else self.own.tokenizer

    @property
    def teacher_pad_id(self) -> int:
        """A token id that is padding in this teacher's input."""
        return self.pad_id if self.own.tokenizer is None else masked_id(self.own.tokenizer)

    @property
    def teacher_has_own_input(self) -> bool:
        """Whether this teacher reads something else than the student."""
        return self.own.is_own

    @property
    def vocabulary_map(self) -> VocabularyMap | None:
        """Which tokens of the two tokenizers are partners; None: there is one tokenizer."""
        return self._map

    def longest(self, role: str = "student") -> int:
        """Number of tokens of the longest row of this teacher, as a role reads it."""
        return max(
            (max(x, default=0) for x in self._columns("teacher_length" if role == "teacher" else "length")), default=0
        )

    def largest_id(self, role: str = "student") -> int:
        """The largest token id in the rows of this teacher, as a role reads them."""
        columns = self._columns("teacher_input_ids" if role == "teacher" else "input_ids")
        return max((max(ids, default=0) for column in columns for ids in column), default=0)

    def _columns(self, name: str) -> list[Any]:
        rows = [self._data.rows_of_member(split, self.name) for split in self._data.splits]
        return [own[name][:] for own in rows if name in own.column_names]

    def teacher_response(self, ids: Sequence[int], member: int = 0) -> TeacherResponse:
        """A response of the student in the tokens of this teacher, which may be the same."""
        if self._map is None:
            return TeacherResponse(list(ids), list(ids), list(range(len(ids))))
        return self._translator(ids)

    @functools.cached_property
    def _translator(self) -> ResponseTranslator:
        return ResponseTranslator(self.text_tokenizer, self.teacher_text_tokenizer)

    def tokenizer_shares(self, split: str = "val") -> TokenizerShares | None:
        """How much the two tokenizers share, over the rows of this teacher.

        None: there is one tokenizer, or the rows are prompts whose responses are generated in the run.
        """
        if self._map is None:
            return None
        return self._data.shares(f"{split}/{self.name}", self._data.rows_of_member(split, self.name), self._map)
