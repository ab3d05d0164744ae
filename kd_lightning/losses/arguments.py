"""Checks of the arguments of a distillation loss: every error names the argument, its range and what was given."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from kd_lightning.divergences import Composite, Divergence, check_divergence, described
from kd_lightning.engine.block_logits import LABEL_PAIRED, PAIRED, SHARED_MASS
from kd_lightning.engine.token_loss import TokenLoss
from kd_lightning.engine.validation import check_count, check_temperature
from kd_lightning.label_losses import LabelLoss
from kd_lightning.schedules import Schedule, check_flag, check_weight
from kd_lightning.token_weights import TokenWeight

REDUCTIONS = ("token_mean", "sequence_mean", "sum", "none")
RESERVED = (
    "loss",
    "kd",
    "ce",
    "student_nll",
    "teacher_nll",
    "agreement",
    "acceptance",
    "accepted_length",
    "gap",
    "label_gradient",
    PAIRED,
    LABEL_PAIRED,
    *SHARED_MASS,
)


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


def check_aligned(loss: TokenLoss, rows: Mapping[str, Tensor], merged: bool) -> None:
    """Check that a loss can be computed where tokens of the student may have no partner in the teacher.

    Args:
        loss: the loss of a token.
        rows: extra inputs per token.
        merged: whether tokens of the two vocabularies without a partner are merged into one outcome.

    Raises:
        ValueError: a part reads the teacher's log-probability of the label, or changes if tokens are merged.
    """
    for part in loss.modules():
        columns = part.columns if isinstance(part, (Composite, TokenWeight, Schedule, LabelLoss)) else ()
        for name in ("teacher_log_prob", "reverse_kl"):
            if name in columns and name not in rows:
                raise ValueError(
                    f"{type(part).__name__} cannot be computed with a vocabulary_map or teacher_positions: it reads "
                    f"{name!r} of the label, which may have no partner in the teacher's vocabulary or input: choose "
                    "another, or pass this column in rows"
                )
    for part in (loss.objective, *loss.monitors.values()):
        assert isinstance(part, Divergence)
        changed = part.not_mergeable() if merged else None
        if changed is not None:
            raise ValueError(
                f"{changed} cannot be computed where both vocabularies have tokens without a partner, or from a top k "
                "in another vocabulary: only f-divergences and their mixtures can (forward and reverse KL, JSD, "
                "total variation, α-divergence, TAID, AMiD over one of them, own classes with is_f_divergence = True)"
            )
