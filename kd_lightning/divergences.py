r"""Divergences of student q from teacher p, one value per token.

A new one is a class with one method of two lines, here or in the user's own file:

    class Hellinger(Divergence):
        def forward(self, log_p, log_q):
            return 0.5 * ((0.5 * log_p).exp() - (0.5 * log_q).exp()).square().sum(-1)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, final

from torch import Size, Tensor, nn

from kd_lightning import functional
from kd_lightning.schedules import Schedule, Weight, check_number, check_weight, numbers, value


class Divergence(nn.Module, ABC):
    """How far q is from p: at least 0, and 0 iff they agree."""

    @abstractmethod
    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Divergence in nats.

        Args:
            log_p: teacher's log-probabilities, [..., V].
            log_q: student's, [..., V].

        Returns:
            [...].
        """

    def extra_repr(self) -> str:
        """The numbers it was made with."""
        return numbers(self)


class Composite(Divergence):
    """A divergence made of others; it also receives `rows`, columns with one value per row."""

    @abstractmethod
    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """Divergence in nats.

        Args:
            log_p: teacher's log-probabilities, [..., V].
            log_q: student's, [..., V].
            rows: columns of shape [...].

        Returns:
            [...].
        """


def evaluate(divergence: Divergence, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
    """Value of any divergence, [...]; only a `Composite` sees the rows."""
    values = divergence(log_p, log_q, rows) if isinstance(divergence, Composite) else divergence(log_p, log_q)
    return one_a_token(divergence, values, log_q.shape[:-1])


def one_a_token(part: nn.Module, values: Tensor, shape: Size) -> Tensor:
    """The values; a ValueError unless there is one per token: a sum over the vocabulary may have been forgotten."""
    if values.shape != shape:
        raise ValueError(
            f"{type(part).__name__} must give one value per token, {list(shape)}, got {list(values.shape)}"
        )
    return values


def check_divergence(name: str, divergence: Any) -> None:
    """Refuse what is no divergence.

    Raises:
        ValueError: naming argument and value.
    """
    if not isinstance(divergence, Divergence):
        raise ValueError(f"{name} must be a Divergence, got {divergence!r}")


@final
class ForwardKL(Divergence):
    r"""\(\mathrm{KL}(p\|q) = \sum p(\log p - \log q)\): q must cover p. Gradient q − p."""

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Divergence per token."""
        return functional.forward_kl(log_p, log_q)


@final
class ReverseKL(Divergence):
    r"""\(\mathrm{KL}(q\|p) = \sum q(\log q - \log p)\): q must stay where p is. Gradient q(log q − log p − KL)."""

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Divergence per token."""
        return functional.reverse_kl(log_p, log_q)


@final
class SymmetricKL(Divergence):
    r"""\(w\,\mathrm{KL}(p\|q) + (1-w)\,\mathrm{KL}(q\|p)\). Reduces to forward KL at 1, reverse KL at 0.

    Args:
        forward_weight: w in [0, 1], or a schedule.
    """

    def __init__(self, forward_weight: Weight = 0.5) -> None:
        super().__init__()
        check_weight("forward_weight", forward_weight, per_row=False)
        self.forward_weight = forward_weight

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Divergence per token."""
        w = value(self.forward_weight)
        return w * functional.forward_kl(log_p, log_q) + (1 - w) * functional.reverse_kl(log_p, log_q)


@final
class GeneralizedJSD(Divergence):
    r"""\(\beta\,\mathrm{KL}(p\|m) + (1-\beta)\,\mathrm{KL}(q\|m)\), \(m = \beta p + (1-\beta)q\); bounded.

    Symmetric at 0.5. Towards its ends it vanishes: \(D/\beta\) → forward KL as β → 0, \(D/(1-\beta)\) → reverse KL as
    β → 1.

    Args:
        beta: in (0, 1), or a schedule.

    Raises:
        ValueError: beta is at an end or beyond.

    Reference: Agarwal et al., arXiv 2306.13649.
    """

    def __init__(self, beta: Weight = 0.5) -> None:
        super().__init__()
        hint = " (it vanishes at the ends: what others call beta 0 is ForwardKL, beta 1 ReverseKL)"
        check_weight("beta", beta, ends="()", hint=hint, per_row=False)
        self.beta = beta

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Divergence per token."""
        return functional.generalized_jsd(log_p, log_q, value(self.beta))


@final
class TotalVariation(Divergence):
    r"""\(\frac12\sum|p-q|\), in [0, 1]."""

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Divergence per token."""
        return functional.total_variation(log_p, log_q)


@final
class AdaptiveKL(Divergence):
    r"""AKL: \(w\,\mathrm{KL}(p\|q) + (1-w)\,\mathrm{KL}(q\|p)\), w the share of \(\sum|p-q|\) in the teacher's head.

    Forward KL fits the head first, reverse KL the tail: each gets the weight of its part. w has no gradient.

    Args:
        mu: mass of the head, in (0, 1].
        head_rule: "covering": the smallest top set with mass ≥ μ; "official": as the authors' code, the token that
            crosses μ belongs to the tail.

    Raises:
        ValueError: an argument is out of its range.

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


@final
class AlphaDivergence(Divergence):
    r"""\(\frac{1}{\alpha(1-\alpha)}\bigl(1 - \sum p^\alpha q^{1-\alpha}\bigr)\). Reduces to FKL at 1, RKL at 0.

    Args:
        alpha: any finite number; outside [0, 1] peaked distributions may exceed fp32.

    Raises:
        ValueError: alpha is not finite.
    """

    def __init__(self, alpha: float) -> None:
        super().__init__()
        check_number("alpha", alpha)
        self.alpha = alpha

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Divergence per token."""
        return functional.alpha_beta(log_p, log_q, self.alpha, 1 - self.alpha)


@final
class AlphaBeta(Divergence):
    r"""α-β-divergence (ABKD): smaller α concentrates on hard tokens, larger β on confident ones.

    \(-\frac{1}{\alpha\beta}\sum\bigl[p^\alpha q^\beta - \frac{\alpha}{\alpha+\beta}p^{\alpha+\beta} -
    \frac{\beta}{\alpha+\beta}q^{\alpha+\beta}\bigr]\), and by continuity where a factor is 0. Reduces to FKL at (1, 0),
    RKL at (0, 1), the α-divergence where α + β = 1.

    Args:
        alpha: any finite number.
        beta: any finite number; negative exponents may exceed fp32 on peaked distributions.

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

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Divergence per token."""
        return functional.alpha_beta(log_p, log_q, self.alpha, self.beta)


@final
class WeightedSum(Composite):
    r"""\(\sum_i w_i D_i\).

    Args:
        divergences: the parts, at least one.
        weights: one weight ≥ 0, or schedule, for each.

    Raises:
        ValueError: the two lists differ in length, or an entry is out of its range.
    """

    def __init__(self, divergences: list[Divergence], weights: list[Weight]) -> None:
        super().__init__()
        if not divergences or len(divergences) != len(weights):
            raise ValueError(
                f"divergences and weights must be equally many, at least one, got {len(divergences)} and {len(weights)}"
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
            value(weight, rows) * evaluate(part, log_p, log_q, rows)  # type: ignore[arg-type, operator]
            for part, weight in zip(self.parts, self.weights, strict=True)
        ]
        return sum(terms[1:], terms[0])
