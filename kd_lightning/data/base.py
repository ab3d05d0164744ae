"""The contract of this package's data modules, and how to find the data module of a run."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypedDict, runtime_checkable

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from kd_lightning.data.alignment.two_tokenizers import TwoTokenizers
from kd_lightning.data.conversation import Conversation
from kd_lightning.data.row_report import IndexColumn
from kd_lightning.data.text.text_tokenizer import TextTokenizer


class GenerationRow(TypedDict):
    """What is needed to let a model answer a row and to compare its response with the reference.

    Attributes:
        prompt_ids: token ids of the prompt, with the generation prompt.
        prompt: the same as text.
        answer: the last answer of the row, the reference.
        row: the original fields.
        index: number of the row in its files, `row_ids` of a batch.
    """

    prompt_ids: list[int]
    prompt: str
    answer: str
    row: dict[str, Any]
    index: int


class DistillationDataModule(TwoTokenizers, L.LightningDataModule, ABC):
    """Everything that the module, the callbacks, the teachers and the commands need of a data module.

    A `LightningDataModule` of any other class works with `DistillationModule` as well, as long as its batches have
    `input_ids`, `attention_mask` and `labels`. What needs more than batches (teacher caches, generation metrics,
    `preflight`, …) needs a data module of this class.

    Attributes:
        batch_size: rows (or pairs) per batch on each rank.
        max_length: longest sequence in tokens.
        packing: whether the models read rows without padding.
        batch_tokens: tokens per batch on each rank, at most; None: no limit.
        sources: the files, folders and names of the splits `train`, `val` and `test`; an empty list: no such split.
        chat_template_kwargs: variables for the chat template.
        report: per split, counts of the rows that were read, kept and dropped.
        accepts_responses: whether `replace_responses` takes responses that a model generates during the run.
        responses_can_change: whether it takes them before every pass over the training data; False: only once, before
            the first step.
    """

    accepts_responses: ClassVar[bool] = False
    responses_can_change: ClassVar[bool] = False

    batch_size: int
    max_length: int
    packing: bool = False
    batch_tokens: int | None = None
    sources: dict[str, list[str]]
    chat_template_kwargs: dict[str, Any] | None = None
    report: dict[str, dict[str, int]]

    def __init__(self) -> None:
        super().__init__()
        self.report = {}
        self._before_pass: list[Callable[[int], None]] = []
        self._index_columns: dict[str, tuple[IndexColumn, dict[str, dict[int, int]]]] = {}

    # ------------------------------------------------------------------------------------------------------ tokenizer
    @property
    @abstractmethod
    def text_tokenizer(self) -> TextTokenizer:
        """How rows become token ids: tokenizer, chat template and maximum length."""

    @property
    def teacher_text_tokenizer(self) -> TextTokenizer:
        """The same for the teacher, which may have a chat template of its own."""
        return self.text_tokenizer

    @abstractmethod
    def use_tokenizer_of(self, model: str | None) -> None:
        """Load the tokenizer of this model in `setup`, unless the data module was given a tokenizer.

        Args:
            model: folder, hub name or `asset:` name; None changes nothing.
        """

    # ---------------------------------------------------------------------------------------------------- checkpoints
    def state_dict(self) -> dict[str, Any]:
        """The date that the chat template writes, if it does: a resumed run trains on the same rows."""
        date = self.text_tokenizer.written_date if self.splits else None
        return {} if date is None else {"date": date}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the date."""
        if "date" in state_dict:
            self.use_date(state_dict["date"])

    def use_date(self, date: str) -> None:
        """Render the rows with this date, YYYY-MM-DD; a data module without such rows changes nothing."""

    # ---------------------------------------------------------------------------------------------------- loaded rows
    @property
    @abstractmethod
    def splits(self) -> list[str]:
        """The splits that are loaded."""

    @property
    def rows_per_batch(self) -> int:
        """Sequences of `max_length` tokens in a batch on each rank."""
        return self.rows_within(self.batch_tokens)

    def rows_within(self, tokens: int | None) -> int:
        """Rows (or pairs) of `max_length` tokens in a batch with a limit of tokens; at least one."""
        return self.batch_size if tokens is None else min(self.batch_size, max(1, tokens // self.max_length))

    def batches_per_pass(self, trainer: L.Trainer) -> int | None:
        """Batches of a rank in one pass over the training data; None: not known before the rows are read.

        Rows whose responses are generated in the run are counted as well, without generating them.

        Args:
            trainer: of the run; its `limit_train_batches` counts.
        """
        return None

    @abstractmethod
    def description(self) -> dict[str, str]:
        """One line per loaded split that changes when its rows change."""

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

    @property
    def document_splits(self) -> frozenset[str]:
        """The loaded splits whose rows are windows of documents: every token has a label, and there are no prompts."""
        return frozenset()

    # ----------------------------------------------------------------------------------------------------------- rows
    @abstractmethod
    def every_row(self, split: str) -> DataLoader[dict[str, Tensor]]:
        """Every row of a split once over all ranks, with the same number of batches on each rank."""

    @abstractmethod
    def generation_rows(self, split: str, first: int | None = None, role: str = "student") -> list[GenerationRow]:
        """Prompt and reference answer of the rows of a split; none for documents.

        Args:
            split: `train`, `val` or `test`; loaded.
            first: only the first rows, at most this many; None: all rows.
            role: which model is asked, "student" or "teacher", whose prompts may be its own.
        """

    @abstractmethod
    def conversations(self, split: str, first: int) -> list[Conversation]:
        """The first rows of a split as conversations; none for documents."""

    def row_fields(self, split: str, field: str) -> dict[int, Any]:
        """A field of every row of a split by `row_ids`; None: the row does not have it."""
        return {row["index"]: row["row"].get(field) for row in self.generation_rows(split)}

    def add_index_column(self, name: str, field: str, values: Sequence[str], default: str | None = None) -> None:
        """Give every batch from now on a column [B]: the index of each row's field among these values.

        Args:
            name: of the column.
            field: of the rows; a text.
            values: the known texts.
            default: the value of rows without the field, or with another value; None: such rows are refused.

        Raises:
            ValueError: a loaded row has no field or another value, and there is no default; with file and line.
        """
        column = IndexColumn(name, field, tuple(values), default)
        if name not in self._index_columns or self._index_columns[name][0] != column:
            self._index_columns[name] = (column, {})
        for split in self.splits:
            self.index_column(name, split)

    def index_column(self, name: str, split: str) -> Mapping[int, int]:
        """The index of every row of a split, by `row_ids`, in a column of `add_index_column`."""
        column, tables = self._index_columns[name]
        if split not in tables:
            locate = functools.partial(self.row_locations, split)
            tables[split] = column.indices(self.row_fields(split, column.field), locate)
        return tables[split]

    def index_columns(self, split: str) -> dict[str, Mapping[int, int]]:
        """All columns of `add_index_column` for the batches of a split."""
        return {name: self.index_column(name, split) for name in self._index_columns}

    @abstractmethod
    def row_locations(self, split: str, row_ids: list[int]) -> list[str]:
        """File and line of the rows with these `row_ids`, for messages; unknown ids are left out."""

    # ------------------------------------------------------------------------------------------------------ responses
    def missing_responses(self, side: str = "student") -> list[int]:
        """The `row_ids` of the training rows that have no response of this side yet; by default none.

        Args:
            side: "student" or "teacher".
        """
        return []

    def replace_responses(self, responses: Mapping[int, str], side: str = "student") -> None:
        """Train on these responses from the next pass on; call it on every rank with the same responses.

        Args:
            responses: texts by `row_ids` of a batch (`index` of `generation_rows`).
            side: "student" or "teacher".

        Raises:
            ValueError: this data module accepts no responses.
        """
        raise ValueError(
            f"{type(self).__name__} accepts no generated responses: use PromptDataModule or ContrastiveDataModule"
        )

    def add_before_pass(self, callback: Callable[[int], None]) -> None:
        """Call `callback(pass_number)` before the training rows of a pass are read, numbered from 0.

        The callback may call `replace_responses`. It is called on every rank, after the models are ready, and not when
        a run resumes in the middle of a pass. Several callbacks are called in the order in which they were added.
        """
        self._before_pass.append(callback)

    def look_ahead(self, callback: Callable[[dict[str, Tensor]], None]) -> None:
        """Call `callback(batch)` with each batch of the loaders before the batch in front of it is used.

        By default it is never called: what is prepared ahead is then prepared when it is needed.
        """

    def remove_before_pass(self, callback: Callable[[int], None]) -> None:
        """Remove a callback of `add_before_pass`, at the end of its run: the data module may be used by another one."""
        if callback in self._before_pass:
            self._before_pass.remove(callback)

    def run_before_pass(self, number: int) -> None:
        """Call the callbacks of `add_before_pass`; a data module that accepts responses does so before each pass."""
        for callback in self._before_pass:
            callback(number)


@runtime_checkable
class NamesTokenizer(Protocol):
    """A Lightning module that names the tokenizer of its model."""

    @property
    def tokenizer_name(self) -> str | None:
        """Folder or hub name; None if the model was passed as an object without one."""


@runtime_checkable
class NamesTeacherTokenizer(Protocol):
    """A Lightning module that names the tokenizer of its teacher."""

    @property
    def teacher_tokenizer_name(self) -> str | None:
        """Folder or hub name; None without a teacher, and if it was passed as an object without one."""


@runtime_checkable
class HasTokenizer(Protocol):
    """A data module, of any class, that has a tokenizer."""

    tokenizer: PreTrainedTokenizerBase | None


@runtime_checkable
class HasMaxLength(Protocol):
    """A data module, of any class, that limits its sequences."""

    max_length: int | None


def datamodule_of(trainer: L.Trainer | None) -> DistillationDataModule | None:
    """The data module of a run; None without one, and for a data module of any other class."""
    datamodule = _attached(trainer)
    return datamodule if isinstance(datamodule, DistillationDataModule) else None


def tokenizer_of(trainer: L.Trainer | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the run's data module, of any class; None if it has none."""
    datamodule = _attached(trainer)
    return datamodule.tokenizer if isinstance(datamodule, HasTokenizer) else None


def max_length_of(trainer: L.Trainer | None) -> int | None:
    """The `max_length` of the run's data module, of any class; None if it has none."""
    datamodule = _attached(trainer)
    return datamodule.max_length if isinstance(datamodule, HasMaxLength) else None


def _attached(trainer: L.Trainer | None) -> object:
    # Lightning's data connector sets the attribute in Trainer.__init__, so the class does not declare it
    return None if trainer is None else trainer.datamodule  # type: ignore[attr-defined]
