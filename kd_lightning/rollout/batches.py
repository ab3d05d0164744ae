"""Batches of generated responses: prompts of a batch, responses appended to them, rows of several ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kd_lightning.constants import IGNORE_INDEX, SOURCES, TEACHER_FIELDS, TEACHER_INDEX, TEACHER_POSITIONS
from kd_lightning.data.alignment.two_tokenizers import TeacherResponse
from kd_lightning.teachers.batches import teacher_batch

Batch = dict[str, Tensor]
Translate = Callable[[Sequence[int], int], TeacherResponse]
"""A response of the student in the tokens of its row's teacher, given the number of this teacher among several."""


def prompts(batch: Batch) -> tuple[Tensor, Tensor]:
    """The tokens before the first label of each row, padded on the left; of a row without labels its first token.

    Returns:
        Ids and attention mask, [B, T].
    """
    attended = batch["attention_mask"].bool()
    labeled = batch["labels"].ne(IGNORE_INDEX)
    labeled[:, 0] = False  # the first token is never predicted
    first = torch.where(labeled.any(1), labeled.int().argmax(1), attended.int().argmax(1) + 1)
    position = torch.arange(attended.shape[1], device=attended.device)
    mask = attended & (position < first.unsqueeze(1))
    mask, order = mask.int().sort(dim=1, stable=True)
    width = max(1, int(mask.sum(1).max()))
    return batch["input_ids"].gather(1, order)[:, -width:], mask[:, -width:].long()


def live_tokens(tokens: Tensor, ends: Tensor, labeled: Tensor) -> Tensor:
    """Which tokens are part of a response: up to and including the first end; none of rows that get no response.

    Args:
        tokens: responses [B, N].
        ends: tokens that end a response.
        labeled: rows that get a response, [B].
    """
    over = torch.isin(tokens, ends).int()
    return (over.cumsum(1) - over == 0) & labeled.unsqueeze(1)


def append_for_teacher(
    batch: Batch, generated: Batch, tokens: Tensor, live: Tensor, translate: Translate | None = None
) -> Batch:
    """The fields of the teacher's own input for generated responses; none if the batch has no such input.

    Args:
        batch: of the data.
        generated: from `append`; a response that is truncated there is cut after the same token.
        tokens: responses [B, N].
        live: which of these tokens are part of the response, [B, N].
        translate: for a teacher with another tokenizer.
    """
    if TEACHER_FIELDS["labels"] not in batch:
        return {}
    view = dict(teacher_batch(batch))
    kept = generated["labels"].ne(IGNORE_INDEX).sum(1, keepdim=True)
    live = live & (live.cumsum(1) <= kept)
    if translate is not None:
        members = generated.get(TEACHER_INDEX, generated["labels"].new_zeros(len(tokens))).tolist()
        responses = [
            translate(row[there].tolist(), member) for row, there, member in zip(tokens, live, members, strict=True)
        ]
        return _translated(prompts(view), generated["labels"], responses)
    own = append(view, prompts(view), tokens, live)
    return {TEACHER_FIELDS[name]: own[name] for name in TEACHER_FIELDS}


def _translated(prompt: tuple[Tensor, Tensor], labels: Tensor, responses: Sequence[TeacherResponse]) -> Batch:
    """The fields of a teacher with another tokenizer, and where it is read for each of the student's labels."""
    rows, positions = [], torch.full_like(labels, -1)
    for number, (ids, mask, found) in enumerate(zip(*prompt, responses, strict=True)):
        before = ids[mask.bool()].tolist()
        rows.append((before + found.ids, [IGNORE_INDEX] * len(before) + found.labels))
        read = [len(before) + position if position >= 0 else -1 for position in found.positions]
        positions[number, labels[number] != IGNORE_INDEX] = labels.new_tensor(read)
    width = max(len(ids) for ids, _ in rows)
    padded = [(ids + [0] * (width - len(ids)), own + [IGNORE_INDEX] * (width - len(own))) for ids, own in rows]
    lengths = labels.new_tensor([len(ids) for ids, _ in rows])
    return {
        TEACHER_FIELDS["input_ids"]: labels.new_tensor([ids for ids, _ in padded]),
        TEACHER_FIELDS["attention_mask"]: (torch.arange(width, device=labels.device) < lengths.unsqueeze(1)).long(),
        TEACHER_FIELDS["labels"]: labels.new_tensor([own for _, own in padded]),
        TEACHER_POSITIONS: positions,
    }


