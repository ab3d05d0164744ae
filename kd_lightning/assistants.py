"""Distributions between teacher and student, for a divergence to read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from kd_lightning import functional
from kd_lightning.schedules import Weight, check_number, check_weight, numbers, value


class Assistant(nn.Module, ABC):
    """A distribution r made of the teacher p and the student q."""

    @abstractmethod
    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """Log-probabilities of the assistant, normalised.

        Args:
            log_p: the teacher's, [..., V].
            log_q: the student's, the same shape.
            rows: columns of shape [...], for weights that differ from row to row.

        Returns:
            [..., V].
        """


class AlphaMixture(Assistant):
    r"""AMiD's α-mixture, \(r \propto \big(\lambda p^k + (1-\lambda) q^k\big)^{1/k}\), \(k = \frac{1-\alpha}{2}\).

    Reduces to `ArithmeticMixture` at α = −1, `GeometricMixture` at 1 (by continuity), the harmonic mean at 3. The
    authors' code takes every α ≥ 1 for 1.

    Args:
        alpha: α, any finite number.
        teacher_weight: λ, in (0, 1), or a schedule, which may reach the ends.

    Raises:
        ValueError: an argument is out of its range.

    Shin et al., ICLR 2026, arXiv 2510.15982.
    """

    def __init__(self, alpha: float, teacher_weight: Weight) -> None:
        super().__init__()
        check_number("alpha", alpha)
        check_weight("teacher_weight", teacher_weight, "()")
        self.alpha, self.teacher_weight = alpha, teacher_weight

    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """Log-probabilities of the mixture."""
        return functional.alpha_mixture(log_p, log_q, self.alpha, value(self.teacher_weight, rows))

    def extra_repr(self) -> str:
        """The numbers it was made with."""
        return numbers(self)


class ArithmeticMixture(AlphaMixture):
    r"""\(r = \lambda p + (1-\lambda) q\): `AlphaMixture` with α = −1.

    Args:
        teacher_weight: λ, in (0, 1), or a schedule, which may reach the ends.

    Raises:
        ValueError: the weight is out of its range.
    """

    def __init__(self, teacher_weight: Weight) -> None:
        super().__init__(-1.0, teacher_weight)


class GeometricMixture(AlphaMixture):
    r"""\(r \propto p^\lambda q^{1-\lambda}\), a softmax of mixed logits: `AlphaMixture` with α = 1.

    Args:
        teacher_weight: λ, in (0, 1), or a schedule, which may reach the ends.

    Raises:
        ValueError: the weight is out of its range.
    """

    def __init__(self, teacher_weight: Weight) -> None:
        super().__init__(1.0, teacher_weight)
