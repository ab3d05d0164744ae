r"""Weighted sums of divergences."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import cast, final

from torch import Tensor, nn

from kd_lightning.divergences.base import (
    Composite,
    Divergence,
    check_divergence,
    described,
    evaluate,
    first_not_f_divergence,
    first_not_mergeable,
)
from kd_lightning.schedules import Schedule, Weight, check_number, value


@final
class WeightedSum(Composite):
    r"""\(\sum_i w_i D_i\).

    Args:
        divergences: the terms, at least one.
        weights: one weight ≥ 0, or one schedule, per term.

    Raises:
        ValueError: the two lists differ in length, or an entry is out of range.

    Examples:
        >>> import torch
        >>> from kd_lightning import ForwardKL, TotalVariation, WeightedSum
        >>> log_p, log_q = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
        >>> WeightedSum([ForwardKL(), TotalVariation()], [1.0, 2.0])(log_p, log_q)  # 0.1438 + 2 · 0.25
        tensor(0.6438)
    """

    def __init__(self, divergences: list[Divergence], weights: list[Weight]) -> None:
        super().__init__()
        given: object
        for name, given in (("divergences", divergences), ("weights", weights)):
            if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
                raise ValueError(f"{name} must be a list, got {described(given)}")
        if not divergences or len(divergences) != len(weights):
            raise ValueError(
                "divergences and weights must have the same length, at least 1, got "
                f"{len(divergences)} and {len(weights)}"
            )
        for i, (divergence, weight) in enumerate(zip(divergences, weights, strict=True)):
            check_divergence(f"divergences[{i}]", divergence)
            if not isinstance(weight, Schedule):
                check_number(f"weights[{i}]", weight, 0, hint=" or a schedule")
        self.parts = nn.ModuleList(divergences)
        self.weights = list(weights)
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

    def not_mergeable(self) -> str | None:
        """Name of the first term that changes if tokens with equal p / q are merged."""
        return first_not_mergeable(self._terms())

    def components(self) -> dict[str, Divergence]:
        """Every term under the name of its class, with its index where several are of one class."""
        classes = [type(term) for term in self._terms()]
        names = [re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.__name__).lower() for name in classes]
        indexed = [f"{name}_{i}" if classes.count(classes[i]) > 1 else name for i, name in enumerate(names)]
        return dict(zip(indexed, self._terms(), strict=True))

    def _terms(self) -> list[Divergence]:
        return cast("list[Divergence]", list(self.parts))
