"""Losses on whole batches: which tokens count, which vocabulary, how tokens are summed."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kd_lightning.divergences import Divergence, check_divergence
from kd_lightning.engine.chunked import ChunkedPass
from kd_lightning.engine.compile import opaque_to_compile
from kd_lightning.engine.head import Head
from kd_lightning.engine.label_mask import LabelMask, check_devices, check_head, check_rows, check_top_k
from kd_lightning.engine.logit_source import GivenLogits, Model, ProjectedLogits
from kd_lightning.engine.sequence_stats import Mean, label_columns, response_gap, response_means
from kd_lightning.engine.token_loss import TokenLoss
from kd_lightning.engine.top_k import TopK, TopKLogits
from kd_lightning.label_losses import CrossEntropy, LabelLoss
from kd_lightning.schedules import Weight, check_weight

REDUCTIONS = ("token_mean", "sequence_mean", "sum", "none")
RESERVED = ("loss", "kd", "ce", "student_nll", "teacher_nll", "agreement", "gap", "label_gradient")
OWN_COLUMNS = ("labels", "weights", "student_label", "teacher_label")


@dataclass(frozen=True)
class LossParts:
    """A loss that is not yet divided, so that sums of batches and ranks can be.

    Args:
        loss: the weighted sum of the tokens' losses, 0-d, carrying the gradient; with reduction "none" the losses
            themselves, in the shape of the labels, 0 where no token is counted.
        divisor: 0-d: counted tokens for "token_mean", responses with a counted token for "sequence_mean", else 1.
        weights: [N], of each counted token: one over the counted tokens of its response for "sequence_mean", else 1.
        values: by name, [N] without gradient: "loss", "ce" (the label loss), with a teacher "kd" (the divergence as it
            enters the loss, T² included), each monitor, and what was asked for by `diagnostics`; "gap" where a schedule
            reads the responses' log-probabilities: exp(teacher) − exp(student) of the token's response.
        by_response: where a schedule reads columns, means over responses, as a sum and a number (both 0-d): "gap",
            "teacher_gap" and "student_gap" (by the column `source`), and "schedule/PATH" for each such schedule.
    """

    loss: Tensor
    divisor: Tensor
    weights: Tensor
    values: dict[str, Tensor]
    by_response: dict[str, Mean] = field(default_factory=dict)

    @property
    def mean(self) -> Tensor:
        """The divided loss; 0 where nothing is counted."""
        return self.loss / self.divisor.clamp_min(1)


class DistillationLoss(nn.Module):
    r"""\(\ell = (1 - c)\,T^2 D(p, q) + c\,L(\log q_y)\) per token, summed over the counted tokens of a batch.

    Reduces to the divergence alone at `ce_weight=0`, and to the label loss alone, without any teacher, at 1.
    Arithmetic is fp32 at least, also under autocast; gradients come in the inputs' dtype. They are taken in forward; a
    second backward over a retained graph computes everything again.

    Args:
        objective: D, any `Divergence`, the user's own included; it gets no gradient itself.
        ce_weight: c, the share of the label loss, in [0, 1], or a schedule.
        temperature: T > 0 divides both models' logits in D.
        reduction: "token_mean", "sequence_mean" (the mean over responses of their token means), "sum", or "none"
            (losses of tokens; their weights being unknown before backward, backward computes everything again, with the
            schedules as they are then).
        label_loss: L, which says itself at which temperature it reads q; None: `CrossEntropy()`.
        square_temperature: whether D is multiplied by T², so that gradients keep their size.
        monitors: divergences reported beside the loss by name, at temperature 1, without gradient.
        diagnostics: whether to report "student_nll", "teacher_nll" and "agreement" (both models' first token the same).
        chunk: rows of logits alive at a time; None: as many as are fast within a budget of bytes.
        compile: True or False to force; None: chosen by the size of the first call that takes a gradient, and kept in
            the state, so that a resumed run computes with the same bits. Without a compiler, or with an objective that
            does not compile, everything runs eagerly after one warning.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        objective: Divergence,
        ce_weight: Weight = 0.0,
        temperature: float = 1.0,
        reduction: str = "token_mean",
        label_loss: LabelLoss | None = None,
        square_temperature: bool = True,
        monitors: Mapping[str, Divergence] | None = None,
        diagnostics: bool = False,
        chunk: int | None = None,
        compile: bool | None = None,
    ) -> None:
        super().__init__()
        monitors = {} if monitors is None else monitors
        for name, part in {"objective": objective, **{f"monitors[{k!r}]": v for k, v in monitors.items()}}.items():
            check_divergence(name, part)
        check_names(monitors)
        check_weight("ce_weight", ce_weight)
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be a finite number > 0, got {temperature}")
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
        if label_loss is not None and not isinstance(label_loss, LabelLoss):
            raise ValueError(f"label_loss must be a LabelLoss or None, got {label_loss!r}")
        if chunk is not None and chunk <= 0:
            raise ValueError(f"chunk must be a number of rows > 0 or None, got {chunk}")
        self.reduction = reduction
        self.chunk = chunk
        self.token_loss = TokenLoss(
            objective,
            CrossEntropy() if label_loss is None else label_loss,
            ce_weight,
            temperature,
            square_temperature,
            monitors,
            diagnostics,
            compile,
        )

    @property
    def objective(self) -> Divergence:
        """The divergence trained on."""
        return self.token_loss.objective

    @property
    def ce_weight(self) -> Weight:
        """Share of the label loss: the number or the schedule that was given."""
        return self.token_loss.ce_weight

    @opaque_to_compile
    def from_logits(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | TopK | None,
        labels: Tensor,
        rows: Mapping[str, Tensor] | None = None,
    ) -> LossParts:
        """Loss from logits that are there already.

        Args:
            student_logits: [B, T, V] (or [T, V]), before any temperature.
            teacher_logits: the same but for a vocabulary that may be padded otherwise: both are cut to the common part
                and normalised again. `TopK`: what is known of it. None: no teacher, with `ce_weight=1`.
            labels: integers, [B, T] (or [T]: one response), aligned with the logits; −100 where not counted.
            rows: columns that objective and label loss read, [B, T], or [B] for every token of a response.

        Raises:
            ValueError: shapes, devices or labels do not fit.
        """
        check_rows("student_logits", student_logits, labels)
        vocabulary = student_logits.shape[-1]
        if isinstance(teacher_logits, TopK):
            vocabulary = check_top_k(teacher_logits, vocabulary, labels)
        elif teacher_logits is not None:
            check_rows("teacher_logits", teacher_logits, labels)
            vocabulary = min(vocabulary, teacher_logits.shape[-1])
        counted = LabelMask(labels, vocabulary)
        student = GivenLogits(_flat(student_logits), counted.index, vocabulary)
        teacher: GivenLogits | TopKLogits | None = None
        if isinstance(teacher_logits, TopK):
            teacher = _outcomes(teacher_logits, counted.index)
        elif teacher_logits is not None:
            teacher = GivenLogits(_flat(teacher_logits.detach()), counted.index, vocabulary)
        return self._parts(student, teacher, counted, rows)

    @opaque_to_compile
    def from_hidden(
        self,
        student_hidden: Tensor,
        student_head: Head | Tensor,
        teacher_hidden: Tensor | TopK | None,
        teacher_head: Head | Tensor | None,
        labels: Tensor,
        rows: Mapping[str, Tensor] | None = None,
    ) -> LossParts:
        """Loss from hidden states: the logits of all tokens are never there at once.

        The gradient is taken in the same pass. On a GPU the host waits for the counted tokens only. A
        schedule that reads the responses' log-probabilities costs a second projection of both models.

        Args:
            student_hidden: [B, T, H] (or [T, H]), after the last norm.
            student_head: a weight [V, H], or a `Head`.
            teacher_hidden: [B, T, Ht]; `TopK`: what is known of its distribution, without a head; None: no teacher,
                with `ce_weight=1`.
            teacher_head: a weight [Vt, Ht], or a `Head`.
            labels: as in `from_logits`.
            rows: as in `from_logits`.

        Raises:
            ValueError: shapes, devices or labels do not fit.
        """
        own = check_head("student", student_hidden, student_head, labels)
        vocabulary, other = own.vocabulary, None
        if isinstance(teacher_hidden, TopK):
            vocabulary = check_top_k(teacher_hidden, vocabulary, labels)
        elif teacher_hidden is not None:
            other = check_head("teacher", teacher_hidden, teacher_head, labels)
            vocabulary = min(vocabulary, other.vocabulary)
        counted = LabelMask(labels, vocabulary)
        student = ProjectedLogits(_flat(student_hidden), own, counted.index, vocabulary)
        teacher: ProjectedLogits | TopKLogits | None = None
        if isinstance(teacher_hidden, TopK):
            teacher = _outcomes(teacher_hidden, counted.index)
        elif teacher_hidden is not None and other is not None:
            teacher = ProjectedLogits(_flat(teacher_hidden.detach()), other, counted.index, vocabulary)
        return self._parts(student, teacher, counted, rows)

    def _parts(
        self, student: Model, teacher: Model | TopKLogits | None, counted: LabelMask, rows: Mapping[str, Tensor] | None
    ) -> LossParts:
        """Sum the tokens' losses as the reduction says."""
        if teacher is None and self.ce_weight != 1:
            raise ValueError(f"ce_weight must be 1 where there is no teacher, got {self.ce_weight}")
        if teacher is None and self.token_loss.monitors:
            raise ValueError(f"monitors need a teacher, and there is none: {', '.join(self.token_loss.monitors)}")
        tensors = [x for model in (student, teacher) if model for x in model.inputs if x is not None]
        check_devices(student=student.inputs, teacher=teacher.inputs if teacher else (), labels=(counted.index,))
        dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors), torch.float32)
        if taken := [name for name in rows or () if name in OWN_COLUMNS]:
            raise ValueError(f"rows must not be named {', '.join(OWN_COLUMNS)}, got {taken[0]!r}")
        columns = {name: counted.column(name, column, dtype) for name, column in (rows or {}).items()}
        if teacher is not None:
            columns |= label_columns(self.token_loss, student, teacher, counted, columns, dtype, self.chunk)
        sweep = ChunkedPass(self.token_loss, student, teacher, columns | {"labels": counted.labels}, self.chunk)

        ones = torch.ones(len(counted.index), dtype=dtype, device=counted.index.device)
        weights, divisor = ones, ones.new_ones(())
        if self.reduction == "token_mean":
            divisor = counted.lengths.sum().to(dtype)
        elif self.reduction == "sequence_mean":
            weights = ones / counted.lengths[counted.response]
            divisor = (counted.lengths > 0).sum().to(dtype)
        if self.reduction == "none":
            losses = sweep.loss(ones, summed=False)
            loss = losses.new_zeros(counted.shape.numel()).index_copy(0, counted.index, losses).view(counted.shape)
        else:
            loss = sweep.loss(weights)
        values = sweep.values
        if (wide := response_gap(columns)) is not None:
            values["gap"] = wide
        means = {} if teacher is None else response_means(self.token_loss, counted, columns)
        return LossParts(loss, divisor, weights, values, means)


