r"""How far the student q is from the teacher p, per token.

A user's own divergence is two lines:

    class Hellinger(Divergence):
        def forward(self, log_p, log_q):
            return 1 - ((log_p + log_q) / 2).exp().sum(-1)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from kd_lightning import functional
from kd_lightning.schedules import Schedule, Weight, check_number, check_weight, numbers, value


class Divergence(nn.Module, ABC):
    """A function of two distributions, zero iff they are equal."""

    @abstractmethod
    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The divergence of each row.

        Args:
            log_p: the teacher's log-probabilities, [..., V], as `functional.log_softmax` gives them: −1e4 at least.
            log_q: the student's, the same shape.

        Returns:
            [...].
        """

    def extra_repr(self) -> str:
        """The numbers it was made with."""
        return numbers(self)


class Composite(Divergence):
    """A divergence that also reads `rows`, columns with one value per row, and may hand them to others."""

    @abstractmethod
    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """The divergence of each row.

        Args:
            log_p: the teacher's log-probabilities, [..., V].
            log_q: the student's, the same shape.
            rows: columns of shape [...].

        Returns:
            [...].
        """


def evaluate(divergence: Divergence, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
    """The divergence of each row; the columns go to a `Composite` alone."""
    if isinstance(divergence, Composite):
        return divergence(log_p, log_q, rows)  # type: ignore[no-any-return]
    return divergence(log_p, log_q)  # type: ignore[no-any-return]


def check_divergence(name: str, divergence: object) -> None:
    """Raise a ValueError unless it is a divergence."""
    if not isinstance(divergence, Divergence):
        raise ValueError(f"{name} must be a Divergence, got {divergence!r}")


class ForwardKL(Divergence):
    r"""Forward KL, \(\mathrm{KL}(p\|q) = \sum_v p (\log p - \log q)\), the teacher's entropy included.

    Hinton et al., 2015, arXiv 1503.02531.
    """

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """KL(p‖q) of each row."""
        return functional.kl(log_p, log_q)


class ReverseKL(Divergence):
    r"""Reverse KL, \(\mathrm{KL}(q\|p) = \sum_v q (\log q - \log p)\).

    Gu et al., ICLR 2024, arXiv 2306.08543.
    """

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """KL(q‖p) of each row."""
        return functional.kl(log_q, log_p)


class SymmetricKL(Divergence):
    r"""\(w\,\mathrm{KL}(p\|q) + (1-w)\,\mathrm{KL}(q\|p)\); half of Jeffreys' divergence at w = 1/2.

    Reduces to `ForwardKL` at 1, `ReverseKL` at 0.

    Args:
        forward_weight: w, in [0, 1], or a schedule.

    Raises:
        ValueError: the weight is out of its range.
    """

    def __init__(self, forward_weight: Weight = 0.5) -> None:
        super().__init__()
        check_weight("forward_weight", forward_weight, columns=False)
        self.forward_weight = forward_weight

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The weighted sum of each row."""
        w = value(self.forward_weight)
        return w * functional.kl(log_p, log_q) + (1 - w) * functional.kl(log_q, log_p)


class GeneralizedJSD(Divergence):
    r"""\(\beta\,\mathrm{KL}(p\|m) + (1-\beta)\,\mathrm{KL}(q\|m)\), \(m = \beta p + (1-\beta) q\); GKD's loss.

    The Jensen-Shannon divergence at β = 1/2; divided by β it tends to `ForwardKL` at β → 0, divided by 1 − β to
    `ReverseKL` at β → 1. At the ends themselves it vanishes.

    Args:
        beta: β, in (0, 1), or a schedule.

    Raises:
        ValueError: beta is out of its range.

    Agarwal et al., ICLR 2024, arXiv 2306.13649.
    """

    def __init__(self, beta: Weight = 0.5) -> None:
        super().__init__()
        hint = "; at the ends it is 0: use ForwardKL for what other code calls beta=0, ReverseKL for beta=1"
        check_weight("beta", beta, "()", hint, columns=False)
        self.beta = beta

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The divergence of each row."""
        return functional.generalized_jsd(log_p, log_q, value(self.beta))


class TotalVariation(Divergence):
    r"""Total variation distance, \(\frac12 \sum_v |p - q|\), in [0, 1]."""

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The distance of each row."""
        return functional.total_variation(log_p, log_q)


class AdaptiveKL(Divergence):
    r"""AKL: \(w\,\mathrm{KL}(p\|q) + (1-w)\,\mathrm{KL}(q\|p)\), w the share of \(\sum_v |p-q|\) in the teacher's head.

    The weights get no gradient. Reduces to `ForwardKL` at μ = 1.

    Args:
        mu: mass of the head, in (0, 1].
        head_rule: "covering": the smallest set of the most probable tokens with mass ≥ μ. "official": the token that
            crosses μ belongs to the tail, unless it is the first, as in the authors' code.

    Raises:
        ValueError: an argument is out of its range.

    Wu et al., COLING 2025, arXiv 2404.02657.
    """

    def __init__(self, mu: float = 0.5, head_rule: str = "covering") -> None:
        super().__init__()
        check_number("mu", mu, 0, 1, "(]")
        if head_rule not in ("covering", "official"):
            raise ValueError(f"head_rule must be 'covering' or 'official', got {head_rule!r}")
        self.mu, self.head_rule = mu, head_rule

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The weighted sum of each row."""
        return functional.adaptive_kl(log_p, log_q, self.mu, self.head_rule == "covering")


class AlphaDivergence(Divergence):
    r"""\(-\frac{1}{\alpha(1-\alpha)} \big(\sum_v p^\alpha q^{1-\alpha} - 1\big)\).

    Reduces to `ForwardKL` at α = 1, `ReverseKL` at 0; `AlphaBeta` with β = 1 − α; 4 times the squared Hellinger
    distance \(1 - \sum_v \sqrt{pq}\) at 1/2.

    Args:
        alpha: α, any finite number; outside [0, 1] an exponent is negative, and peaked rows may exceed fp32.

    Raises:
        ValueError: alpha is not finite.
    """

    def __init__(self, alpha: float) -> None:
        super().__init__()
        check_number("alpha", alpha)
        self.alpha = alpha

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The divergence of each row."""
        return functional.alpha_beta(log_p, log_q, self.alpha, 1 - self.alpha)


class AlphaBeta(Divergence):
    r"""ABKD: \(-\frac{1}{\alpha\beta} \sum_v \big[p^\alpha q^\beta - \frac{\alpha}{\alpha+\beta} p^{\alpha+\beta} -
    \frac{\beta}{\alpha+\beta} q^{\alpha+\beta}\big]\), where α, β or α + β is 0 by continuity.

    Reduces to `ForwardKL` at (1, 0), `ReverseKL` at (0, 1), `AlphaDivergence` at α + β = 1, half the squared Euclidean
    distance at (1, 1). Swapping α and β swaps p and q.

    Args:
        alpha: α, any finite number.
        beta: β, any finite number. With a negative exponent the divergence of peaked rows may exceed fp32.

    Raises:
        ValueError: an exponent is not finite.

    Wang et al., ICML 2025, arXiv 2505.04560; their GPT-2 scripts use (0.2, 0.7).
    """  # noqa: D205

    def __init__(self, alpha: float, beta: float) -> None:
        super().__init__()
        check_number("alpha", alpha)
        check_number("beta", beta)
        self.alpha, self.beta = alpha, beta

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The divergence of each row."""
        return functional.alpha_beta(log_p, log_q, self.alpha, self.beta)


class WeightedSum(Composite):
    r"""\(\sum_i w_i D_i\).

    Args:
        divergences: the Dᵢ, at least one.
        weights: the wᵢ ≥ 0, as many, numbers or schedules.

    Raises:
        ValueError: a weight is out of its range, or the two lists do not fit.
    """

    def __init__(self, divergences: list[Divergence], weights: list[Weight]) -> None:
        super().__init__()
        if not divergences or len(divergences) != len(weights):
            raise ValueError(
                f"weights must be as many as divergences and at least one, got {len(weights)} and {len(divergences)}"
            )
        for i, (divergence, weight) in enumerate(zip(divergences, weights, strict=True)):
            check_divergence(f"divergences[{i}]", divergence)
            if not isinstance(weight, Schedule):
                check_number(f"weights[{i}]", weight, 0)
        self.divergences = nn.ModuleList(divergences)
        self.weights = list(weights)
        self.schedules = nn.ModuleList(w for w in weights if isinstance(w, Schedule))  # so that modules() finds them

    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """The weighted sum of each row."""
        total: Tensor | float = 0.0
        for weight, divergence in zip(self.weights, self.divergences, strict=True):
            total = total + value(weight, rows) * evaluate(divergence, log_p, log_q, rows)  # type: ignore[arg-type]
        return total  # type: ignore[return-value]
