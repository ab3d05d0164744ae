"""The logits of one model's tokens of a block, and the label's log-probabilities that losses read."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from kd_lightning.divergences import Composite, Divergence
from kd_lightning.engine.head import Transform, apply_transform
from kd_lightning.functional import FLOOR
from kd_lightning.token_weights import OF_TOKEN, TokenWeight

REST = "teacher_rest_"
"""Prefix of the columns that describe the teacher's tokens without a partner."""

REST_TOP = REST + "top"

OUTSIDE_TOP, OUTSIDE_SUM = REST + "outside_top", REST + "outside_sum"
"""Columns: the same tokens at temperature 1 where their share is measured: max x, and log Σ exp(x − max x)."""

SHARED_MASS = ("shared_mass_teacher", "shared_mass_student")
"""Values: the probability that each model gives to the tokens that both have."""

PAIRED, LABEL_PAIRED = "aligned", "label_aligned"
"""Columns: whether a token has a partner in the teacher's input, and its label one in its vocabulary besides."""


def rest_sum(t: float) -> str:
    """Name of the column with log Σ exp((x − max x) / t) over the teacher's tokens without a partner."""
    return f"{REST}{float(t)}"


class BlockLogits:
    """One model's tokens of a block: from products to log-probabilities at any temperature, and back to gradients."""

    def __init__(self, products: Tensor, label_products: Tensor, transform: Transform) -> None:
        self.scale, self.cap = transform
        self._set(apply_transform(products, transform), apply_transform(label_products, transform))

    def _set(self, logits: Tensor, label_logits: Tensor) -> None:
        self.logits, self.label_logits = logits, label_logits
        self.top = self.logits.amax(-1, keepdim=True)
        self.shifted = self.logits - self.top  # at most 0: large logits cost no precision below
        self.label_shifted = self.label_logits - self.top.squeeze(-1)
        self._log_sums: dict[float, Tensor] = {}
        self._log_probs: dict[float, Tensor] = {}

    def _log_sum(self, t: float) -> Tensor:
        if t not in self._log_sums:
            self._log_sums[t] = _sum(torch.exp(_divided(self.shifted, t))).log()
        return self._log_sums[t]

    def log_probs(self, t: float) -> Tensor:
        """Log softmax(x / t), [..., V], clamped at `FLOOR`."""
        if t not in self._log_probs:
            self._log_probs[t] = (_divided(self.shifted, t) - self._log_sum(t)).clamp_min(FLOOR)
        return self._log_probs[t]

    def label_log_prob(self, t: float) -> Tensor:
        """The label's log-probability at t, [...], not clamped."""
        return _divided(self.label_shifted, t) - self._log_sum(t).squeeze(-1)

    def top_token(self) -> Tensor:
        """The most probable token, [...]."""
        return self.shifted.argmax(-1)

    def log_share(self, top: Tensor, log_sum: Tensor) -> Tensor:
        """Log of the share that these logits have of all at temperature 1, [...], if there are others.

        Args:
            top: the largest of the other logits, [...].
            log_sum: log Σ exp(x − top) over the others, [...]; −inf: there are none.
        """
        return logsigmoid((self.top.squeeze(-1) - top) + self._log_sum(1.0).squeeze(-1) - log_sum)

    def slopes(self) -> tuple[Tensor | float, Tensor | float]:
        """Derivatives of the logits, and of the label's, with respect to the products."""
        return self._slope(self.logits), self._slope(self.label_logits)

    def _slope(self, x: Tensor) -> Tensor | float:
        return self.scale if self.cap is None else self.scale * (1 - (x / self.cap) ** 2)

    def gradient(self, u: tuple[Tensor, ...], t: float, g: Tensor, label_t: float) -> Tensor:
        """Gradient with respect to the logits, without the label's own terms, g / label_t and the second u / t.

        Args:
            u: gradients of the objective with respect to the log-probabilities at t and, if there are two, to the
                label's, [...]; empty: no objective.
            t: temperature of the objective.
            g: gradient with respect to the label's log-probability at label_t, [...].
            label_t: temperature of the label loss.
        """
        g = g.unsqueeze(-1) / label_t
        if not u:
            return -g * self.log_probs(label_t).exp()
        q = self.log_probs(t).exp()
        total = _sum(u[0]) / _sum(q) / t  # q sums to 1 only up to rounding, and u − q Σu must sum to 0
        if len(u) > 1:
            total = total + u[1].unsqueeze(-1) / t
        if label_t == t:
            return _divided(u[0], t) - q * (total + g)
        return _divided(u[0], t) - q * total - g * self.log_probs(label_t).exp()