def check_names(monitors: Mapping[str, Divergence]) -> None:
    """Refuse monitors whose values could not be told by their names."""
    for name in monitors:
        if name in RESERVED:
            raise ValueError(f"monitors must not be named {', '.join(RESERVED)}, got {name!r}")
        if not name or "." in name or hasattr(nn.ModuleDict, name):
            raise ValueError(f"monitors must have names without a dot, and none that torch modules use, got {name!r}")


@opaque_to_compile
def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    *,
    objective: Divergence,
    ce_weight: Weight = 0.0,
    temperature: float = 1.0,
    reduction: str = "token_mean",
    rows: Mapping[str, Tensor] | None = None,
    label_loss: LabelLoss | None = None,
    square_temperature: bool = True,
) -> Tensor:
    r"""Distillation loss from the logits of both models; 0 where no token is counted.

    Args:
        student_logits: [B, T, V] (or [T, V]), aligned with the labels: nothing is shifted here.
        teacher_logits: [B, T, Vt]; None: no teacher, with `ce_weight=1`.
        labels: integers [B, T], −100 where not counted.
        objective: any `Divergence`.
        ce_weight: share of the label loss, in [0, 1].
        temperature: divides both models' logits in the divergence, > 0.
        reduction: "token_mean", "sequence_mean", "sum", or "none" (losses in the shape of the labels).
        rows: columns that the objective or the label loss reads, [B, T] or [B].
        label_loss: the term on the label's log-probability; None: `CrossEntropy()`.
        square_temperature: whether the divergence is multiplied by T².

    Returns:
        The loss, 0-d; [B, T] with reduction "none".

    Raises:
        ValueError: an argument is out of its range, or shapes do not fit.
    """
    loss = _loss(objective, ce_weight, temperature, reduction, label_loss, square_temperature, compile=False)
    return _reduced(loss.from_logits(student_logits, teacher_logits, labels, rows), reduction)


