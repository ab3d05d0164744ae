r"""Divergences of student q from teacher p, one value per token.

A custom divergence is a class with one method, in this file or in your own:

    class Hellinger(Divergence):
        is_f_divergence = True  # optional: the class can then be used with a top-k teacher

        def forward(self, log_p, log_q):
            return 0.5 * ((0.5 * log_p).exp() - (0.5 * log_q).exp()).square().sum(-1)
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import cast, final

from torch import Size, Tensor, nn

from kd_lightning import functional
from kd_lightning.schedules import Schedule, Weight, check_number, check_weight, numbers, value


class Divergence(nn.Module, ABC):
    """Divergence of the student q from the teacher p: at least 0, and 0 if and only if they agree."""

    @abstractmethod
    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Divergence in nats.

        Args:
            log_p: the teacher's log-probabilities, [..., V].
            log_q: the student's log-probabilities, [..., V].

        Returns:
            One value per token, [...].
        """

    @property
    def is_f_divergence(self) -> bool:
        r"""Whether this is \(\sum_v q_v f(p_v / q_v)\) with f convex and f(1) = 0.

        Only f-divergences can be computed from a teacher's top-k log-probabilities, where they are lower bounds. The
        default is False; a custom f-divergence sets `is_f_divergence = True` in its class.
        """
        return False

    def not_f_divergence(self) -> str | None:
        """Name of the first component that is not an f-divergence of teacher and student, for error messages.

        Returns:
            None if `is_f_divergence` holds.
        """
        return None if self.is_f_divergence else type(self).__name__

    def components(self) -> dict[str, Divergence]:
        """Divergences that this one is made of, by name and without their weights.

        The training logs show their means as `component/NAME`. A component that has components of its own shows those
        too, as `component/NAME_INNER`.

        Returns:
            Empty by default.
        """
        return {}

    def extra_repr(self) -> str:
        """Constructor arguments."""
        return numbers(self)


class Composite(Divergence):
    """A divergence made of other divergences; it also receives `rows`, extra inputs per token.

    Its components are the divergences registered as its attributes. Override `components` to name others.
    """

    @abstractmethod
    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """Divergence in nats.

        Args:
            log_p: the teacher's log-probabilities, [..., V].
            log_q: the student's log-probabilities, [..., V].
            rows: extra inputs per token by name, each [...].

        Returns:
            One value per token, [...].
        """

    def components(self) -> dict[str, Divergence]:
        """Every `Divergence` registered as an attribute, under the attribute's name."""
        return {name: part for name, part in self.named_children() if isinstance(part, Divergence)}


