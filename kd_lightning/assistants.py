r"""Assistant distributions r: mixtures of teacher p and student q."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import final

from torch import Tensor, nn

from kd_lightning import functional
from kd_lightning.schedules import Weight, check_number, check_weight, numbers, value


class Assistant(nn.Module, ABC):
    """A distribution r made of the teacher's p and the student's q.

    `keeps_lower_bound`: whether an f-divergence that compares with r stays a lower bound where only the teacher's top-k
    log-probabilities are known. It does where r, summed over a group of tokens, is the same function of p and q
    summed over that group.

    `is_mergeable`: whether r of a group of tokens with equal p / q is the same function of p and q summed over that
    group: then it can be computed from a teacher with another vocabulary. By default as `keeps_lower_bound`, which is
    the same for any group.

    Examples:
        >>> import torch
        >>> from kd_lightning import Assistant
        >>> class Warm(Assistant):
        ...     def forward(self, log_p, log_q, rows=None):
        ...         return torch.log_softmax(log_p / 2, -1)
        >>> log_p, log_q = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log()
        >>> Warm()(log_p, log_q).exp()
        tensor([0.7500, 0.2500])
    """

    keeps_lower_bound: bool = False

    @property
    def is_mergeable(self) -> bool:
        """Whether tokens with equal p / q can be merged into one."""
        return self.keeps_lower_bound

    @abstractmethod
    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """Normalized log r.

        Args:
            log_p: the teacher's log-probabilities, [..., V].
            log_q: the student's log-probabilities, [..., V].
            rows: extra inputs per token by name, each [...], for weights that differ between tokens.

        Returns:
            [..., V].
        """

    def extra_repr(self) -> str:
        """Constructor arguments."""
        return numbers(self)


@final
class AlphaMixture(Assistant):
    r"""\(r \propto (\lambda p^{(1-\alpha)/2} + (1-\lambda) q^{(1-\alpha)/2})^{2/(1-\alpha)}\); geometric at α = 1.

    Reduces to `ArithmeticMixture` at −1, `GeometricMixture` at 1; harmonic at 3. For α < 1 its support is the union of
    both models' supports, for α ≥ 1 their intersection.

    Args:
        alpha: any finite number.
        teacher_weight: λ in (0, 1), or a schedule, which may reach 0 and 1.

    Raises:
        ValueError: an argument is out of range.

    Reference: Shin et al., arXiv 2510.15982.

    Examples:
        >>> import torch
        >>> from kd_lightning import AlphaMixture
        >>> log_p, log_q = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log()
        >>> AlphaMixture(-1.0, 0.5)(log_p, log_q).exp()  # arithmetic
        tensor([0.7000, 0.3000])
        >>> AlphaMixture(1.0, 0.5)(log_p, log_q).exp()  # geometric
        tensor([0.7500, 0.2500])
    """

    is_mergeable = True

    def __init__(self, alpha: float, teacher_weight: Weight) -> None:
        super().__init__()
        check_number("alpha", alpha)
        check_weight("teacher_weight", teacher_weight, ends="()")
        self.alpha = alpha
        self.teacher_weight = teacher_weight

    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """Normalized log r."""
        return functional.alpha_mixture(log_p, log_q, self.alpha, value(self.teacher_weight, rows))


@final
class ArithmeticMixture(Assistant):
    r"""\(r = \lambda p + (1-\lambda) q\): DistiLLM's skew mixture.

    Args:
        teacher_weight: λ in (0, 1), or a schedule, which may reach 0 and 1.

    Raises:
        ValueError: the weight is out of range.

    Examples:
        >>> import torch
        >>> from kd_lightning import ArithmeticMixture
        >>> log_p, log_q = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log()
        >>> ArithmeticMixture(0.5)(log_p, log_q).exp()
        tensor([0.7000, 0.3000])
    """

    keeps_lower_bound = True

    def __init__(self, teacher_weight: Weight) -> None:
        super().__init__()
        check_weight("teacher_weight", teacher_weight, ends="()")
        self.teacher_weight = teacher_weight

    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """Normalized log r."""
        return functional.arithmetic_mixture(log_p, log_q, value(self.teacher_weight, rows))


@final
class GeometricMixture(Assistant):
    r"""\(r \propto p^\lambda q^{1-\lambda}\): the interpolation of logits in TAID.

    Args:
        teacher_weight: λ in (0, 1), or a schedule, which may reach 0 and 1.

    Raises:
        ValueError: the weight is out of range.

    Examples:
        >>> import torch
        >>> from kd_lightning import GeometricMixture
        >>> log_p, log_q = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log()
        >>> GeometricMixture(0.5)(log_p, log_q).exp()  # √0.9 : √0.1 = 3 : 1
        tensor([0.7500, 0.2500])
    """

    is_mergeable = True

    def __init__(self, teacher_weight: Weight) -> None:
        super().__init__()
        check_weight("teacher_weight", teacher_weight, ends="()")
        self.teacher_weight = teacher_weight

    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """Normalized log r."""
        return functional.geometric_mixture(log_p, log_q, value(self.teacher_weight, rows))
