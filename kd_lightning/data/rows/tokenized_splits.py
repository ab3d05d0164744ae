"""What a run asks of tokenized rows that are loaded: lengths, prompts, locations."""

from __future__ import annotations

import hashlib
import json
from abc import ABC
from collections.abc import Callable
from typing import Any

import lightning as L
from torch import Tensor

from kd_lightning.data.base import GenerationRow
from kd_lightning.data.conversation import Conversation
from kd_lightning.data.rows.read_by_teachers import ReadByTeachers
from kd_lightning.data.rows.teacher_input import prompts_of
from kd_lightning.data.sampler import ResumableLoader, batches_in_pass

SAMPLE = 1000  # texts of a split that enter its digest; all lengths do


class TokenizedSplits(ReadByTeachers, ABC):
    """A data module whose splits are tokenized data sets."""

    def __init__(self) -> None:
        super().__init__()
        self._ahead: list[Callable[[dict[str, Tensor]], None]] = []

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
        own = self.input_of_rows if role == "teacher" and self.teacher_has_own_input else None
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
