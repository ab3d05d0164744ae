r"""Kullback-Leibler divergences: forward, reverse, and their combinations."""

from __future__ import annotations

from typing import final

from torch import Tensor

from kd_lightning import functional
from kd_lightning.divergences.base import Divergence
from kd_lightning.schedules import Weight, check_number, check_weight, value


@final
class ForwardKL(Divergence):
    r"""\(\mathrm{KL}(p\|q) = \sum p(\log p - \log q)\): mode-covering. Gradient q − p.

    Examples:
        >>> import torch
        >>> from kd_lightning import ForwardKL
        >>> log_p, log_q = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
        >>> ForwardKL()(log_p, log_q)  # ½ log(4 / 3)
        tensor(0.1438)
    """

    is_f_divergence = True

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Divergence per token."""
        return functional.forward_kl(log_p, log_q)


@final
class ReverseKL(Divergence):
    r"""\(\mathrm{KL}(q\|p) = \sum q(\log q - \log p)\): mode-seeking. Gradient q(log q − log p − KL).

    Examples:
        >>> import torch
        >>> from kd_lightning import ForwardKL, ReverseKL
        >>> log_p, log_q = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
        >>> ReverseKL()(log_p, log_q), ForwardKL()(log_q, log_p)
        (tensor(0.1308), tensor(0.1308))
    """

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

    Examples:
        >>> import torch
        >>> from kd_lightning import SymmetricKL
        >>> log_p, log_q = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
        >>> SymmetricKL(0.5)(log_p, log_q), SymmetricKL(1.0)(log_p, log_q)  # the second is forward KL
        (tensor(0.1373), tensor(0.1438))
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

    Examples:
        >>> import torch
        >>> from kd_lightning import GeneralizedJSD
        >>> log_p, log_q = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
        >>> GeneralizedJSD(0.5)(log_p, log_q), GeneralizedJSD(0.5)(log_q, log_p)
        (tensor(0.0338), tensor(0.0338))
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
class ToDi(Divergence):
    r"""\(\sum_v w_v\,p_v \log(p_v/q_v) + (1-w_v)\,q_v \log(q_v/p_v)\), \(w_v = \sigma(\log p_v - \log q_v)\).

    Forward KL where the student gives a token too little probability, reverse KL where it gives too much. w has no
    gradient. As w = p / (p + q), the value is \(\mathrm{KL}(p\|q) + \mathrm{KL}(q\|p)\), but the gradient is not that
    of this sum. On a teacher's top-k log-probabilities value and gradient are those of ToDi on k + 1 outcomes.

    Reference: Jung et al., arXiv 2505.16297.

    Examples:
        >>> import torch
        >>> from kd_lightning import ForwardKL, ReverseKL, ToDi
        >>> log_p, log_q = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
        >>> ToDi()(log_p, log_q), ForwardKL()(log_p, log_q) + ReverseKL()(log_p, log_q)
        (tensor(0.2747), tensor(0.2747))
    """

    is_f_divergence = True

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Divergence per token."""
        return functional.todi(log_p, log_q)

    def components(self) -> dict[str, Divergence]:
        """Forward and reverse KL."""
        return {"forward_kl": ForwardKL(), "reverse_kl": ReverseKL()}


@final
class AdaptiveKL(Divergence):
    r"""AKL: \(w\,\mathrm{KL}(p\|q) + (1-w)\,\mathrm{KL}(q\|p)\), w the top tokens' share of \(\sum|p-q|\).

    The top of the distribution is the set of the teacher's most probable tokens with mass μ: forward KL has more weight
    where the top has more of the error, reverse KL where the tail has. After equal steps, reverse KL leaves a smaller
    part of its error in the tail than forward KL does; which of the two regions is fitted first depends on start and
    optimizer. w has no gradient.

    Args:
        mu: mass of the top, in (0, 1].
        head_rule: "covering": the smallest set of top tokens with mass ≥ μ; "official": as in the authors' code, the
            token that crosses μ belongs to the tail.

    Raises:
        ValueError: an argument is out of range.

    Reference: Wu et al., arXiv 2404.02657.

    Examples:
        >>> import torch
        >>> from kd_lightning import AdaptiveKL, ReverseKL
        >>> log_p, log_q = torch.tensor([[0.6, 0.3, 0.1], [0.6, 0.2, 0.2]]).log()
        >>> AdaptiveKL()(log_p, log_q), ReverseKL()(log_p, log_q)  # the top token agrees: w is 0
        (tensor(0.0575), tensor(0.0575))
    """

    def __init__(self, mu: float = 0.5, head_rule: str = "covering") -> None:
        super().__init__()
        check_number("mu", mu, 0, 1, "(]")
        if not isinstance(head_rule, str) or head_rule not in ("covering", "official"):
            raise ValueError(f"head_rule must be 'covering' or 'official', got {head_rule!r}")
        self.mu = mu
        self.head_rule = head_rule

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Divergence per token."""
        return functional.adaptive_kl(log_p, log_q, self.mu, self.head_rule)

    def components(self) -> dict[str, Divergence]:
        """Forward and reverse KL."""
        return {"forward_kl": ForwardKL(), "reverse_kl": ReverseKL()}