class SharedOutcomes(BlockLogits):
    r"""A teacher of which the student has only some tokens: K shared tokens, and all others together.

    With the shared tokens' sum S and that of the others R at a temperature, a shared token has \(e^{x/t} / (S + R)\).
    The mass R / (S + R) is spread over the student's tokens without a partner in proportion to the student's own
    probabilities, without gradient: every f-divergence then equals the one on K + 1 outcomes, see `top_k`.

    Args:
        products: its logits, −inf at the student's tokens without a partner.
        label_products: those of the labels.
        others: the student's tokens without a partner, ids.
        rest: the columns of `MappedLogits.rest`.
        student: the student's logits.
    """

    def __init__(
        self, products: Tensor, label_products: Tensor, others: Tensor, rest: dict[str, Tensor], student: BlockLogits
    ) -> None:
        super().__init__(products, label_products, (1.0, None))
        self.others, self.rest, self.student = others, rest, student

    def _log_odds(self, t: float) -> Tensor:
        """Log R / S, [..., 1]: a difference of logits, so that large ones cost no precision."""
        rest = _divided(self.rest[REST_TOP].unsqueeze(-1) - self.top, t) + self.rest[rest_sum(t)].unsqueeze(-1)
        return rest - self._log_sum(t)

    def log_probs(self, t: float) -> Tensor:
        """Log-probabilities at t, [..., V], clamped at `FLOOR`."""
        if t not in self._log_probs:
            odds, log_q = self._log_odds(t), self.student.log_probs(t).index_select(-1, self.others)
            top = log_q.amax(-1, keepdim=True)
            log_rest = top + _sum(torch.exp(log_q - top)).log()
            log_p = _divided(self.shifted, t) - (self._log_sum(t) - logsigmoid(-odds))
            log_p = log_p.index_copy_(-1, self.others, log_q - (log_rest - logsigmoid(odds)))
            self._log_probs[t] = log_p.clamp_min(FLOOR)
        return self._log_probs[t]

    def label_log_prob(self, t: float) -> Tensor:
        """The log-probability of the label's partner at t, [...]; −inf where it has none."""
        return super().label_log_prob(t) + logsigmoid(-self._log_odds(t)).squeeze(-1)

    def top_token(self) -> Tensor:
        """The student's token for the most probable one, [...]; −1: it has no partner."""
        return torch.where(self.rest[REST_TOP] > self.top.squeeze(-1), -1, super().top_token())


class SharedTokens(BlockLogits):
    """A student that is compared on the tokens of both models alone; its label loss reads all tokens.

    Args:
        student: its logits of all tokens.
        others: those that the teacher has not, ids.
    """

    def __init__(self, student: BlockLogits, others: Tensor) -> None:
        self.scale, self.cap = student.scale, student.cap
        self._set(student.logits.index_fill(-1, others, -torch.inf), student.label_logits)
        self.student, self.others = student, others

    def gradient(self, u: tuple[Tensor, ...], t: float, g: Tensor, label_t: float) -> Tensor:
        """Gradient with respect to the logits of all tokens; arguments as in `BlockLogits`."""
        total = self.student.gradient((), t, g, label_t)
        if not u:
            return total
        if len(u) > 1:
            total = total + self.student.gradient((), t, u[1], t)
        inner, q = u[0].index_fill(-1, self.others, 0.0), self.log_probs(t).exp()
        return total + _divided(inner, t) - q * (_sum(inner) / _sum(q) / t)


