"""How the rows of a data module are read by its teacher, or by several with tokenizers of their own."""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from kd_lightning.data.alignment.responses import ResponseTranslator
from kd_lightning.data.alignment.rows import shares_of
from kd_lightning.data.alignment.two_tokenizers import (
    TeacherResponse,
    TeacherTokenizers,
    TokenizerShares,
    TwoTokenizers,
)
from kd_lightning.data.alignment.vocabulary import same_tokenizer, vocabulary_map
from kd_lightning.data.base import DistillationDataModule
from kd_lightning.data.rows.members import MemberRows
from kd_lightning.data.rows.routed_input import MEMBER, RoutedInput
from kd_lightning.data.rows.teacher_input import InputOfRows, TeacherInput
from kd_lightning.data.text.text_tokenizer import TextTokenizer
from kd_lightning.data.tokenization import load_tokenizer, masked_id, with_template
from kd_lightning.engine.vocabulary_map import VocabularyMap
from kd_lightning.models.loading import teacher_tokenizer_of


class ReadByTeachers(DistillationDataModule, ABC):
    """A data module whose teachers may have prompts, chat templates and tokenizers of their own.

    Attributes:
        teacher_input: how the teacher's input differs from the student's.
        teacher_tokenizer_source: the argument `teacher_tokenizer`; None: that of each teacher.
    """

    teacher_input = TeacherInput()
    teacher_tokenizer_source: str | PreTrainedTokenizerBase | Mapping[str, str] | None = None

    def __init__(self) -> None:
        super().__init__()
        self._rows: dict[str, Any] = {}
        self._teacher_name: str | TeacherTokenizers | None = None
        self._vocabulary_map: VocabularyMap | None = None
        self._routed: RoutedInput | None = None  # several teachers, if one has a tokenizer of its own
        self._members: dict[str, MemberRows] = {}  # empty unless there are such teachers
        self._member_rows: dict[tuple[str, str], tuple[Any, Any]] = {}  # with the rows that they were selected from
        self._compared_source: str | PreTrainedTokenizerBase | TeacherTokenizers | None = None
        self._shares: dict[str, tuple[Any, VocabularyMap, TokenizerShares]] = {}  # with what they were computed from

    def use_teacher_tokenizer_of(self, model: str | TeacherTokenizers | None) -> None:
        """Compare the tokenizer of this teacher with the student's in `setup`, unless one was given."""
        self._teacher_name = self._teacher_name if model is None else model

    def load_teacher_tokenizer(self) -> None:
        """Load the teacher's tokenizer, after the student's; the teacher reads it if it is another one.

        Raises:
            ValueError: it cannot be loaded, or the tokens of one of the two cannot be read as bytes.
        """
        source = self._tokenizer_source()
        if source is self._compared_source or source == self._compared_source:
            return
        self._compared_source, before = source, self.has_two_tokenizers
        self._vocabulary_map, self._routed, self._members = None, None, {}
        self._member_rows.clear()
        self.__dict__.pop("_translator", None)
        if isinstance(source, TeacherTokenizers):
            found = None
            self._route(source)
        else:
            given = self.teacher_tokenizer_source is not None
            found = None if source is None else self._own_tokenizer(source, given)
        if found is not None:
            self._vocabulary_map = vocabulary_map(self.tokenizer, found)
            self._notice_tokenizers("teacher", found, self._vocabulary_map)
        self.teacher_input = dataclasses.replace(self.teacher_input, tokenizer=found)
        if before or self.has_two_tokenizers:
            self._rows = {split: self.load_split(split) for split in self._rows}

    def _tokenizer_source(self) -> str | PreTrainedTokenizerBase | TeacherTokenizers | None:
        given, named = self.teacher_tokenizer_source, self._teacher_name
        if not isinstance(given, Mapping):
            return named if given is None else given
        if not isinstance(named, TeacherTokenizers):
            raise ValueError(
                f"teacher_tokenizer must be one tokenizer unless the teacher is a RoutedTeacher, got some for "
                f"{', '.join(given)}"
            )
        return named.with_given(given)

    def _own_tokenizer(
        self, source: str | PreTrainedTokenizerBase, given: bool, subject: str = "the teacher's tokenizer"
    ) -> PreTrainedTokenizerBase | None:
        """The teacher's tokenizer with its chat template; None if it is the student's, or if the teacher has none."""
        if isinstance(source, str) and not given:
            found = teacher_tokenizer_of(source)
        else:
            found = load_tokenizer(source, "teacher_tokenizer")
        if found is None or same_tokenizer(self.tokenizer, found):
            return None
        return with_template(found, self.teacher_input.chat_template, rank_zero_info, subject)

    def _route(self, source: TeacherTokenizers) -> None:
        """Let each teacher read its own tokenizer, if one of them is another one than the student's."""
        plain = dataclasses.replace(self.teacher_input, tokenizer=None)
        inputs, members = {}, {}
        for name, own in {**source.names, **source.given}.items():
            subject = f"teacher {name!r}"
            try:
                given = name in source.given
                found = None if own is None else self._own_tokenizer(own, given, f"the tokenizer of {subject}")
                inputs[name] = dataclasses.replace(plain, tokenizer=found)
                members[name] = MemberRows(self, name, inputs[name])
            except ValueError as error:
                raise ValueError(f"{subject}: {error}") from None
            if found is not None:
                self._notice_tokenizers(subject, found, members[name].vocabulary_map)
        if any(member.has_two_tokenizers for member in members.values()):
            self._routed, self._members = RoutedInput(inputs, source.column, source.default), members

    def _notice_tokenizers(self, subject: str, found: PreTrainedTokenizerBase, known: VocabularyMap | None) -> None:
        rank_zero_info(
            f"{subject} and student have two tokenizers: {0 if known is None else len(known.student_ids)} of the "
            f"student's {len(self.tokenizer)} tokens and of the teacher's {len(found)} stand for the same bytes"
        )

    def for_member(self, name: str) -> TwoTokenizers:
        """What one of several teachers reads; this object, unless their tokenizers differ."""
        return self._members.get(name, self)

    def rows_of_member(self, split: str, name: str) -> Any:
        """The tokenized rows of a split that name one of several teachers; call it only if their tokenizers differ."""
        rows, number = self._rows[split], list(self._members).index(name)
        if MEMBER not in rows.column_names:  # prompts without responses yet
            return rows.select([])
        before = self._member_rows.get((split, name))
        if before is None or before[0] is not rows:
            own = rows.select([n for n, member in enumerate(rows[MEMBER][:]) if member == number])
            self._member_rows[split, name] = before = (rows, own)
        return before[1]

    @property
    def input_of_rows(self) -> InputOfRows:
        """How the teacher of each row reads it."""
        return self.teacher_input if self._routed is None else self._routed

    @abstractmethod
    def load_split(self, split: str) -> Any:
        """Read and tokenize a split, and fill `report[split]`."""

    @property
    def has_two_tokenizers(self) -> bool:
        """Whether a teacher reads other tokens than the student; known from `setup` on."""
        return self._routed is not None or self.teacher_input.tokenizer is not None

    @property
    def several_tokenizers(self) -> bool:
        """Whether there are several teachers, and one of them has a tokenizer of its own."""
        return self._routed is not None

    @property
    def teacher_tokenizer(self) -> PreTrainedTokenizerBase:
        """The loaded tokenizer of the teacher: the student's, unless there are two; available from `setup` on.

        Raises:
            ValueError: several teachers have tokenizers of their own: ask each `for_member`.
        """
        self._check_one_teacher()
        own = self.teacher_input.tokenizer
        return self.tokenizer if own is None else own

    @property
    def teacher_pad_id(self) -> int:
        """A token id that is padding in the teacher's input, and that every teacher has."""
        if self._members:
            return min(member.teacher_pad_id for member in self._members.values())
        own = self.teacher_input.tokenizer
        return self.pad_id if own is None else masked_id(own)

    @property
    def vocabulary_map(self) -> VocabularyMap | None:
        """Which tokens of the two tokenizers are partners; None: there is one tokenizer. Known from `setup` on.

        Raises:
            ValueError: several teachers have tokenizers of their own: ask each `for_member`.
        """
        self._check_one_teacher()
        return self._vocabulary_map

    def _check_one_teacher(self) -> None:
        if self._members:
            raise ValueError(
                f"the teachers {', '.join(self._members)} have several tokenizers: ask for_member(name) for that of one"
            )

    def teacher_response(self, ids: Sequence[int], member: int = 0) -> TeacherResponse:
        """A response of the student in the teacher's tokens; call it only with two tokenizers.

        Raises:
            ValueError: there is one tokenizer.
        """
        if self._members:
            return list(self._members.values())[member].teacher_response(ids)
        return self._translator(ids) if self.has_two_tokenizers else super().teacher_response(ids)

    @functools.cached_property
    def _translator(self) -> ResponseTranslator:
        return ResponseTranslator(self.text_tokenizer, self.teacher_text_tokenizer)

    def tokenizer_shares(self, split: str = "val") -> TokenizerShares | None:
        """How much the two tokenizers share, over the rows of a loaded split; computed once for the same rows.

        None: there is one tokenizer, or the rows are prompts whose responses are generated in the run.
        """
        known = self.vocabulary_map
        return None if known is None else self.shares(split, self._rows[split], known)

    def shares(self, key: str, rows: Any, known: VocabularyMap) -> TokenizerShares | None:
        """How much two tokenizers share over tokenized rows; computed once for the same rows.

        Args:
            key: names the rows: others of the same name replace them.
            rows: None is returned if they have no responses yet.
            known: the tokens that are partners.
        """
        if "aligned_labels" not in rows.column_names:
            return None
        before = self._shares.get(key)
        if before is None or before[0] is not rows or before[1] is not known:
            self._shares[key] = before = (rows, known, shares_of(rows, known))
        return before[2]

    @property
    def teacher_has_own_input(self) -> bool:
        """Whether a teacher has a prompt, a chat template or a tokenizer of its own."""
        return self._routed is not None or self.teacher_input.is_own

    @property
    def teacher_text_tokenizer(self) -> TextTokenizer:
        """How the teacher's conversations become token ids.

        Raises:
            ValueError: several teachers have tokenizers of their own: ask each `for_member`.
        """
        self._check_one_teacher()
        return self.teacher_input.text_tokenizer(self.text_tokenizer)
