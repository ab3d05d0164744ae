r"""What a loss is made of, measured beside it: the parts of its objective, the teacher's head and tail."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from kd_lightning import functional
from kd_lightning.constants import SOURCES
from kd_lightning.divergences import (
    AdaptiveKL,
    Composite,
    Divergence,
    ForwardKL,
    ReverseKL,
    SymmetricKL,
    WeightedSum,
    evaluate,
)
from kd_lightning.losses import DistillationLoss, LossParts
from kd_lightning.objectives import Contrastive, Objective
from kd_lightning.schedules import check_number, column

PREFIX = "component/"
FEW = 64  # tokens, which hold half of the mass of nearly every distribution


@final
class PartialKL(Divergence):
    r"""\(\sum_{v \in S} p \log(p/q) - p + q\), S the teacher's head or its tail: every term is at least 0.

    The head is the smallest set of the teacher's most probable tokens with mass ≥ μ. Head and tail sum to forward KL.

    Args:
        part: "head" or "tail".
        mu: mass of the head, in (0, 1].

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, part: str, mu: float = 0.5) -> None:
        super().__init__()
        if part not in ("head", "tail"):
            raise ValueError(f"part must be 'head' or 'tail', got {part!r}")
        check_number("mu", mu, 0, 1, "(]")
        self.part = part
        self.mu = mu

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Divergence per token."""
        p, q = log_p.exp(), log_q.exp()
        inside = _head(log_p, self.mu)
        inside = inside if self.part == "head" else ~inside
        return torch.where(inside, p * (log_p - log_q) - p + q, 0.0).sum(-1)


@final
class OnSource(Composite):
    """A divergence on the responses of one side; nan on the other's.

    Args:
        divergence: read there.
        student: whether it is the side of the student's responses, not that of the data's and the teacher's.
    """

    def __init__(self, divergence: Divergence, student: bool) -> None:
        super().__init__()
        self.divergence = divergence
        self.student = student

    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """Divergence per token."""
        here = (column(rows, "source", "Side") == SOURCES.index("student")) == self.student
        return torch.where(here, evaluate(self.divergence, log_p, log_q, rows), torch.nan)


def _head(log_p: Tensor, mu: float) -> Tensor:
    """`functional.head_mask`, which reads every token thirty times, of those rows alone whose head is a long one."""
    few = log_p.topk(min(FEW, log_p.shape[-1])).values
    before = (few.exp().cumsum(-1) < mu).sum(-1, keepdim=True)  # tokens before the one that covers
    inside = log_p >= few.gather(-1, before.clamp(max=few.shape[-1] - 1))
    long = before.squeeze(-1) == few.shape[-1]
    if long.any():
        inside[long] = functional.head_mask(log_p[long], mu)
    return inside


def objective_components(objective: Divergence) -> dict[str, Divergence]:
    """The parts of a composite objective by name, without their weights; none of one that is not made of others."""
    if isinstance(objective, SymmetricKL | AdaptiveKL):
        return {"forward_kl": ForwardKL(), "reverse_kl": ReverseKL()}
    if isinstance(objective, WeightedSum):
        members: list[Any] = list(objective.parts)
        return _inner({_name(part, i, members): part for i, part in enumerate(members)})
    if isinstance(objective, Contrastive):
        sides = _inner(
            {"teacher_responses": objective.teacher_responses, "student_responses": objective.student_responses}
        )
        return {name: OnSource(part, name.startswith("student")) for name, part in sides.items()}
    if isinstance(objective, Objective):
        found = objective_components(objective.divergence)
        settings = (objective.assistant, objective.pair, objective.detach_assistant)
        wrapped: dict[str, Divergence] = {name: Objective(part, *settings) for name, part in found.items()}
        return wrapped
    return {}


def component_loss(objective: Divergence) -> DistillationLoss:
    """What measures an objective's parts, and forward KL on the teacher's head and tail, at temperature 1."""
    monitors = {"head_kl": PartialKL("head"), **objective_components(objective)}
    return DistillationLoss(ForwardKL(), monitors=monitors, compile=False)


def component_sums(loss: DistillationLoss, measured: LossParts) -> dict[str, tuple[Tensor, Tensor]]:
    """Sum and weight of each component over the counted tokens that it speaks of."""
    tail = measured.values["kd"] - measured.values["head_kl"]  # of forward KL; another bisection would cost more
    found = {}
    for name, value in {"tail_kl": tail, **{name: measured.values[name] for name in loss.token_loss.monitors}}.items():
        known = ~value.isnan()
        total = torch.where(known, value * measured.weights, 0.0).sum()
        found[PREFIX + name] = (total, (known * measured.weights).sum())
    return found


def _inner(named: dict[str, Divergence]) -> dict[str, Divergence]:
    """Each part, and what it is made of itself."""
    found: dict[str, Divergence] = {}
    for name, part in named.items():
        found[name] = part
        found |= {f"{name}_{inner}": deeper for inner, deeper in objective_components(part).items()}
    return found


def _name(part: object, i: int, siblings: list[object]) -> str:
    """The class in words, with its place where there are several."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(part).__name__).lower()
    return f"{words}_{i}" if sum(type(other) is type(part) for other in siblings) > 1 else words