def evaluate(divergence: Divergence, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
    """Value of any divergence, [...]; only a `Composite` receives the rows."""
    values = divergence(log_p, log_q, rows) if isinstance(divergence, Composite) else divergence(log_p, log_q)
    return one_a_token(divergence, values, log_q.shape[:-1])


def one_a_token(part: nn.Module, values: Tensor, shape: Size) -> Tensor:
    """The values, checked to be one per token.

    Raises:
        ValueError: the shape differs, for example because `forward` does not sum over the vocabulary.
    """
    if values.shape != shape:
        raise ValueError(
            f"{type(part).__name__} must return one value per token, shape {list(shape)}, got {list(values.shape)}: "
            "sum over the vocabulary in forward"
        )
    return values


def first_not_f_divergence(parts: Iterable[Divergence]) -> str | None:
    """Name of the first component that is not an f-divergence; None if all are."""
    return next((name for part in parts if (name := part.not_f_divergence()) is not None), None)


def check_divergence(name: str, divergence: object) -> None:
    """Raise a ValueError with the argument's name and value unless it is a `Divergence`."""
    if not isinstance(divergence, Divergence):
        raise ValueError(f"{name} must be a Divergence, got {divergence!r}")


@final
class ForwardKL(Divergence):
    r"""\(\mathrm{KL}(p\|q) = \sum p(\log p - \log q)\): mode-covering. Gradient q − p."""

    is_f_divergence = True

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Divergence per token."""
        return functional.forward_kl(log_p, log_q)


@final
class ReverseKL(Divergence):
    r"""\(\mathrm{KL}(q\|p) = \sum q(\log q - \log p)\): mode-seeking. Gradient q(log q − log p − KL)."""

    is_f_divergence = True

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Divergence per token."""
        return functional.reverse_kl(log_p, log_q)


@final
class SymmetricKL(Divergence):
    r"""\(w\,\mathrm{KL}(p\|q) + (1-w)\,\mathrm{KL}(q\|p)\). Reduces to forward KL at 1, reverse KL at 0.

    Args:
        forward_weight: w in [0, 1], or a schedule.

    Raises:
        ValueError: the weight is out of range.
    """

    is_f_divergence = True

    def __init__(self, forward_weight: Weight = 0.5) -> None:
        super().__init__()
        check_weight("forward_weight", forward_weight, per_row=False)
        self.forward_weight = forward_weight

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Divergence per token."""
        w = value(self.forward_weight)
        return w * functional.forward_kl(log_p, log_q) + (1 - w) * functional.reverse_kl(log_p, log_q)

    def components(self) -> dict[str, Divergence]:
        """Forward and reverse KL."""
        return {"forward_kl": ForwardKL(), "reverse_kl": ReverseKL()}


@final
class GeneralizedJSD(Divergence):
    r"""\(\beta\,\mathrm{KL}(p\|m) + (1-\beta)\,\mathrm{KL}(q\|m)\), \(m = \beta p + (1-\beta)q\); bounded.

    Symmetric at 0.5. It vanishes at both ends: \(D/\beta\) → forward KL as β → 0, \(D/(1-\beta)\) → reverse KL as
    β → 1.

    Args:
        beta: in (0, 1), or a schedule.

    Raises:
        ValueError: beta is not in (0, 1).

    Reference: Agarwal et al., arXiv 2306.13649.
    """

    is_f_divergence = True

    def __init__(self, beta: Weight = 0.5) -> None:
        super().__init__()
        hint = " (it is 0 at both ends: what other libraries call beta=0 is ForwardKL, beta=1 ReverseKL)"
        check_weight("beta", beta, ends="()", hint=hint, per_row=False)
        self.beta = beta

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Divergence per token."""
        return functional.generalized_jsd(log_p, log_q, value(self.beta))


@final
class TotalVariation(Divergence):
    r"""\(\frac12\sum|p-q|\), in [0, 1]."""

    is_f_divergence = True

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Divergence per token."""
        return functional.total_variation(log_p, log_q)


@final
class AdaptiveKL(Divergence):
    r"""AKL: \(w\,\mathrm{KL}(p\|q) + (1-w)\,\mathrm{KL}(q\|p)\), w the top tokens' share of \(\sum|p-q|\).

    The top of the distribution is the set of the teacher's most probable tokens with mass μ. Forward KL fits the top
    first and reverse KL the tail, so that each is weighted by the gap in its region. w has no gradient.

    Args:
        mu: mass of the top, in (0, 1].
        head_rule: "covering": the smallest set of top tokens with mass ≥ μ; "official": as in the authors' code, the
            token that crosses μ belongs to the tail.

    Raises:
        ValueError: an argument is out of range.

    Reference: Wu et al., arXiv 2404.02657.
    """

    def __init__(self, mu: float = 0.5, head_rule: str = "covering") -> None:
        super().__init__()
        check_number("mu", mu, 0, 1, "(]")
        if head_rule not in ("covering", "official"):
            raise ValueError(f"head_rule must be 'covering' or 'official', got {head_rule!r}")
        self.mu = mu
        self.head_rule = head_rule

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Divergence per token."""
        return functional.adaptive_kl(log_p, log_q, self.mu, self.head_rule)

    def components(self) -> dict[str, Divergence]:
        """Forward and reverse KL."""
        return {"forward_kl": ForwardKL(), "reverse_kl": ReverseKL()}


@final
class AlphaDivergence(Divergence):
    r"""\(\frac{1}{\alpha(1-\alpha)}\bigl(1 - \sum p^\alpha q^{1-\alpha}\bigr)\). Reduces to FKL at 1, RKL at 0.

    Args:
        alpha: any finite number; outside [0, 1] peaked distributions may overflow fp32.

    Raises:
        ValueError: alpha is not finite.
    """

    is_f_divergence = True

    def __init__(self, alpha: float) -> None:
        super().__init__()
        check_number("alpha", alpha)
        self.alpha = alpha

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Divergence per token."""
        return functional.alpha_beta(log_p, log_q, self.alpha, 1 - self.alpha)


@final
class AlphaBeta(Divergence):
    r"""α-β-divergence (ABKD): a smaller α emphasizes hard tokens, a larger β confident ones.

    \(-\frac{1}{\alpha\beta}\sum\bigl[p^\alpha q^\beta - \frac{\alpha}{\alpha+\beta}p^{\alpha+\beta} -
    \frac{\beta}{\alpha+\beta}q^{\alpha+\beta}\bigr]\), extended by continuity where a factor is 0. Reduces to FKL at
    (1, 0), RKL at (0, 1), the α-divergence where α + β = 1. An f-divergence only where α + β = 1.

    Args:
        alpha: any finite number.
        beta: any finite number; negative exponents may overflow fp32 on peaked distributions.

    Raises:
        ValueError: an argument is not finite.

    Reference: Wang et al., arXiv 2505.04560.
    """

    def __init__(self, alpha: float, beta: float) -> None:
        super().__init__()
        check_number("alpha", alpha)
        check_number("beta", beta)
        self.alpha = alpha
        self.beta = beta

    @property
    def is_f_divergence(self) -> bool:
        """Whether α + β = 1."""
        return self.alpha + self.beta == 1

    def not_f_divergence(self) -> str | None:
        """The class with its two exponents; None where α + β = 1."""
        return None if self.is_f_divergence else f"AlphaBeta(alpha={self.alpha}, beta={self.beta})"

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Divergence per token."""
        return functional.alpha_beta(log_p, log_q, self.alpha, self.beta)


@final
class WeightedSum(Composite):
    r"""\(\sum_i w_i D_i\).

    Args:
        divergences: the terms, at least one.
        weights: one weight ≥ 0, or one schedule, per term.

    Raises:
        ValueError: the two lists differ in length, or an entry is out of range.
    """

    def __init__(self, divergences: list[Divergence], weights: list[Weight]) -> None:
        super().__init__()
        if not divergences or len(divergences) != len(weights):
            raise ValueError(
                "divergences and weights must have the same length, at least 1, got "
                f"{len(divergences)} and {len(weights)}"
            )
        for i, (divergence, weight) in enumerate(zip(divergences, weights, strict=True)):
            check_divergence(f"divergences[{i}]", divergence)
            if not isinstance(weight, Schedule):
                check_number(f"weights[{i}]", weight, 0)
        self.parts = nn.ModuleList(divergences)
        self.weights = weights
        self.schedules = nn.ModuleDict({str(i): w for i, w in enumerate(weights) if isinstance(w, Schedule)})

    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """Divergence per token."""
        terms = [
            value(weight, rows) * evaluate(part, log_p, log_q, rows)
            for part, weight in zip(self._terms(), self.weights, strict=True)
        ]
        return sum(terms[1:], terms[0])

    @property
    def is_f_divergence(self) -> bool:
        """Whether every term is an f-divergence."""
        return self.not_f_divergence() is None

    def not_f_divergence(self) -> str | None:
        """Name of the first term that is not an f-divergence."""
        return first_not_f_divergence(self._terms())

    def components(self) -> dict[str, Divergence]:
        """Every term under the name of its class, with its index where several are of one class."""
        classes = [type(term) for term in self._terms()]
        names = [re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.__name__).lower() for name in classes]
        indexed = [f"{name}_{i}" if classes.count(classes[i]) > 1 else name for i, name in enumerate(names)]
        return dict(zip(indexed, self._terms(), strict=True))

    def _terms(self) -> list[Divergence]:
        return cast("list[Divergence]", list(self.parts))
