r"""A divergence whose tokens have different weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from kd_lightning.divergences import Divergence, WeightedTokens, check_divergence, check_one_per_token, evaluate
from kd_lightning.schedules import StepState, check_flag
from kd_lightning.token_weights import TokenWeight, check_token_weight, histogram, label_rows


@final
class Weighted(WeightedTokens):
    r"""\(w\,D(p, q)\) per token, w without gradient; the divisor of the loss stays the number of labeled tokens.

    Reduces to the divergence with a constant weight of 1. 0 where the weight is 0, also if the models differ there.
    Training logs the mean weight as `train/token_weight` and the share of tokens with a weight above 0 as
    `train/tokens_kept`. With a teacher's top-k log-probabilities the weight must be one that is exact there.

    Args:
        divergence: D, any divergence.
        weight: w.
        normalize: whether weights are divided by the mean weight of the previous optimizer step, over all its tokens
            on all ranks (by 1 in the first step), so that a change of the weights does not change the learning rate.

    Raises:
        ValueError: an argument is of another type.

    Examples:
        >>> import torch
        >>> from kd_lightning import ForwardKL, TeacherEntropyGate, Weighted
        >>> log_p = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
        >>> log_q = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
        >>> Weighted(ForwardKL(), TeacherEntropyGate(0.5))(log_p, log_q)  # the teacher is sure of the second token
        tensor([0.1438, 0.0000])
    """

    def __init__(self, divergence: Divergence, weight: TokenWeight, normalize: bool = False) -> None:
        super().__init__()
        check_divergence("divergence", divergence)
        check_token_weight("weight", weight)
        check_flag("normalize", normalize)
        self.divergence = divergence
        self.weight = weight
        self.normalize = normalize
        self.mean_weight = MeanWeight() if normalize else None

    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """Divergence per token."""
        weight = self.weight(log_p.detach(), log_q.detach(), label_rows(rows)).detach()
        weight = check_one_per_token(self.weight, weight, log_q.shape[:-1])
        if self.mean_weight is not None:
            weight = weight / self.mean_weight.now
        return weight * evaluate(self.divergence, log_p, log_q, rows)

    @property
    def is_f_divergence(self) -> bool:
        """Whether the divergence is one and the weight is known from a teacher's top k: then it is a lower bound."""
        return self.not_f_divergence() is None

    def not_f_divergence(self) -> str | None:
        """This class with its weight, or the divergence's own name."""
        if not self.weight.exact_with_top_k:
            return f"Weighted (its weight is {type(self.weight).__name__})"
        return self.divergence.not_f_divergence()

    def not_mergeable(self) -> str | None:
        """This class with its weight, or the name of what changes in the divergence if tokens are merged."""
        if not self.weight.exact_with_top_k:
            return f"Weighted (its weight is {type(self.weight).__name__})"
        return self.divergence.not_mergeable()

    def components(self) -> dict[str, Divergence]:
        """The divergence without weights, under the name of its class."""
        return {re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(self.divergence).__name__).lower(): self.divergence}

    def weighted(self) -> dict[str, WeightedTokens]:
        """Itself, and those inside the divergence."""
        return {"": self, **super().weighted()}

    def token_scores(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The scores of the weight, and those inside the divergence."""
        score = self.weight.score(log_p.detach(), log_q.detach(), label_rows(rows)).detach()
        return {"": score, **super().token_scores(log_p, log_q, rows)}

    @property
    def moves(self) -> bool:
        """Whether weights are normalized, or follow a quantile."""
        return self.normalize or self.weight.bins > 0

    @torch.no_grad()
    def weight_sums(self, scores: Tensor) -> Tensor:
        """Sum of the weights (not normalized), tokens kept, tokens, and the histogram of the scores if needed."""
        known = ~scores.isnan()
        weight = torch.where(known, self.weight.from_score(scores), 0.0)
        sums = torch.stack([weight.sum(), (weight > 0).sum().to(weight), known.sum().to(weight)]).float()
        return torch.cat([sums, histogram(scores)]) if self.weight.bins else sums

    @torch.no_grad()
    def update(self, sums: Tensor) -> None:
        """Store the mean weight of this step, and update the weight."""
        if self.mean_weight is not None:
            self.mean_weight.update(sums[0] / sums[2])
        self.weight.update(sums[3:])


class MeanWeight(StepState):
    """The mean weight of the previous optimizer step; 1 before the first."""

    now: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.state("now", 1.0)

    def update(self, mean: Tensor) -> None:
        """Store a mean; one that is 0 or NaN is ignored: no token was kept, or there was none."""
        mean = mean.to(self.now)
        self.now.copy_(torch.where(mean > 0, mean, self.now))
