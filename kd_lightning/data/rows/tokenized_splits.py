"""What a run asks of tokenized rows that are loaded: lengths, prompts, locations."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kd_lightning.data.alignment.responses import ResponseTranslator
from kd_lightning.data.alignment.rows import shares_of
from kd_lightning.data.alignment.two_tokenizers import TeacherResponse, TokenizerShares
from kd_lightning.data.alignment.vocabulary import same_tokenizer, vocabulary_map
from kd_lightning.data.base import DistillationDataModule, GenerationRow
from kd_lightning.data.conversation import Conversation
from kd_lightning.data.rows.teacher_input import TeacherInput, prompts_of
from kd_lightning.data.sampler import ResumableLoader, batches_in_pass
from kd_lightning.data.text.text_tokenizer import TextTokenizer
from kd_lightning.data.tokenization import load_tokenizer, masked_id, with_template
from kd_lightning.engine.vocabulary_map import VocabularyMap
from kd_lightning.models.loading import teacher_tokenizer_of

SAMPLE = 1000  # texts of a split that enter its digest; all lengths do


class TokenizedSplits(DistillationDataModule, ABC):
    """A data module whose splits are tokenized data sets.

    Attributes:
        teacher_input: how the teacher's input differs from the student's.
        teacher_tokenizer_source: the argument `teacher_tokenizer`; None: the teacher's own.
    """

    teacher_input = TeacherInput()
    teacher_tokenizer_source: str | PreTrainedTokenizerBase | None = None

    def __init__(self) -> None:
        super().__init__()
        self._rows: dict[str, Any] = {}
        self._teacher_name: str | None = None
        self._vocabulary_map: VocabularyMap | None = None
        self._compared_source: str | PreTrainedTokenizerBase | None = None
        self._shares: dict[str, tuple[Any, VocabularyMap, TokenizerShares]] = {}  # with what they were computed from
        self._ahead: list[Callable[[dict[str, Tensor]], None]] = []

    # ------------------------------------------------------------------------------------------------ two tokenizers
    def use_teacher_tokenizer_of(self, model: str | None) -> None:
        """Compare the tokenizer of this teacher with the student's in `setup`, unless one was given."""
        self._teacher_name = self._teacher_name if model is None else model

    def load_teacher_tokenizer(self) -> None:
        """Load the teacher's tokenizer, after the student's; the teacher reads it if it is another one.

        Raises:
            ValueError: it cannot be loaded, or the tokens of one of the two cannot be read as bytes.
        """
        source = self._teacher_name if self.teacher_tokenizer_source is None else self.teacher_tokenizer_source
        if source is self._compared_source or source == self._compared_source:
            return
        self._compared_source = source
        found = None if source is None else self._own_tokenizer(source)
        if found is None and not self.has_two_tokenizers:
            return
        self._vocabulary_map = None
        if found is not None:
            found = with_template(found, self.teacher_input.chat_template, rank_zero_info, "the teacher's tokenizer")
            self._vocabulary_map = vocabulary_map(self.tokenizer, found)
            shared = len(self._vocabulary_map.student_ids)
            rank_zero_info(
                f"teacher and student have two tokenizers: {shared} of the student's {len(self.tokenizer)} tokens and "
                f"of the teacher's {len(found)} stand for the same bytes"
            )
        self.teacher_input = dataclasses.replace(self.teacher_input, tokenizer=found)
        self.__dict__.pop("_translator", None)
        self._rows = {split: self.load_split(split) for split in self._rows}

    def _own_tokenizer(self, source: str | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase | None:
        """The teacher's tokenizer; None if it is the student's, or if the teacher has none."""
        if isinstance(source, str) and self.teacher_tokenizer_source is None:
            found = teacher_tokenizer_of(source)
        else:
            found = load_tokenizer(source, "teacher_tokenizer")
        return None if found is None or same_tokenizer(self.tokenizer, found) else found

    @abstractmethod
    def load_split(self, split: str) -> Any:
        """Read and tokenize a split, and fill `report[split]`."""

    @property
    def has_two_tokenizers(self) -> bool:
        """Whether the teacher reads other tokens than the student; known from `setup` on."""
        return self.teacher_input.tokenizer is not None

    @property
    def teacher_tokenizer(self) -> PreTrainedTokenizerBase:
        """The loaded tokenizer of the teacher: the student's, unless there are two; available from `setup` on."""
        own = self.teacher_input.tokenizer
        return self.tokenizer if own is None else own

    @property
    def teacher_pad_id(self) -> int:
        """The token id of padding in the teacher's input."""
        own = self.teacher_input.tokenizer
        return self.pad_id if own is None else masked_id(own)

    @property
    def vocabulary_map(self) -> VocabularyMap | None:
        """Which tokens of the two tokenizers are partners; None: there is one tokenizer. Known from `setup` on."""
        return self._vocabulary_map

    def teacher_response(self, ids: Sequence[int]) -> TeacherResponse:
        """A response of the student in the teacher's tokens; call it only with two tokenizers.

        Raises:
            ValueError: there is one tokenizer.
        """
        return self._translator(ids) if self.has_two_tokenizers else super().teacher_response(ids)

    @functools.cached_property
    def _translator(self) -> ResponseTranslator:
        return ResponseTranslator(self.text_tokenizer, self.teacher_text_tokenizer)

    def tokenizer_shares(self, split: str = "val") -> TokenizerShares | None:
        """How much the two tokenizers share, over the rows of a loaded split; computed once for the same rows.

        None: there is one tokenizer, or the rows are prompts whose responses are generated in the run.
        """
        known = self.vocabulary_map
        if known is None:
            return None
        rows = self._rows[split]
        if "aligned_labels" not in rows.column_names:
            return None
        before = self._shares.get(split)
        if before is None or before[0] is not rows or before[1] is not known:
            self._shares[split] = before = (rows, known, shares_of(rows, known))
        return before[2]

    # ---------------------------------------------------------------------------------------------------- loaded rows
    @property
    def splits(self) -> list[str]:
        """The splits that are loaded."""
        return list(self._rows)

    @property
    def document_splits(self) -> frozenset[str]:
        """The loaded splits whose rows are windows of documents."""
        return frozenset(split for split, rows in self._rows.items() if "documents" in rows.column_names)

    def description(self) -> dict[str, str]:
        """One line per loaded split that changes when its rows change."""
        return {f"{split} rows": describe_rows(rows) for split, rows in self._rows.items()}

    def look_ahead(self, callback: Callable[[dict[str, Tensor]], None]) -> None:
        """Call `callback(batch)` with each batch of a loader before the batch in front of it is used; once each."""
        if callback not in self._ahead:
            self._ahead.append(callback)

    def with_look_ahead(self, loader: ResumableLoader) -> ResumableLoader:
        """The loader; it calls the callbacks of `look_ahead`, if there are any."""
        if self._ahead:
            loader.look_ahead(self._call_ahead)
        return loader

    def _call_ahead(self, batch: dict[str, Tensor]) -> None:
        for callback in self._ahead:
            callback(batch)

    def batches_per_pass(self, trainer: L.Trainer) -> int | None:
        """Batches of a rank in one pass over the training data; None: the rows are not loaded.

        Args:
            trainer: of the run; its `limit_train_batches` counts.
        """
        return batches_in_pass(len(self._rows["train"]), self.batch_size, trainer) if "train" in self._rows else None

    @property
    def teacher_has_own_input(self) -> bool:
        """Whether the teacher has a prompt, a chat template or a tokenizer of its own."""
        return self.teacher_input.is_own

    @property
    def teacher_text_tokenizer(self) -> TextTokenizer:
        """How the teacher's conversations become token ids."""
        return self.teacher_input.text_tokenizer(self.text_tokenizer)

    def longest(self, role: str = "student") -> int:
        """Number of tokens of the longest loaded row, as a role reads it; prompts without a response do not count."""
        name = "teacher_length" if role == "teacher" and self.teacher_has_own_input else "length"
        tokenized = [rows for rows in self._rows.values() if name in rows.column_names]
        return max((max(rows[name][:], default=0) for rows in tokenized), default=0)

    def largest_id(self, role: str = "student") -> int:
        """The largest token id in the loaded rows, as a role reads them; with one tokenizer, as both do."""
        names: tuple[str, ...] = ("input_ids", "teacher_input_ids")
        if self.has_two_tokenizers:
            names = names[1:] if role == "teacher" else names[:1]
        columns = [rows[name] for rows in self._rows.values() for name in names if name in rows.column_names]
        return max((max(ids, default=0) for column in columns for ids in column), default=0)

    def generation_rows(self, split: str, first: int | None = None, role: str = "student") -> list[GenerationRow]:
        """Prompt and reference answer of the rows of a split; none for documents.

        Args:
            split: `train`, `val` or `test`; loaded.
            first: only the first rows, at most this many; None: all rows.
            role: which model is asked, "student" or "teacher", whose prompts may be its own.
        """
        if split in self.document_splits:
            return []
        own = self.teacher_input if role == "teacher" and self.teacher_has_own_input else None
        rows = self._rows[split].select_columns(["row", "conversation", "location", "row_id"])
        rows = rows if first is None else rows.select(range(min(first, len(rows))))
        return list(prompts_of(rows, self.text_tokenizer, own))

    def conversations(self, split: str, first: int) -> list[Conversation]:
        """The first rows of a split as conversations; none for documents."""
        if split in self.document_splits:
            return []
        rows = self._rows[split]
        return [Conversation.load(line) for line in rows.select(range(min(first, len(rows))))["conversation"]]

    def row_fields(self, split: str, field: str) -> dict[int, Any]:
        """A field of every row of a split by `row_ids`; None: the row does not have it."""
        rows = self._rows[split]
        return {n: json.loads(row).get(field) for n, row in zip(rows["row_id"][:], rows["row"][:], strict=True)}

    def row_locations(self, split: str, row_ids: list[int]) -> list[str]:
        """File and line of the rows with these `row_ids`, for messages; unknown ids are left out."""
        locations = dict(zip(self._rows[split]["row_id"][:], self._rows[split]["location"][:], strict=True))
        return [locations[row_id] for row_id in row_ids if row_id in locations]


def describe_rows(rows: Any) -> str:
    """A line that changes with the rows of a split: their number, and a digest of their lengths and of some texts.

    Args:
        rows: a `datasets.Dataset` with the column `row`, and `length` once it is tokenized.
    """
    lengths = rows["length"][:] if "length" in rows.column_names else []
    digest = hashlib.sha256(str(lengths).encode())
    some = rows.select(range(0, len(rows), -(-len(rows) // SAMPLE) or 1))
    for text in some["row"][:]:
        digest.update(text.encode())
    return f"{len(rows)} rows with digest {digest.hexdigest()[:12]}"
