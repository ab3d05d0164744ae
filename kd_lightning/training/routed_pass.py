"""One loss of a batch whose rows are taught by several teachers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kd_lightning.constants import IGNORE_INDEX
from kd_lightning.engine.block_logits import SHARED_MASS
from kd_lightning.engine.sequence_stats import Mean
from kd_lightning.losses import DistillationLoss, LossParts


class HasLoss(Protocol):
    """Outputs of both models from which a loss can be computed."""

    @property
    def knows_all_tokens(self) -> bool:
        """Whether the teacher's full distribution is known."""

    def loss(self, loss: DistillationLoss) -> LossParts:
        """A loss of these outputs."""


@dataclass(frozen=True)
class RoutedPass:
    """Outputs of the student and of several teachers, each on the rows that it teaches.

    Args:
        passes: rows of a teacher, [n], and the outputs on them. Together they have every row once.
        labels: of all rows, [B, T].
    """

    passes: Sequence[tuple[Tensor, HasLoss]]
    labels: Tensor

    @property
    def knows_all_tokens(self) -> bool:
        """Whether the full distribution is known of every teacher."""
        return all(outputs.knows_all_tokens for _, outputs in self.passes)

    def loss(self, loss: DistillationLoss) -> LossParts:
        """The sum of the losses of the teachers, under the sum of their divisors; values in the order of the batch."""
        parts = [outputs.loss(loss) for _, outputs in self.passes]
        order = self._order()
        values = [part.values for part in parts]
        for name in SHARED_MASS:  # of a teacher with the student's tokenizer, all of it
            if any(name in own for own in values):
                values = [{name: torch.ones_like(part.weights), **own} for part, own in zip(parts, values, strict=True)]
        names = [name for name in values[0] if all(name in own for own in values)]
        divisor = parts[0].divisor
        if loss.reduction in ("token_mean", "sequence_mean"):
            divisor = _sum([part.divisor for part in parts])
        return LossParts(
            _sum([part.loss for part in parts]),
            divisor,
            torch.cat([part.weights for part in parts])[order],
            {name: torch.cat([own[name] for own in values])[order] for name in names},
            _merged([part.by_response for part in parts]),
            _merged([part.components for part in parts]),
            {path: _sum([part.token_weights[path] for part in parts]) for path in parts[0].token_weights},
            loss.reduction,
        )

    def _order(self) -> Tensor:
        """For each labeled token of the batch, its position among the tokens of all passes one after the other, [N]."""
        labeled = self.labels != IGNORE_INDEX
        position = torch.arange(labeled.numel(), device=labeled.device).view(labeled.shape)
        return torch.cat([position[rows][labeled[rows]] for rows, _ in self.passes]).argsort()


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def _merged(parts: Sequence[dict[str, Mean]]) -> dict[str, Mean]:
    found: dict[str, Mean] = {}
    for means in parts:
        for name, (total, count) in means.items():
            before = found.get(name)
            found[name] = Mean(total, count) if before is None else Mean(before[0] + total, before[1] + count)
    return found
