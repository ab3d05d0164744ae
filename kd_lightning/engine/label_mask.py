"""Which tokens of a batch count, and whether tensors fit each other; everything a user may get wrong is said here."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kd_lightning.constants import IGNORE_INDEX
from kd_lightning.engine.head import Head
from kd_lightning.engine.top_k import TopK

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class LabelMask:
    """The counted tokens of a batch: where they stand, their labels, the response each belongs to.

    Args:
        labels: integers [B, T], or [T] for one response; −100 where not counted.
        vocabulary: how many ids both models share.

    Raises:
        ValueError: labels are no integers, or a counted one lies outside the vocabulary.
    """

    def __init__(self, labels: Tensor, vocabulary: int) -> None:
        if labels.dtype not in INTEGERS:
            raise ValueError(f"labels must be integers, got {labels.dtype}")
        self.shape = labels.shape
        table = labels.reshape(labels.shape[:-1].numel(), labels.shape[-1]).long()  # uint8 holds no −100
        mask = table != IGNORE_INDEX
        self.lengths = mask.sum(1)
        outside = mask & ((table < 0) | (table >= vocabulary))
        count, wrong = torch.stack((self.lengths.sum(), outside.sum())).tolist()  # on a GPU the host waits here, once
        self.index = torch.nonzero_static(mask.reshape(-1), size=count).squeeze(1)
        self.response = self.index // table.shape[1] if table.shape[1] else self.index
        self.labels = table.reshape(-1).index_select(0, self.index)
        if wrong:
            label = int(table[outside][0])
            raise ValueError(
                f"labels must be −100 or in [0, {vocabulary}), the vocabulary that both models share, got {label}"
            )

    def column(self, name: str, column: Tensor, dtype: torch.dtype) -> Tensor:
        """The column's entries of the counted tokens, numbers in the dtype given."""
        column = column.detach().to(dtype) if column.is_floating_point() else column
        if column.shape == self.shape:
            return column.reshape(-1).index_select(0, self.index)
        if column.shape in (self.shape[:-1], self.lengths.shape):
            return column.reshape(-1).index_select(0, self.response)
        raise ValueError(
            f"rows[{name!r}] must have the labels' shape {list(self.shape)}, or {list(self.lengths.shape)} for one "
            f"value per response, got {list(column.shape)}"
        )

    def response_mean(self, values: Tensor) -> Tensor:
        """Mean over the tokens of each response, given to each of its tokens."""
        sums = values.new_zeros(len(self.lengths)).index_add_(0, self.response, values)
        return (sums / self.lengths)[self.response]


def check_rows(name: str, x: Tensor, labels: Tensor) -> None:
    """Raise a ValueError unless x has one row per label."""
    if labels.ndim == 0:
        raise ValueError("labels must be [B, T] or [T], got a single number")
    if x.shape[:-1] != labels.shape:
        raise ValueError(
            f"{name} must have the labels' shape {list(labels.shape)} and one dimension more, got {list(x.shape)}"
        )
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {x.dtype}")


def check_top_k(known: TopK, vocabulary: int, labels: Tensor) -> int:
    """The vocabulary of a loss on k + 1 outcomes; a ValueError unless the student knows all of it."""
    if known.shape != labels.shape:
        raise ValueError(
            f"the teacher's top k must have the labels' shape {list(labels.shape)}, got {list(known.shape)}"
        )
    if known.vocabulary > vocabulary:
        raise ValueError(
            f"the teacher's top k are of {known.vocabulary} tokens and the student knows {vocabulary}: keep them with "
            "this student, or keep hidden states instead"
        )
    return known.vocabulary


def check_head(role: str, hidden: Tensor, head: Head | Tensor | None, labels: Tensor) -> Head:
    """The head as a `Head`; a ValueError unless it reads these hidden states, and they have one row per label."""
    check_rows(f"{role}_hidden", hidden, labels)
    if head is None:
        raise ValueError(f"{role}_head must be given with {role}_hidden")
    head = head if isinstance(head, Head) else Head(head)
    if hidden.shape[-1] != head.weight.shape[1]:
        raise ValueError(
            f"{role}_hidden has width {hidden.shape[-1]} (shape {list(hidden.shape)}) and {role}_head reads "
            f"{head.weight.shape[1]} (shape {list(head.weight.shape)})"
        )
    return head


def check_devices(**roles: Iterable[Tensor | None]) -> None:
    """Raise a ValueError that says what lies where, unless all lies on one device."""
    places = {role: sorted({str(x.device) for x in tensors if x is not None}) for role, tensors in roles.items()}
    if len({device for devices in places.values() for device in devices}) > 1:
        found = ", ".join(f"{role} on {' and '.join(devices)}" for role, devices in places.items() if devices)
        raise ValueError(f"student, teacher and labels must be on one device, got {found}")
