"""What a data module offers about the teacher's tokenizer, if that is another one than the student's."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from kd_lightning.data.text.text_tokenizer import TextTokenizer
from kd_lightning.engine.vocabulary_map import VocabularyMap


@dataclass(frozen=True)
class TeacherResponse:
    """A response in the teacher's tokens, aligned with the student's.

    Args:
        ids: the teacher's tokens, the end of the turn included if the student's response has it.
        labels: the same, with `IGNORE_INDEX` for tokens that count in no chunk.
        positions: for each token t of the student's response, the index s in `ids` such that both have read the same
            bytes of the response before t and s; -1: there is none.
    """

    ids: list[int]
    labels: list[int]
    positions: list[int]


@dataclass(frozen=True)
class TokenizerShares:
    """How much of the two vocabularies, and of the labels of a split, the two tokenizers share.

    Args:
        student_tokens: share of the student's tokens that have a partner.
        teacher_tokens: share of the teacher's tokens that have a partner.
        student_labels: share of the student's labels whose token has a partner.
        teacher_labels: share of the teacher's labels whose token has a partner.
        aligned_labels: share of the student's labels that are compared with a position of the teacher.
    """

    student_tokens: float
    teacher_tokens: float
    student_labels: float
    teacher_labels: float
    aligned_labels: float


@dataclass(frozen=True)
class TeacherTokenizers:
    """Where the tokenizers of several teachers are, and how a row names its teacher.

    Args:
        names: folder, hub name or `asset:` name of each teacher, in their order; None: it has no tokenizer of its own.
        column: field of a row with the name of its teacher.
        default: the teacher of rows that name none of them; None: there is none.
        given: tokenizers that are used instead.
    """

    names: Mapping[str, str | None]
    column: str
    default: str | None = None
    given: Mapping[str, str | PreTrainedTokenizerBase] = field(default_factory=dict)

    def with_given(self, given: Mapping[str, str | PreTrainedTokenizerBase]) -> TeacherTokenizers:
        """The same with some tokenizers given.

        Raises:
            ValueError: one is for a teacher that does not exist.
        """
        if unknown := [name for name in given if name not in self.names]:
            raise ValueError(
                f"teacher_tokenizer must have names of teachers ({', '.join(self.names)}) as keys, got {unknown[0]!r}"
            )
        return dataclasses.replace(self, given=given)


class TwoTokenizers(ABC):
    """What the models of a run read, and in which tokens; by default the teacher reads the student's tokens.

    A `DistillationDataModule` is one for all of its rows, and `for_member` gives one for those of each teacher.
    """

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The loaded tokenizer of the student; available from `setup` on."""

    @property
    @abstractmethod
    def pad_id(self) -> int:
        """The token id of padding; the attention mask, not the id, marks what is padding."""

    @property
    @abstractmethod
    def splits(self) -> list[str]:
        """The splits that are loaded."""

    @property
    @abstractmethod
    def text_tokenizer(self) -> TextTokenizer:
        """How rows become token ids: tokenizer, chat template and maximum length."""

    @property
    def teacher_text_tokenizer(self) -> TextTokenizer:
        """The same for the teacher, which may have a chat template of its own."""
        return self.text_tokenizer

    @property
    def teacher_has_own_input(self) -> bool:
        """Whether the teacher reads something else than the student (`teacher_input_ids` of a batch)."""
        return False

    @abstractmethod
    def longest(self, role: str = "student") -> int:
        """Number of tokens of the longest loaded row, as the "student" or the "teacher" reads it.

        Prompts without a response are not included.
        """

    @abstractmethod
    def largest_id(self, role: str = "student") -> int:
        """The largest token id in the loaded rows, as the "student" or the "teacher" reads them."""

    def for_member(self, name: str) -> TwoTokenizers:
        """What one of several teachers reads; this object, unless their tokenizers differ.

        Args:
            name: of the teacher in the `RoutedTeacher`; "": there is one.
        """
        return self

    @property
    def has_two_tokenizers(self) -> bool:
        """Whether the teacher reads other tokens than the student; known from `setup` on."""
        return False

    @property
    def teacher_tokenizer(self) -> PreTrainedTokenizerBase:
        """The loaded tokenizer of the teacher: the student's, unless there are two; available from `setup` on."""
        return self.tokenizer

    def tokenizer_of(self, role: str) -> PreTrainedTokenizerBase:
        """The tokenizer of a role, "student" or "teacher"."""
        return self.teacher_tokenizer if role == "teacher" else self.tokenizer

    @property
    def teacher_pad_id(self) -> int:
        """The token id of padding in the teacher's input."""
        return self.pad_id

    @property
    def vocabulary_map(self) -> VocabularyMap | None:
        """Which tokens of the two tokenizers are partners; None: there is one tokenizer. Known from `setup` on."""
        return None

    def use_teacher_tokenizer_of(  # noqa: B027 - by default there is one tokenizer
        self, model: str | TeacherTokenizers | None
    ) -> None:
        """Compare the tokenizer of this teacher with the student's in `setup`, unless one was given.

        Args:
            model: folder, hub name or `asset:` name of the teacher, or those of several; None changes nothing.
        """

    def teacher_response(self, ids: Sequence[int], member: int = 0) -> TeacherResponse:
        """A response of the student in the teacher's tokens; call it only with two tokenizers.

        Args:
            ids: the response's tokens, without padding, up to and including its end if it has one.
            member: number of the row's teacher, if there are several (`TEACHER_INDEX` of a batch).

        Raises:
            ValueError: there is one tokenizer.
        """
        raise ValueError(f"{type(self).__name__} has one tokenizer: the teacher reads the student's tokens")

    def tokenizer_shares(self, split: str = "val") -> TokenizerShares | None:
        """How much the two tokenizers share, over the rows of a loaded split.

        None: there is one tokenizer, or the rows are prompts whose responses are generated in the run.

        Raises:
            ValueError: several teachers have tokenizers of their own: ask each `for_member`.
        """
        return None

    def load_tokenizers(self) -> bool:
        """Load the tokenizers of student and teacher without any rows, as `setup` does.

        Returns:
            Whether the student's tokenizer is known; by default nothing is loaded, and it is not.
        """
        return False
