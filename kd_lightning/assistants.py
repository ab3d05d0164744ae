r"""Assistant distributions r between teacher p and student q."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import final

from torch import Tensor, nn

from kd_lightning import functional
from kd_lightning.schedules import Weight, check_number, check_weight, numbers, value


class Assistant(nn.Module, ABC):
    """A distribution made of teacher and student."""

    @abstractmethod
    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """Log r, normalised.

        Args:
            log_p: teacher's log-probabilities, [..., V].
            log_q: student's, [..., V].
            rows: columns of shape [...], for weights that differ from row to row.

        Returns:
            [..., V].
        """

    def extra_repr(self) -> str:
        """The numbers it was made with."""
        return numbers(self)


@final
class AlphaMixture(Assistant):
    r"""\(r \propto (\lambda p^{(1-\alpha)/2} + (1-\lambda) q^{(1-\alpha)/2})^{2/(1-\alpha)}\); geometric at α = 1.

    Reduces to `ArithmeticMixture` at −1, `GeometricMixture` at 1; harmonic at 3. Below 1 it lives where either model
    does, from 1 on where both do.

    Args:
        alpha: any finite number.
        teacher_weight: λ in (0, 1), or a schedule, which may reach the ends.

    Raises:
        ValueError: an argument is out of its range.

    Reference: Shin et al., arXiv 2510.15982.
    """

    def __init__(self, alpha: float, teacher_weight: Weight) -> None:
        super().__init__()
        check_number("alpha", alpha)
        check_weight("teacher_weight", teacher_weight, ends="()")
        self.alpha = alpha
        self.teacher_weight = teacher_weight

    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """Log r, normalised."""
        return functional.alpha_mixture(log_p, log_q, self.alpha, value(self.teacher_weight, rows))


@final
class ArithmeticMixture(Assistant):
    r"""\(r = \lambda p + (1-\lambda) q\): DistiLLM's skew mixture.

    Args:
        teacher_weight: λ in (0, 1), or a schedule, which may reach the ends.

    Raises:
        ValueError: the weight is out of its range.
    """

    def __init__(self, teacher_weight: Weight) -> None:
        super().__init__()
        check_weight("teacher_weight", teacher_weight, ends="()")
        self.teacher_weight = teacher_weight

    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """Log r, normalised."""
        return functional.arithmetic_mixture(log_p, log_q, value(self.teacher_weight, rows))


@final
class GeometricMixture(Assistant):
    r"""\(r \propto p^\lambda q^{1-\lambda}\): TAID's interpolation of logits.

    Args:
        teacher_weight: λ in (0, 1), or a schedule, which may reach the ends.

    Raises:
        ValueError: the weight is out of its range.
    """

    def __init__(self, teacher_weight: Weight) -> None:
        super().__init__()
        check_weight("teacher_weight", teacher_weight, ends="()")
        self.teacher_weight = teacher_weight

    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """Log r, normalised."""
        return functional.geometric_mixture(log_p, log_q, value(self.teacher_weight, rows))