@opaque_to_compile
def fused_distillation_loss(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Head | Tensor | None,
    labels: Tensor,
    *,
    objective: Divergence,
    ce_weight: Weight = 0.0,
    temperature: float = 1.0,
    reduction: str = "token_mean",
    rows: Mapping[str, Tensor] | None = None,
    label_loss: LabelLoss | None = None,
    square_temperature: bool = True,
    chunk: int | None = None,
    compile: bool | None = None,
) -> Tensor:
    r"""The same from hidden states and heads, without ever holding the logits of all tokens.

    Equal to `distillation_loss` of the logits, in value and gradient. The gradient is taken in forward; reduction
    "none", and a second backward over a retained graph, compute everything again.

    Args:
        student_hidden: [B, T, H] (or [T, H]), aligned with the labels.
        student_head: a weight [V, H], or a `Head`.
        teacher_hidden: [B, T, Ht]; None: no teacher, with `ce_weight=1`.
        teacher_head: a weight [Vt, Ht], or a `Head`.
        labels: integers [B, T], −100 where not counted.
        objective: any `Divergence`; the other arguments as in `distillation_loss`.
        ce_weight: share of the label loss.
        temperature: divides both models' logits in the divergence.
        reduction: how tokens are summed.
        rows: columns.
        label_loss: the term on the label's log-probability.
        square_temperature: whether the divergence is multiplied by T².
        chunk: rows of logits alive at a time; None: within a budget of bytes.
        compile: as in `DistillationLoss`; one compilation serves all calls with the same `objective` object.

    Returns:
        The loss, 0-d; [B, T] with reduction "none".

    Raises:
        ValueError: an argument is out of its range, or shapes do not fit.
    """
    settings = (objective, ce_weight, temperature, reduction, label_loss, square_temperature)
    loss = _loss(*settings, chunk=chunk, compile=compile)
    parts = loss.from_hidden(student_hidden, student_head, teacher_hidden, teacher_head, labels, rows)
    return _reduced(parts, reduction)


_loss = functools.lru_cache(maxsize=16)(DistillationLoss)  # a compiled loss is worth keeping from call to call


def _reduced(parts: LossParts, reduction: str) -> Tensor:
    return parts.loss if reduction in ("sum", "none") else parts.mean


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _outcomes(known: TopK, index: Tensor) -> TopKLogits:
    """The counted tokens of what is known of a teacher."""
    ids, log_probs = (_flat(x).index_select(0, index) for x in (known.ids, known.log_probs))
    log_tail = known.log_tail.reshape(-1).index_select(0, index)
    return TopKLogits(TopK(ids, log_probs, log_tail, known.vocabulary), known.vocabulary)
