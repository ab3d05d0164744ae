r"""α-divergence and α-β-divergence."""

from __future__ import annotations

from typing import final

from torch import Tensor

from kd_lightning import functional
from kd_lightning.divergences.base import Divergence
from kd_lightning.schedules import check_number


@final
class AlphaDivergence(Divergence):
    r"""\(\frac{1}{\alpha(1-\alpha)}\bigl(1 - \sum p^\alpha q^{1-\alpha}\bigr)\). Reduces to FKL at 1, RKL at 0.

    Args:
        alpha: any finite number; outside [0, 1] peaked distributions may overflow fp32.

    Raises:
        ValueError: alpha is not finite.

    Examples:
        >>> import torch
        >>> from kd_lightning import AlphaDivergence
        >>> log_p, log_q = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
        >>> [round(AlphaDivergence(alpha)(log_p, log_q).item(), 4) for alpha in (0, 0.5, 1)]  # RKL, Hellinger, FKL
        [0.1308, 0.1363, 0.1438]
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
    r"""α-β-divergence (ABKD), a plane that contains both KLs.

    \(-\frac{1}{\alpha\beta}\sum\bigl[p^\alpha q^\beta - \frac{\alpha}{\alpha+\beta}p^{\alpha+\beta} -
    \frac{\beta}{\alpha+\beta}q^{\alpha+\beta}\bigr]\), extended by continuity where a factor is 0. Reduces to FKL at
    (1, 0), RKL at (0, 1), the α-divergence where α + β = 1. An f-divergence only where α + β = 1.

    Raising β by δ multiplies the gradient with respect to log q by \(q^\delta\), so that tokens of higher student
    probability gain. A smaller α favors tokens with a large |log p − log q| among those of equal larger probability,
    and disfavors them among those of equal smaller probability.

    Args:
        alpha: any finite number.
        beta: any finite number; negative exponents may overflow fp32 on peaked distributions.

    Raises:
        ValueError: an argument is not finite.

    Reference: Wang et al., arXiv 2505.04560.

    Examples:
        >>> import torch
        >>> from kd_lightning import AlphaBeta
        >>> log_p, log_q = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
        >>> AlphaBeta(0.2, 0.7)(log_p, log_q), AlphaBeta(1, 0)(log_p, log_q)  # the second is forward KL
        (tensor(0.1446), tensor(0.1438))
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
