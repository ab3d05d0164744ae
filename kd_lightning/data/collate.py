"""Batches of token ids: the data sets that loaders read, and the collators that pad rows to one length.

A batch is a dict of tensors: `input_ids`, `attention_mask` and `labels` of shape [B, T], `row_ids` and `source` of
shape [B]; if the teacher has an input of its own, also `teacher_input_ids`, `teacher_attention_mask` and
`teacher_labels` of shape [B, Tt]; if it has a tokenizer of its own, also `teacher_positions` of shape [B, T]. Labels
have the positions of their own tokens (the module shifts them); tokens without a label have `IGNORE_INDEX`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kd_lightning.constants import IGNORE_INDEX, TEACHER_FIELDS, TEACHER_POSITIONS
from kd_lightning.data.base import GenerationRow

COLUMNS = ("input_ids", "label_mask", "row_id", "source")
FILLER = -1
"""The index of "no row": a batch made of it has no labels."""
SIDES = {"teacher": 1, "student": 2}
"""The two sides of a pair of responses, and the value of each in the column `source`."""


class TokenRows(Dataset[list[dict[str, Any]]]):
    """Tokenized rows, read several at a time.

    Args:
        data: a `datasets.Dataset` with the columns `input_ids`, `label_mask` (one bool per token), `row_id`, and
            `source` if the origin of the responses matters; `teacher_input_ids` and `teacher_label_mask` if the teacher
            has an input of its own; `teacher_positions` if it has a tokenizer of its own.
    """

    def __init__(self, data: Any) -> None:
        known = (*COLUMNS, *(f"teacher_{name}" for name in COLUMNS), TEACHER_POSITIONS)
        names = [name for name in known if name in data.column_names]
        self.data = data.select_columns(names)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, indices: int | Sequence[int]) -> list[dict[str, Any]]:
        """The rows at `indices`; `FILLER` gives a row without labels."""
        chosen = [indices] if isinstance(indices, int) else list(indices)
        columns = self.data[[max(index, 0) for index in chosen]]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        for index, row in zip(chosen, rows, strict=True):
            if index == FILLER:
                masks = {name: [False] * len(row[name]) for name in row if name.endswith("label_mask")}
                row.update(masks, row_id=FILLER)
                if TEACHER_POSITIONS in row:
                    row[TEACHER_POSITIONS] = [-1] * len(row[TEACHER_POSITIONS])
        return rows


class PairRows(Dataset[list[dict[str, Any]]]):
    """Both halves of pairs, several pairs at a time, one half after the other.

    Args:
        halves: per side, the argument of `TokenRows`; rows with the same index are a pair.
    """

    def __init__(self, halves: Mapping[str, Any]) -> None:
        self.halves = {side: TokenRows(half) for side, half in halves.items()}

    def replace(self, side: str, half: Any) -> None:
        """Read one side from other rows, from the next pass on."""
        self.halves[side] = TokenRows(half)

    def __len__(self) -> int:
        return len(self.halves["teacher"])

    def __getitem__(self, indices: int | Sequence[int]) -> list[dict[str, Any]]:
        """Both halves of the pairs at `indices`; `FILLER` gives two rows without labels."""
        sides = [self.halves[side][indices] for side in SIDES]
        for source, rows in zip(SIDES.values(), sides, strict=True):
            for row in rows:
                row["source"] = source
        return [row for pair in zip(*sides, strict=True) for row in pair]


class PromptRows(Dataset[list[GenerationRow]]):
    """Prompts, read several at a time.

    Args:
        rows: at least one.
    """

    def __init__(self, rows: list[GenerationRow]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: list[int]) -> list[GenerationRow]:
        """The rows at `indices`; `FILLER` gives the first prompt with `FILLER` as its index."""
        return [{**self.rows[0], "index": n} if n == FILLER else self.rows[n] for n in indices]


class Collator:
    """Rows of different length -> one batch, padded on the right.

    Args:
        pad_id: the token id of padding, whose attention mask is 0 and whose label is `IGNORE_INDEX`.
        columns: further columns [B] by name: an integer for every row by its `row_id`; 0 for "no row".
        teacher_pad_id: the token id of padding in the teacher's input; None: the same.
    """

    def __init__(
        self,
        pad_id: int,
        columns: Mapping[str, Mapping[int, int]] | None = None,
        teacher_pad_id: int | None = None,
    ) -> None:
        self.pad_id = pad_id
        self.teacher_pad_id = pad_id if teacher_pad_id is None else teacher_pad_id
        self.columns = columns or {}

    def __call__(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Batch the rows; nested lists of rows, which a plain loader passes, are flattened."""
        flat: list[Mapping[str, Any]] = []
        for row in rows:
            flat.extend(row if isinstance(row, list) else [row])
        batch = {
            **_padded(flat, self.pad_id),
            "row_ids": torch.tensor([row["row_id"] for row in flat], dtype=torch.long),
            "source": torch.tensor([row.get("source", 0) for row in flat], dtype=torch.long),
            **{
                name: torch.tensor([indices.get(row["row_id"], 0) for row in flat], dtype=torch.long)
                for name, indices in self.columns.items()
            },
        }
        if "teacher_input_ids" in flat[0]:
            own = _padded(flat, self.teacher_pad_id, "teacher_")
            batch |= {TEACHER_FIELDS[name]: own[name] for name in TEACHER_FIELDS}
        if TEACHER_POSITIONS in flat[0]:
            positions = torch.full(batch["labels"].shape, -1, dtype=torch.long)
            for n, row in enumerate(flat):
                positions[n, : len(row[TEACHER_POSITIONS])] = torch.tensor(row[TEACHER_POSITIONS], dtype=torch.long)
            batch[TEACHER_POSITIONS] = positions
        return batch


class PromptCollator:
    """Prompts of different length -> one batch for generation, padded on the left.

    Args:
        pad_id: the token id of padding.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Batch rows that have `prompt_ids` and `index` (-> `row_ids`)."""
        batch = left_pad([row["prompt_ids"] for row in rows], self.pad_id)
        batch["row_ids"] = torch.tensor([row["index"] for row in rows], dtype=torch.long)
        return batch


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """Prompts padded on the left: `input_ids` and `attention_mask` of shape [B, T].

    Args:
        prompts: token ids of each prompt.
        pad_id: the token id of padding.
    """
    longest = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), longest), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for n, prompt in enumerate(prompts):
        if prompt:
            input_ids[n, -len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
            attention_mask[n, -len(prompt) :] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def _padded(rows: Sequence[Mapping[str, Any]], pad_id: int, prefix: str = "") -> dict[str, Tensor]:
    """Tokens, attention mask and labels of the columns with this prefix, [B, T]."""
    shape = (len(rows), max(len(row[f"{prefix}input_ids"]) for row in rows))
    input_ids = torch.full(shape, pad_id, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.long)
    for n, row in enumerate(rows):
        ids = torch.tensor(row[f"{prefix}input_ids"], dtype=torch.long)
        label_mask = torch.tensor(row[f"{prefix}label_mask"], dtype=torch.bool)
        input_ids[n, : len(ids)] = ids
        attention_mask[n, : len(ids)] = 1
        labels[n, : len(ids)] = torch.where(label_mask, ids, IGNORE_INDEX)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
