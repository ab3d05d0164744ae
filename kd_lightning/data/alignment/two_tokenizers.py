"""What a data module offers about the teacher's tokenizer, if that is another one than the student's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

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


class TwoTokenizers(ABC):
    """The part of `DistillationDataModule` about tokenizers; by default the teacher reads the student's tokens."""

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The loaded tokenizer of the student; available from `setup` on."""

    @property
    @abstractmethod
    def pad_id(self) -> int:
        """The token id of padding; the attention mask, not the id, marks what is padding."""

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

    def use_teacher_tokenizer_of(self, model: str | None) -> None:  # noqa: B027 - by default there is one tokenizer
        """Compare the tokenizer of this teacher with the student's in `setup`, unless one was given.

        Args:
            model: folder, hub name or `asset:` name of the teacher; None changes nothing.
        """

    def teacher_response(self, ids: Sequence[int]) -> TeacherResponse:
        """A response of the student in the teacher's tokens; call it only with two tokenizers.

        Args:
            ids: the response's tokens, without padding, up to and including its end if it has one.

        Raises:
            ValueError: there is one tokenizer.
        """
        raise ValueError(f"{type(self).__name__} has one tokenizer: the teacher reads the student's tokens")

    def tokenizer_shares(self, split: str = "val") -> TokenizerShares | None:
        """How much the two tokenizers share, over the rows of a loaded split.

        None: there is one tokenizer, or the rows are prompts whose responses are generated in the run.
        """
        return None

    def load_tokenizers(self) -> bool:
        """Load the tokenizers of student and teacher without any rows, as `setup` does.

        Returns:
            Whether the student's tokenizer is known; by default nothing is loaded, and it is not.
        """
        return False