class BlockPair:
    """The student and the teacher of a block, as divergences compare them.

    Args:
        student: its logits of all tokens.
        products: the teacher's.
        transform: that of the teacher's LM head.
        columns: extra inputs per token; those that describe the teacher are taken out.
        others: columns of tokens that the teacher has not, ids; None: it has all.

    Attributes:
        student: with all of its tokens.
        compared: the student on the tokens that are compared.
        teacher: on the same tokens.
    """

    def __init__(
        self,
        student: BlockLogits,
        products: Tensor,
        transform: Transform,
        columns: dict[str, Tensor],
        others: Tensor | None,
    ) -> None:
        label = columns.pop("teacher_label")
        rest = {name: columns.pop(name) for name in tuple(columns) if name.startswith(REST)}
        outside = rest.pop(OUTSIDE_TOP, None), rest.pop(OUTSIDE_SUM, None)
        self._paired, self._label_paired = columns.pop(PAIRED, None), columns.pop(LABEL_PAIRED, None)
        self._log_probs: dict[float, tuple[Tensor, Tensor]] = {}
        self._others, self._outside = others, outside
        self.student = self.compared = student
        if others is not None and rest:
            self.teacher: BlockLogits = SharedOutcomes(products, label, others, rest, student)
        else:
            self.teacher = BlockLogits(products, label, transform)
            if others is not None:
                self.compared = SharedTokens(student, others)

    def log_probs(self, t: float) -> tuple[Tensor, Tensor]:
        """Log p and log q at t, [..., V]; a token without a partner in the teacher's input is compared with itself."""
        if t not in self._log_probs:
            log_p, log_q = self.teacher.log_probs(t), self.compared.log_probs(t)
            if self._paired is not None:
                log_p = torch.where(self._paired.unsqueeze(-1), log_p, log_q)
            self._log_probs[t] = log_p, log_q
        return self._log_probs[t]

    def where_paired(self, values: Tensor, other: float = 0.0) -> Tensor:
        """Values [...] or [..., V] of the tokens with a partner in the teacher's input; another number elsewhere."""
        if self._paired is None:
            return values
        return torch.where(self._paired.view(-1, *(1,) * (values.ndim - 1)), values, other)

    def diagnostics(self) -> dict[str, Tensor]:
        """The teacher's NLL of the label, and whether both most probable tokens are partners; 0 if there is no pair."""
        nll = -self.teacher.label_log_prob(1.0).clamp_min(FLOOR)
        agreement = self.where_paired((self.student.top_token() == self.teacher.top_token()).to(nll.dtype))
        if self._label_paired is not None:
            nll = torch.where(self._label_paired, nll, 0.0)
        return {"teacher_nll": nll, "agreement": agreement, **self._shared_mass()}

    def _shared_mass(self) -> dict[str, Tensor]:
        """The probability that each model gives to the tokens of both at temperature 1; 0 if there is no pair."""
        top, log_sum = self._outside
        if top is None or log_sum is None:
            return {}
        teacher = self.teacher.log_share(top, log_sum).exp()
        student = torch.ones_like(teacher)
        if self._others is not None:
            log_q = self.student.log_probs(1.0).index_select(-1, self._others)
            highest = log_q.amax(-1, keepdim=True)
            log_rest = (highest + _sum(torch.exp(log_q - highest)).log()).squeeze(-1)
            student = -torch.expm1(log_rest.clamp_max(0.0))
        return {name: self.where_paired(mass) for name, mass in zip(SHARED_MASS, (teacher, student), strict=True)}


def label_columns_of(parts: Iterable[Divergence]) -> frozenset[str]:
    """Entries of the extra inputs that divergences and token weights read per token."""
    modules = (module for part in parts for module in part.modules())
    return frozenset(name for x in modules if isinstance(x, (Composite, TokenWeight)) for name in x.columns)


def with_label_log_probs(
    columns: dict[str, Tensor], reads: Iterable[str], pair: BlockPair, t: float
) -> dict[str, Tensor]:
    """The extra inputs with those log-probabilities of the label, at a temperature, that are read and not given."""
    found = dict(columns)
    for name, model in (("teacher_log_prob", pair.teacher), ("student_log_prob", pair.student)):
        if name in reads and OF_TOKEN + name not in columns:
            found[OF_TOKEN + name] = model.label_log_prob(t).clamp_min(FLOOR)
            found.setdefault(name, found[OF_TOKEN + name])  # a schedule may read the mean under this name
    return found


def _sum(x: Tensor) -> Tensor:
    """Sum over the vocabulary, kept as a dimension; in fp32 inductor adds sequentially, which costs two digits."""
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        return x.sum(-1, keepdim=True, dtype=torch.float64).to(x.dtype)
    return x.sum(-1, keepdim=True)


def _divided(x: Tensor, t: float) -> Tensor:
    return x if t == 1 else x / t
