"""Checks of what a user passes to a loss; every error says what was expected and what was given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from kd_lightning.engine.head import Head
from kd_lightning.engine.top_k import TopK
from kd_lightning.token_weights import LABEL_COLUMNS, OF_TOKEN

# Names that the engine uses itself.
INTERNAL_COLUMNS = ("labels", "weights", "student_label", "teacher_label", *(OF_TOKEN + name for name in LABEL_COLUMNS))


def check_tokens(name: str, x: Tensor, labels: Tensor) -> None:
    """Raise a ValueError unless x has one floating-point vector per label."""
    if labels.ndim == 0:
        raise ValueError("labels must be [B, T] or [T], got a single number")
    if x.shape[:-1] != labels.shape:
        raise ValueError(
            f"{name} must have the labels' shape {list(labels.shape)} and one more dimension, got {list(x.shape)}"
        )
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {x.dtype}")


def check_top_k(known: TopK, vocabulary: int, labels: Tensor) -> int:
    """The vocabulary of a loss on k + 1 outcomes; a ValueError unless the student's vocabulary contains it."""
    if known.shape != labels.shape:
        raise ValueError(
            f"the teacher's top k must have the labels' shape {list(labels.shape)}, got {list(known.shape)}"
        )
    if known.vocabulary > vocabulary:
        raise ValueError(
            f"the teacher's top k refer to {known.vocabulary} tokens and the student has {vocabulary}: cache them "
            "again with this student, or cache hidden states instead"
        )
    return known.vocabulary


def check_head(role: str, hidden: Tensor, head: Head | Tensor | None, labels: Tensor) -> Head:
    """The LM head as a `Head`; a ValueError unless it and the labels match the hidden states."""
    check_tokens(f"{role}_hidden", hidden, labels)
    if head is None:
        raise ValueError(f"{role}_head must be given with {role}_hidden")
    head = head if isinstance(head, Head) else Head(head)
    if hidden.shape[-1] != head.weight.shape[1]:
        raise ValueError(
            f"{role}_hidden has width {hidden.shape[-1]} (shape {list(hidden.shape)}) and {role}_head expects "
            f"{head.weight.shape[1]} (shape {list(head.weight.shape)})"
        )
    return head


def check_devices(**roles: Iterable[Tensor | None]) -> None:
    """Raise a ValueError with the device of each role unless all tensors are on one device."""
    devices = {role: sorted({str(x.device) for x in tensors if x is not None}) for role, tensors in roles.items()}
    if len({device for names in devices.values() for device in names}) > 1:
        given = ", ".join(f"{role} on {' and '.join(names)}" for role, names in devices.items() if names)
        raise ValueError(f"student, teacher and labels must be on one device, got {given}")


def check_columns(rows: Mapping[str, Tensor]) -> None:
    """Raise a ValueError if an extra input per token has a name that the engine uses itself."""
    if taken := [name for name in rows if name in INTERNAL_COLUMNS]:
        raise ValueError(f"rows must not be named {', '.join(INTERNAL_COLUMNS)}, got {taken[0]!r}")
