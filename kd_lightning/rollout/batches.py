"""Batches of what a model writes: prompts cut out of the data's, responses put behind them, rows of several ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kd_lightning.constants import IGNORE_INDEX, SOURCES

Batch = dict[str, Tensor]


def prompts(batch: Batch) -> tuple[Tensor, Tensor]:
    """What stands before the first counted label of each row, padded on the left; a row without one: its first token.

    Returns:
        Ids and attention mask, [B, T].
    """
    attended = batch["attention_mask"].bool()
    counted = batch["labels"].ne(IGNORE_INDEX)
    counted[:, 0] = False  # nothing stands before it
    first = torch.where(counted.any(1), counted.int().argmax(1), attended.int().argmax(1) + 1)
    place = torch.arange(attended.shape[1], device=attended.device)
    mask = attended & (place < first.unsqueeze(1))
    mask, order = mask.int().sort(dim=1, stable=True)
    width = max(1, int(mask.sum(1).max()))
    return batch["input_ids"].gather(1, order)[:, -width:], mask[:, -width:].long()


def append(
    batch: Batch,
    prompt: tuple[Tensor, Tensor],
    tokens: Tensor,
    ends: Tensor,
    counted: Tensor,
    max_length: int | None = None,
) -> Batch:
    """Prompts and responses as a batch of the data would hold them, padded on the right.

    Args:
        batch: the data's, for its columns of one value per row.
        prompt: ids and mask of the prompts, padded on the left.
        tokens: responses, [B, N], anything after an end.
        ends: tokens that end a response.
        counted: rows that get a response, [B].
        max_length: longest row; what is beyond it is cut off.
    """
    over = torch.isin(tokens, ends).int()
    live = (over.cumsum(1) - over == 0) & counted.unsqueeze(1)  # up to the first end, and with it
    mask = torch.cat([prompt[1].bool(), live], 1)
    labels = torch.cat([torch.full_like(prompt[0], IGNORE_INDEX), tokens.masked_fill(~live, IGNORE_INDEX)], 1)
    ids = torch.cat([prompt[0], tokens], 1)
    kept, order = mask.int().sort(dim=1, descending=True, stable=True)
    width = int(kept.sum(1).max())
    width = width if max_length is None else min(width, max_length)
    kept, order = kept[:, :width], order[:, :width]
    columns = {name: column for name, column in batch.items() if column.ndim == 1}
    source = columns.get("source", torch.zeros_like(counted, dtype=torch.long))
    return {
        **columns,
        "input_ids": ids.gather(1, order) * kept,
        "attention_mask": kept.long(),
        "labels": labels.gather(1, order).masked_fill(kept == 0, IGNORE_INDEX),
        "source": torch.where(counted, SOURCES.index("student"), source),
    }


def gather_rows(batch: Batch, ranks: int, gather: Callable[[Tensor], Sequence[Tensor]] | None = None) -> Batch:
    """The rows of all ranks, in the order of ranks, on every rank.

    Args:
        batch: this rank's; numbers of rows and widths may differ between ranks.
        ranks: processes that read different rows; neighbours that read the same ones count once.
        gather: a tensor of every process, shapes being equal; None: by `torch.distributed`.
    """
    if ranks == 1:
        return batch
    gather = gather or _all_gather
    shape = torch.tensor(batch["labels"].shape, device=batch["labels"].device)
    shapes = torch.stack(list(gather(shape)))
    rows, width = (int(size) for size in shapes.amax(0))
    skip = len(shapes) // ranks
    found: Batch = {}
    for name, column in sorted(batch.items()):
        padded = pad_rows(column, rows, width, name)
        parts = [part[:count] for part, count in zip(gather(padded), shapes[:, 0].tolist(), strict=True)]
        found[name] = torch.cat(parts[::skip])
    return found


def pad_rows(column: Tensor, rows: int, width: int, name: str) -> Tensor:
    """The column with so many rows and, where it has tokens, so many of them; what is new counts nothing."""
    shape = (rows, width) if column.ndim == 2 else (rows,)
    out = column.new_full(shape, IGNORE_INDEX if name == "labels" else 0)
    out[tuple(slice(size) for size in column.shape)] = column
    return out


def _all_gather(tensor: Tensor) -> list[Tensor]:
    found = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(found, tensor.contiguous())
    return found
