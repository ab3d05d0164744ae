"""Checks of what a user passes to a loss; every error says what was expected and what was given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from kd_lightning.divergences import ChunkLikelihood, described
from kd_lightning.engine.block_logits import LABEL_PAIRED, PAIRED, REST
from kd_lightning.engine.head import FLOATS, Head
from kd_lightning.engine.top_k import TopK
from kd_lightning.schedules import check_number
from kd_lightning.token_weights import LABEL_COLUMNS, OF_TOKEN

# Names that the engine uses itself.
INTERNAL_COLUMNS = (
    *("labels", "weights", "student_label", "teacher_label", PAIRED, LABEL_PAIRED),
    *(OF_TOKEN + name for name in LABEL_COLUMNS),
    *ChunkLikelihood.columns,
)

TEMPERATURES = (1e-3, 1e3)  # further out, fp32 loses the differences between the logits, or T² outgrows it


def check_temperature(name: str, temperature: object) -> None:
    """Raise a ValueError unless it is a number in `TEMPERATURES`."""
    check_number(name, temperature, *TEMPERATURES)


def check_count(name: str, count: object, allowed: str = "") -> None:
    """Raise a ValueError unless it is an integer, at least 1."""
    if not isinstance(count, int) or isinstance(count, bool):
        raise ValueError(f"{name} must be {allowed or 'an integer, at least 1'}, got {described(count)}")
    if count < 1:
        raise ValueError(f"{name} must be {allowed or 'at least 1'}, got {count}")


def check_tensor(name: str, x: object) -> None:
    """Raise a ValueError unless x is a dense tensor."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(x).__name__} {described(x)}")
    if x.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got one of layout {x.layout}: call to_dense()")


def check_tokens(name: str, x: Tensor, labels: Tensor) -> None:
    """Raise a ValueError unless x has one floating-point vector per label."""
    check_tensor("labels", labels)
    check_tensor(name, x)
    if labels.ndim == 0:
        raise ValueError("labels must be [B, T] or [T], got a single number")
    if x.shape[:-1] != labels.shape:
        raise ValueError(
            f"{name} must have the labels' shape {list(labels.shape)} and one more dimension, got {list(x.shape)}"
        )
    if x.dtype not in FLOATS:
        raise ValueError(f"{name} must be floating point ({', '.join(map(str, FLOATS))}), got {x.dtype}")


def check_top_k(known: TopK, vocabulary: int | None, labels: Tensor) -> None:
    """Raise a ValueError unless there is one top k per label, in the student's vocabulary (None: in any)."""
    check_tensor("labels", labels)
    if known.shape != labels.shape:
        raise ValueError(
            f"the teacher's top k must have the labels' shape {list(labels.shape)}, got {list(known.shape)}"
        )
    if vocabulary is not None and known.vocabulary > vocabulary:
        raise ValueError(
            f"the teacher's top k refer to {known.vocabulary} tokens and the student has {vocabulary}: cache them "
            "again with this student, or cache hidden states instead"
        )


def check_head(role: str, hidden: Tensor, head: Head | Tensor | None, labels: Tensor) -> Head:
    """The LM head as a `Head`; a ValueError unless it and the labels match the hidden states."""
    check_tokens(f"{role}_hidden", hidden, labels)
    if head is None:
        raise ValueError(f"{role}_head must be given with {role}_hidden")
    if isinstance(head, nn.Module):
        raise ValueError(
            f"{role}_head must be a Head or its weight, got the module {type(head).__name__}: pass {role}_head.weight, "
            "or the Head that body_and_head returns, which also knows bias, scale and soft-cap"
        )
    if not isinstance(head, (Head, Tensor)):
        raise ValueError(f"{role}_head must be a Head or its weight, a torch.Tensor, got {described(head)}")
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


def check_columns(rows: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
    """The extra inputs per token; a ValueError unless they are tensors, with names that the engine does not use."""
    if rows is None:
        return {}
    if not isinstance(rows, Mapping):
        raise ValueError(f"rows must be a mapping of names to tensors, got {described(rows)}")
    for name, values in rows.items():
        if not isinstance(name, str):
            raise ValueError(f"rows must have names that are strings, got {described(name)}")
        check_tensor(f"rows[{name!r}]", values)
        if values.is_complex() or values.is_quantized:
            raise ValueError(f"rows[{name!r}] must be floating point, integer or bool, got {values.dtype}")
    if taken := [name for name in rows if name in INTERNAL_COLUMNS or name.startswith(REST)]:
        raise ValueError(f"rows must not be named {', '.join(INTERNAL_COLUMNS)}, got {taken[0]!r}")
    return rows
