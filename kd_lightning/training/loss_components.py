r"""Components of a loss for the logs: the terms of its objective, forward KL on the teacher's top tokens and tail."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from kd_lightning import functional
from kd_lightning.divergences import Divergence, ForwardKL
from kd_lightning.engine.sequence_stats import Mean
from kd_lightning.losses import DistillationLoss, LossParts
from kd_lightning.schedules import check_number

PREFIX = "component/"
FEW = 64  # the most probable tokens that hold half of the mass of nearly every distribution


@final
class PartialKL(Divergence):
    r"""\(\sum_{v \in S} p \log(p/q) - p + q\), S the top or the tail of the teacher's distribution.

    Every term is at least 0. The top ("head") is the smallest set of the teacher's most probable tokens with mass ≥ μ,
    and the tail all other tokens. Both values sum to forward KL.

    Args:
        part: "head" or "tail".
        mu: mass of the top tokens, in (0, 1].

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, part: str, mu: float = 0.5) -> None:
        super().__init__()
        if not isinstance(part, str) or part not in ("head", "tail"):
            raise ValueError(f"part must be 'head' or 'tail', got {part!r}")
        check_number("mu", mu, 0, 1, "(]")
        self.part = part
        self.mu = mu

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Divergence per token."""
        p, q = log_p.exp(), log_q.exp()
        inside = _top_mask(log_p, self.mu)
        inside = inside if self.part == "head" else ~inside
        return torch.where(inside, p * (log_p - log_q) - p + q, 0.0).sum(-1)


def _top_mask(log_p: Tensor, mu: float) -> Tensor:
    """`functional.head_mask`, faster: only positions with a long top need its thirty passes over the vocabulary."""
    few = log_p.topk(min(FEW, log_p.shape[-1])).values
    before = (few.exp().cumsum(-1) < mu).sum(-1, keepdim=True)  # tokens before the one that reaches μ
    inside = log_p >= few.gather(-1, before.clamp(max=few.shape[-1] - 1))
    long = before.squeeze(-1) == few.shape[-1]
    if long.any():
        inside[long] = functional.head_mask(log_p[long], mu)
    return inside


def objective_components(objective: Divergence) -> dict[str, Divergence]:
    """Every component of an objective by name, the components of components included; empty if it has none."""
    components: dict[str, Divergence] = {}
    for name, part in objective.components().items():
        components[name] = part
        components |= {f"{name}_{inner}": deeper for inner, deeper in objective_components(part).items()}
    return components


def component_loss(objective: Divergence) -> DistillationLoss:
    """Loss whose monitors are the objective's components and forward KL on the teacher's top tokens, at temperature 1.

    The monitors are named `component/NAME`, so that a component may have any name.
    """
    monitors = {**objective_components(objective), "head_kl": PartialKL("head")}
    return DistillationLoss(
        ForwardKL(), monitors={PREFIX + name: part for name, part in monitors.items()}, compile=False
    )


def component_sums(loss: DistillationLoss, measured: LossParts) -> dict[str, Mean]:
    """Mean of each component over the tokens with a label where it is not NaN.

    Args:
        loss: from `component_loss`.
        measured: its result on one batch.

    Returns:
        Undivided means by name, with `component/tail_kl`.
    """
    values = {name: measured.values[name] for name in loss.token_loss.monitors}
    # Forward KL on all tokens less that on the top ones: finding the tail by itself would cost another bisection.
    values[f"{PREFIX}tail_kl"] = measured.values["kd"] - values[f"{PREFIX}head_kl"]
    sums = {}
    for name, value in values.items():
        known = ~value.isnan()
        total = torch.where(known, value * measured.weights, 0.0).sum()
        sums[name] = Mean(total, (known * measured.weights).sum())
    return sums