def append(
    batch: Batch,
    prompt: tuple[Tensor, Tensor],
    tokens: Tensor,
    live: Tensor,
    max_length: int | None = None,
) -> Batch:
    """Prompts and responses in the form of a batch of the data, padded on the right.

    Args:
        batch: of the data, for its columns with one value per row.
        prompt: ids and mask of the prompts, padded on the left.
        tokens: responses [B, N].
        live: which of these tokens are part of the response, [B, N].
        max_length: longest row; longer ones are truncated.
    """
    labeled = live.any(1)
    mask = torch.cat([prompt[1].bool(), live], 1)
    labels = torch.cat([torch.full_like(prompt[0], IGNORE_INDEX), tokens.masked_fill(~live, IGNORE_INDEX)], 1)
    ids = torch.cat([prompt[0], tokens], 1)
    kept, order = mask.int().sort(dim=1, descending=True, stable=True)
    width = int(kept.sum(1).max())
    width = width if max_length is None else min(width, max_length)
    kept, order = kept[:, :width], order[:, :width]
    columns = {name: column for name, column in batch.items() if column.ndim == 1}
    source = columns.get("source", torch.zeros_like(labeled, dtype=torch.long))
    return {
        **columns,
        "input_ids": ids.gather(1, order) * kept,
        "attention_mask": kept.long(),
        "labels": labels.gather(1, order).masked_fill(kept == 0, IGNORE_INDEX),
        "source": torch.where(labeled, SOURCES.index("student"), source),
    }


def gather_rows(batch: Batch, ranks: int, gather: Callable[[Tensor], Sequence[Tensor]] | None = None) -> Batch:
    """The rows of all ranks in rank order, on every rank.

    Args:
        batch: of this rank; the numbers of rows and widths may differ between ranks.
        ranks: number of processes that read different rows; neighbours that read the same rows are used once.
        gather: all-gather of tensors of equal shapes; None: of `torch.distributed`.
    """
    if ranks == 1:
        return batch
    gather = gather or _all_gather
    own = [name for name in TEACHER_FIELDS.values() if name in batch]
    sizes = torch.tensor([*batch["labels"].shape, *(batch[name].shape[1] for name in own[:1])])
    shapes = torch.stack(list(gather(sizes.to(batch["labels"].device))))
    rows, width, *own_width = (int(size) for size in shapes.amax(0))
    skip = len(shapes) // ranks
    found: Batch = {}
    for name, column in sorted(batch.items()):
        padded = pad_rows(column, rows, own_width[0] if name in own else width, name)
        parts = [part[:count] for part, count in zip(gather(padded), shapes[:, 0].tolist(), strict=True)]
        found[name] = torch.cat(parts[::skip])
    return found


def pad_rows(column: Tensor, rows: int, width: int, name: str) -> Tensor:
    """The column padded to this number of rows and, if it has tokens, to this width; padding has no labels."""
    shape = (rows, width) if column.ndim == 2 else (rows,)
    empty = {"labels": IGNORE_INDEX, TEACHER_FIELDS["labels"]: IGNORE_INDEX, TEACHER_POSITIONS: -1}.get(name, 0)
    out = column.new_full(shape, empty)
    out[tuple(slice(size) for size in column.shape)] = column
    return out


def _all_gather(tensor: Tensor) -> list[Tensor]:
    found = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(found, tensor.contiguous())
    return found
