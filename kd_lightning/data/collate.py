"""Batches of token ids: the rows a loader hands out, and how they are padded together.

A batch is a dict of tensors: `input_ids`, `attention_mask` and `labels` of shape [B, T], `row_ids` and `source` of
shape [B]. A label stands at its own token's place (the module shifts); `IGNORE_INDEX` marks what is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kd_lightning.constants import IGNORE_INDEX

FILLER = -1
"""The row number that stands for "no row": a batch made of it counts nothing."""
SIDES = {"teacher": 1, "student": 2}
"""The two sides of a pair of responses, and the number of each in the column `source`."""


class TokenRows(Dataset[list[dict[str, Any]]]):
    """Token rows, read several at a time.

    Args:
        data: a `datasets.Dataset` with the columns `input_ids`, `counted` (one truth value per token), `row_id`, and,
            where the origin of a response matters, `source`.
    """

    def __init__(self, data: Any) -> None:
        names = [name for name in ("input_ids", "counted", "row_id", "source") if name in data.column_names]
        self.data = data.select_columns(names)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, indices: int | Sequence[int]) -> list[dict[str, Any]]:
        """The rows at `indices`; `FILLER` gives a row on which nothing is counted."""
        chosen = [indices] if isinstance(indices, int) else list(indices)
        columns = self.data[[max(index, 0) for index in chosen]]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        for index, row in zip(chosen, rows, strict=True):
            if index == FILLER:
                row.update(counted=[False] * len(row["input_ids"]), row_id=FILLER)
        return rows


class PairRows(Dataset[list[dict[str, Any]]]):
    """The two halves of pairs, several pairs at a time, one half after the other.

    Args:
        halves: per side what `TokenRows` takes, row by row.
    """

    def __init__(self, halves: Mapping[str, Any]) -> None:
        self.halves = {side: TokenRows(half) for side, half in halves.items()}

    def put(self, side: str, half: Any) -> None:
        """Read one side from elsewhere, from the next pass on."""
        self.halves[side] = TokenRows(half)

    def __len__(self) -> int:
        return len(self.halves["teacher"])

    def __getitem__(self, indices: int | Sequence[int]) -> list[dict[str, Any]]:
        """Both halves of the pairs at `indices`; of `FILLER` two rows on which nothing is counted."""
        sides = [self.halves[side][indices] for side in SIDES]
        for source, rows in zip(SIDES.values(), sides, strict=True):
            for row in rows:
                row["source"] = source
        return [row for pair in zip(*sides, strict=True) for row in pair]


class Collator:
    """Rows of different length -> one batch, padded on the right.

    Args:
        pad_id: the token id that fills the padding; the attention mask there is 0 and the label `IGNORE_INDEX`.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Batch the rows; a nested list of rows (as a plain loader gives) is flattened."""
        flat: list[Mapping[str, Any]] = []
        for row in rows:
            flat.extend(row if isinstance(row, list) else [row])
        shape = (len(flat), max(len(row["input_ids"]) for row in flat))
        input_ids = torch.full(shape, self.pad_id, dtype=torch.long)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORE_INDEX, dtype=torch.long)
        for place, row in enumerate(flat):
            ids = torch.tensor(row["input_ids"], dtype=torch.long)
            counted = torch.tensor(row["counted"], dtype=torch.bool)
            input_ids[place, : len(ids)] = ids
            attention_mask[place, : len(ids)] = 1
            labels[place, : len(ids)] = torch.where(counted, ids, IGNORE_INDEX)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "row_ids": torch.tensor([row["row_id"] for row in flat], dtype=torch.long),
            "source": torch.tensor([row.get("source", 0) for row in flat], dtype=torch.long),
        }


class PromptCollator:
    """Prompts of different length -> one batch for generation, padded on the left.

    Args:
        pad_id: the token id that fills the padding.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Batch rows that have `prompt_ids` and `index` (-> `row_ids`)."""
        batch = left_pad([row["prompt_ids"] for row in rows], self.pad_id)
        batch["row_ids"] = torch.tensor([row["index"] for row in rows], dtype=torch.long)
        return batch


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """Prompts side by side, ending together: `input_ids` and `attention_mask` of shape [B, T].

    Args:
        prompts: token ids of each prompt.
        pad_id: the token id that fills the padding.
    """
    longest = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), longest), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for place, prompt in enumerate(prompts):
        if prompt:
            input_ids[place, -len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
            attention_mask[place, -len(prompt) :] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}
