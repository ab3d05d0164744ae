"""What schedules know of whole responses: how likely both models find the labels, and means of one value a response."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from kd_lightning.constants import SOURCES
from kd_lightning.divergences import Divergence
from kd_lightning.engine.chunked import ChunkedPass
from kd_lightning.engine.label_mask import LabelMask
from kd_lightning.engine.logit_source import Model
from kd_lightning.engine.token_loss import TokenLoss
from kd_lightning.engine.top_k import TopKLogits
from kd_lightning.label_losses import CrossEntropy
from kd_lightning.schedules import Schedule

LABEL_COLUMNS = ("teacher_log_prob", "student_log_prob")

Mean = tuple[Tensor, Tensor]  # a sum over responses, and how many there are: both 0-d, so that batches and ranks add up


def reading_schedules(loss: TokenLoss) -> Iterator[tuple[str, Schedule]]:
    """The schedules that read columns, each by its dotted path in the objective (or `ce_weight`)."""
    for path, part in (*loss.objective.named_modules(), ("ce_weight", loss.ce_weight)):
        if isinstance(part, Schedule) and part.columns:
            yield path, part


def label_columns(
    loss: TokenLoss,
    student: Model,
    teacher: Model | TopKLogits,
    counted: LabelMask,
    given: Mapping[str, Tensor],
    dtype: torch.dtype,
    chunk: int | None,
) -> dict[str, Tensor]:
    """Mean log-probability of each response's labels under both models, where a schedule wants it; no gradient.

    Args:
        loss: whose schedules ask.
        student: its rows.
        teacher: its rows.
        counted: which tokens count.
        given: the columns that are there already.
        dtype: of the sums.
        chunk: rows of logits alive at a time.
    """
    asking = [part for _, part in reading_schedules(loss)]
    asking += [part for part in loss.monitors.modules() if isinstance(part, Schedule)]
    wanted = {name for part in asking for name in part.columns}
    missing = [name for name in LABEL_COLUMNS if name in wanted and name not in given]
    if not missing:
        return {}
    weights = torch.ones(len(counted.index), dtype=dtype, device=counted.index.device)

    def read(model: Model, other: TopKLogits | None = None) -> dict[str, Tensor]:
        """Values of a pass without an objective; of one model alone "ce" is the labels' negative log-probability."""
        both = other is not None
        term = TokenLoss(_Zero(), CrossEntropy(), float(not both), 1.0, False, {}, diagnostics=both, compile=False)
        return ChunkedPass(term, model, other, {"labels": counted.labels}, chunk).run(weights, ())[0]

    if isinstance(teacher, TopKLogits):  # known only beside a student
        values = read(student, teacher)
        nll = {"student_log_prob": values["student_nll"], "teacher_log_prob": values["teacher_nll"]}
    else:
        models = {"student_log_prob": student, "teacher_log_prob": teacher}
        nll = {name: read(models[name])["ce"] for name in missing}
    return {name: -counted.response_mean(nll[name]) for name in missing}


def response_gap(columns: Mapping[str, Tensor]) -> Tensor | None:
    """exp(teacher) − exp(student) of the token's response; None where the columns are not there."""
    if any(name not in columns for name in LABEL_COLUMNS):
        return None
    return columns["teacher_log_prob"].exp() - columns["student_log_prob"].exp()


def response_means(loss: TokenLoss, counted: LabelMask, columns: Mapping[str, Tensor]) -> dict[str, Mean]:
    """Means over responses, whatever their length: of the gap, and of each schedule that reads columns.

    Args:
        loss: whose schedules read.
        counted: which tokens count.
        columns: by name, [N].

    Returns:
        "gap"; with a column `source` also "teacher_gap" (responses of data set and teacher) and "student_gap" (the
        student's own); and "schedule/PATH", over the responses of the schedule's side.
    """
    share = 1 / counted.lengths[counted.response]  # the tokens of a response together count once
    sides: dict[str | None, Tensor] = {None: share}
    if "source" in columns:
        by_student = columns["source"] == SOURCES.index("student")
        sides |= {"teacher": share * ~by_student, "student": share * by_student}
    found, wide = {}, response_gap(columns)
    if wide is not None:
        found = {name: (wide, weights) for name, weights in sides.items()}
    means = {"gap" if side is None else f"{side}_gap": entry for side, entry in found.items()}
    for path, schedule in reading_schedules(loss):
        value = schedule(columns).detach()
        means[f"schedule/{path}"] = (value, sides.get(schedule.side, share))
    return {name: ((value * weights).sum(), weights.sum()) for name, (value, weights) in means.items()}


class _Zero(Divergence):
    """Nothing: for a pass that only reads the labels' log-probabilities."""

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return log_q.new_zeros(log_q.shape[:-1])
