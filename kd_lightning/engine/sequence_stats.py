"""Statistics of whole responses, for schedules: log-probabilities of the labels, and means over responses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from kd_lightning.constants import SOURCES
from kd_lightning.divergences import Divergence, ReverseKL
from kd_lightning.engine.chunked import ChunkedPass
from kd_lightning.engine.label_mask import LabelMask
from kd_lightning.engine.logit_source import DifferentiableLogits, LogitSource
from kd_lightning.engine.token_loss import TokenLoss
from kd_lightning.label_losses import CrossEntropy
from kd_lightning.schedules import Schedule
from kd_lightning.token_weights import LABEL_COLUMNS, OF_TOKEN


class Mean(NamedTuple):
    """A mean that is not divided yet, so that those of batches and ranks can be added.

    Args:
        total: weighted sum, 0-d.
        weight: sum of the weights (the count, if all weights are 1), 0-d.
    """

    total: Tensor
    weight: Tensor


def schedules_with_columns(loss: TokenLoss) -> Iterator[tuple[str, Schedule]]:
    """The schedules that read extra inputs per token, by their dotted path in the objective (or `ce_weight`)."""
    for path, part in (*loss.objective.named_modules(), ("ce_weight", loss.ce_weight)):
        if isinstance(part, Schedule) and part.columns:
            yield path, part


def label_columns(
    loss: TokenLoss,
    student: DifferentiableLogits,
    teacher: LogitSource,
    mask: LabelMask,
    given: Mapping[str, Tensor],
    dtype: torch.dtype,
    chunk: int | None,
) -> dict[str, Tensor]:
    """Mean log-probability of each response's labels under both models, if a schedule reads it; no gradient.

    Args:
        loss: the loss whose schedules read them.
        student: the student's logits.
        teacher: the teacher's logits.
        mask: the tokens with a label.
        given: the extra inputs that exist already.
        dtype: of the weights.
        chunk: tokens of a chunk.
    """
    schedules = [part for _, part in schedules_with_columns(loss)]
    schedules += [part for part in loss.monitors.modules() if isinstance(part, Schedule)]
    wanted = {name for part in schedules for name in part.columns}
    missing = [name for name in LABEL_COLUMNS if name in wanted and name not in given]
    if not missing:
        return {}
    weights = torch.ones(len(mask.index), dtype=dtype, device=mask.index.device)

    def negative_log_probs(model: DifferentiableLogits, other: LogitSource | None = None) -> dict[str, Tensor]:
        """Values of a pass without an objective: "ce" of one model, or "student_nll" and "teacher_nll" of two."""
        both = other is not None
        term = TokenLoss(_Zero(), CrossEntropy(), float(not both), 1.0, False, {}, diagnostics=both, compile=False)
        return ChunkedPass(term, model, other, {"labels": mask.labels}, chunk).run(weights, ())[0]

    if missing == ["student_log_prob"]:
        nll = {"student_log_prob": negative_log_probs(student)["ce"]}
    elif isinstance(teacher, DifferentiableLogits):
        models = {"student_log_prob": student, "teacher_log_prob": teacher}
        nll = {name: negative_log_probs(models[name])["ce"] for name in missing}
    else:  # its logits can only be computed together with the student's
        values = negative_log_probs(student, teacher)
        nll = {"student_log_prob": values["student_nll"], "teacher_log_prob": values["teacher_nll"]}
    return {name: -mask.response_mean(nll[name]) for name in missing}


def given_columns(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The label's log-probabilities that the user has passed: they are used as they are, per token too."""
    return {OF_TOKEN + name: columns[name] for name in LABEL_COLUMNS if name in columns}


def baseline_columns(
    loss: TokenLoss,
    student: DifferentiableLogits,
    teacher: LogitSource,
    mask: LabelMask,
    given: Mapping[str, Tensor],
    dtype: torch.dtype,
    chunk: int | None,
) -> dict[str, Tensor]:
    """Reverse KL of the tokens if the label loss reads it and the teacher's logits depend on the labels; no gradient.

    Otherwise it is computed in the pass itself. Arguments as in `label_columns`.
    """
    fixed = teacher.without_label()
    if "reverse_kl" not in loss.label_loss.columns or "reverse_kl" in given or fixed is teacher:
        return {}
    t = loss.label_loss.temperature or loss.temperature
    weights = torch.ones(len(mask.index), dtype=dtype, device=mask.index.device)
    term = TokenLoss(ReverseKL(), CrossEntropy(), 0.0, t, False, {}, diagnostics=False, compile=False)
    return {"reverse_kl": ChunkedPass(term, student, fixed, {"labels": mask.labels}, chunk).run(weights, ())[0]["kd"]}


def response_gap(columns: Mapping[str, Tensor]) -> Tensor | None:
    """exp(teacher) − exp(student) of the token's response, [N]; None without the columns of both models."""
    if any(name not in columns for name in LABEL_COLUMNS):
        return None
    return columns["teacher_log_prob"].exp() - columns["student_log_prob"].exp()


def response_means(loss: TokenLoss, mask: LabelMask, columns: Mapping[str, Tensor]) -> dict[str, Mean]:
    """Means over responses: of the gap, and of each schedule that reads extra inputs per token.

    Args:
        loss: the loss whose schedules are averaged.
        mask: the tokens with a label.
        columns: extra inputs per token by name, [N].

    Returns:
        "gap"; with a column `source` also "teacher_gap" (responses of the dataset and the teacher) and "student_gap"
        (the student's); and "schedule/PATH", over the responses of the schedule's side.
    """
    share = 1 / mask.lengths[mask.response]  # the weights of a response's tokens sum to 1
    sides: dict[str | None, Tensor] = {None: share}
    if "source" in columns:
        by_student = columns["source"] == SOURCES.index("student")
        sides |= {"teacher": share * ~by_student, "student": share * by_student}
    means: dict[str, tuple[Tensor, Tensor]] = {}
    if (gap := response_gap(columns)) is not None:
        means = {"gap" if side is None else f"{side}_gap": (gap, weights) for side, weights in sides.items()}
    for path, schedule in schedules_with_columns(loss):
        value = schedule(columns).detach()
        means[f"schedule/{path}"] = (value, sides.get(schedule.side, share))
    return {name: Mean((value * weights).sum(), weights.sum()) for name, (value, weights) in means.items()}


class _Zero(Divergence):
    """Always 0: for a pass that only computes the labels' log-probabilities."""

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return log_q.new_zeros(log_q.shape[:-1])
