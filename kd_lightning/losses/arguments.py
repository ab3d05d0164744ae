"""Checks of the arguments of a distillation loss: every error names the argument, its range and what was given."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from kd_lightning.divergences import Divergence, check_divergence, described
from kd_lightning.engine.validation import check_count, check_temperature
from kd_lightning.label_losses import LabelLoss
from kd_lightning.schedules import check_flag, check_weight

REDUCTIONS = ("token_mean", "sequence_mean", "sum", "none")
RESERVED = ("loss", "kd", "ce", "student_nll", "teacher_nll", "agreement", "gap", "label_gradient")


def check_loss_arguments(
    objective: object,
    ce_weight: object,
    temperature: object,
    reduction: object,
    label_loss: object,
    square_temperature: object,
    chunk: object,
    compile: object,
) -> None:
    """Check the arguments of `DistillationLoss` but for the monitors.

    Raises:
        ValueError: one is of another type, or out of range.
    """
    check_fixed("objective", check_divergence("objective", objective))
    check_weight("ce_weight", ce_weight)
    check_temperature("temperature", temperature)
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {described(reduction)}")
    if label_loss is not None:
        if not isinstance(label_loss, LabelLoss):
            raise ValueError(f"label_loss must be a LabelLoss or None, got {described(label_loss)}")
        check_fixed("label_loss", label_loss)
        if label_loss.temperature is not None:
            check_temperature(f"temperature of {type(label_loss).__name__}", label_loss.temperature)
    check_flag("square_temperature", square_temperature)
    if chunk is not None:
        check_count("chunk", chunk, "a number of tokens > 0 or None")
    if compile is not None:
        check_flag("compile", compile, "True, False or None")


def check_fixed(name: str, part: nn.Module) -> None:
    """Raise a ValueError if a part of the loss has parameters to train: the loss gives them no gradient."""
    for path, parameter in part.named_parameters():
        if parameter.requires_grad:
            raise ValueError(
                f"{name} must have no parameter to train, as the loss gives it no gradient, got {path!r} of "
                f"{type(part).__name__}: make it a buffer (register_buffer) or a Schedule, or call "
                "requires_grad_(False)"
            )


def check_monitors(monitors: object) -> dict[str, Divergence]:
    """The monitors as a dictionary.

    Raises:
        ValueError: they are not a mapping of divergences, or a name is one that no value of the loss can have.
    """
    if monitors is None:
        return {}
    if not isinstance(monitors, Mapping):
        raise ValueError(f"monitors must be a mapping of names to divergences, got {described(monitors)}")
    for name, part in monitors.items():
        if not isinstance(name, str):
            raise ValueError(f"monitors must have names that are strings, got {described(name)}")
        if name in RESERVED:
            raise ValueError(f"monitors must not be named {', '.join(RESERVED)}, got {name!r}")
        if not name or "." in name or hasattr(nn.ModuleDict, name):
            raise ValueError(
                f"monitors must have names that are not empty, without a dot and no ModuleDict attribute, got {name!r}"
            )
        check_divergence(f"monitors[{name!r}]", part)
    return dict(monitors)
