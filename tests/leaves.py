"""The list of all implementations: add a line for every new class of a role.

With each divergence comes the same formula as a slow loop over Python floats, written from the definition alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kd_lightning.assistants import AlphaMixture, ArithmeticMixture, Assistant, GeometricMixture
from kd_lightning.divergences import (
    AdaptiveKL,
    AlphaBeta,
    AlphaDivergence,
    Divergence,
    ForwardKL,
    GeneralizedJSD,
    OnSupport,
    ReverseKL,
    SymmetricKL,
    ToDi,
    TotalVariation,
    WeightedSum,
)
from kd_lightning.label_losses import ClippedPolicyGradient, CrossEntropy, LabelLoss, SampledReverseKL
from kd_lightning.objectives import TAID, AMiD, Contrastive, Objective, SkewKL, SkewReverseKL, Weighted
from kd_lightning.rollout.base import ResponseSource
from kd_lightning.rollout.minillm import MiniLLM
from kd_lightning.rollout.on_policy import OnPolicy
from kd_lightning.rollout.replay import AdaptiveReplay
from kd_lightning.schedules import Cosine, Linear, ResponseGap, Schedule, TAIDSchedule
from kd_lightning.token_weights import GapGate, StudentEntropyGate, TeacherEntropyGate, TokenWeight, TopShare

Row = Sequence[float]  # probabilities, all > 0
Slow = Callable[[Row, Row], float]


@dataclass(frozen=True)
class Leaf:
    """A divergence and its properties for the tests.

    Args:
        make: builds it.
        slow: its definition, from the probabilities of one row.
        detached: part of it gets no gradient, so that finite differences say nothing.
        negative: it has a negative exponent: on peaked rows it may truly exceed fp32.
        partial: it may be 0 where the models differ.
        rows: columns it reads, one value for every row.
    """

    make: Callable[[], Divergence]
    slow: Slow
    detached: bool = False
    negative: bool = False
    partial: bool = False
    rows: dict[str, float | int] = field(default_factory=dict)

    def columns(self, log_p: Tensor) -> dict[str, Tensor]:
        """The extra inputs as tensors of the shape of the tokens."""
        dtypes = {name: log_p.dtype if isinstance(x, float) else torch.int64 for name, x in self.rows.items()}
        return {name: torch.full(log_p.shape[:-1], x, dtype=dtypes[name]) for name, x in self.rows.items()}


# --------------------------------------------------------------------------------------------------------- definitions
def kl(a: Row, b: Row) -> float:
    return math.fsum(x * math.log(x / y) for x, y in zip(a, b, strict=True))


def jsd(p: Row, q: Row, beta: float) -> float:
    m = [beta * x + (1 - beta) * y for x, y in zip(p, q, strict=True)]
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def tv(p: Row, q: Row) -> float:
    return 0.5 * math.fsum(abs(x - y) for x, y in zip(p, q, strict=True))


def head_share(p: Row, q: Row, mu: float, rule: str) -> float:
    order = sorted(range(len(p)), key=lambda v: -p[v])
    head, mass = [], 0.0
    for rank, v in enumerate(order):
        if rule == "covering" and mass >= mu:
            break
        mass += p[v]
        if rule == "official" and mass > mu and rank > 0:
            break
        head.append(v)
    gaps = [abs(x - y) for x, y in zip(p, q, strict=True)]
    return math.fsum(gaps[v] for v in head) / math.fsum(gaps) if any(gaps) else 0.0


def akl(p: Row, q: Row, mu: float, rule: str) -> float:
    w = head_share(p, q, mu, rule)
    return w * kl(p, q) + (1 - w) * kl(q, p)


def ab(p: Row, q: Row, a: float, b: float) -> float:
    """The α-β-divergence with its five cases, as Cichocki et al. (2011) list them."""
    pairs = list(zip(p, q, strict=True))
    if a == b == 0:
        return 0.5 * math.fsum(math.log(x / y) ** 2 for x, y in pairs)
    if b == 0:
        return math.fsum(x**a * math.log(x**a / y**a) - x**a + y**a for x, y in pairs) / a**2
    if a == 0:
        return math.fsum(y**b * math.log(y**b / x**b) - y**b + x**b for x, y in pairs) / b**2
    if a + b == 0:
        return math.fsum(math.log(y**a / x**a) + (x / y) ** a - 1 for x, y in pairs) / a**2
    s = a + b
    return -math.fsum(x**a * y**b - a / s * x**s - b / s * y**s for x, y in pairs) / (a * b)


def alpha_divergence(p: Row, q: Row, a: float) -> float:
    return (math.fsum(x**a * y ** (1 - a) for x, y in zip(p, q, strict=True)) - 1) / (a * (a - 1))


def mixture(p: Row, q: Row, alpha: float, weight: float) -> list[float]:
    """The α-mixture with the teacher's weight."""
    k = (1 - alpha) / 2
    if k == 0:
        r = [x**weight * y ** (1 - weight) for x, y in zip(p, q, strict=True)]
    else:
        r = [(weight * x**k + (1 - weight) * y**k) ** (1 / k) for x, y in zip(p, q, strict=True)]
    total = math.fsum(r)
    return [x / total for x in r]


def todi(p: Row, q: Row) -> float:
    total = []
    for x, y in zip(p, q, strict=True):
        w = 1 / (1 + math.exp(math.log(y) - math.log(x)))
        total.append(w * x * math.log(x / y) + (1 - w) * y * math.log(y / x))
    return math.fsum(total)


def on_top(p: Row, q: Row, k: int) -> tuple[Row, Row]:
    """Both distributions on the k most probable tokens of the first, renormalized."""
    top = sorted(range(len(p)), key=lambda v: -p[v])[:k]
    a, b = math.fsum(p[v] for v in top), math.fsum(q[v] for v in top)
    return [p[v] / a for v in top], [q[v] / b for v in top]


def entropy(p: Row) -> float:
    return -math.fsum(x * math.log(x) for x in p)


def gap_gate(beta: float) -> float:
    """The weight of a label with these columns."""
    return 1 / (1 + math.exp(-beta * (LABEL["teacher_log_prob"] - LABEL["student_log_prob"])))


LABEL = {"teacher_log_prob": math.log(0.34), "student_log_prob": math.log(0.1)}


def half_and_two(p: Row, q: Row) -> float:
    return 0.5 * kl(p, q) + 2 * tv(p, q)


# --------------------------------------------------------------------------------------------------------------- lists
# `ChunkLikelihood` compares likelihoods of text, not log p with log q: its loop is in tests/test_two_tokenizers.py.
DIVERGENCES: dict[str, Leaf] = {
    "ForwardKL": Leaf(ForwardKL, kl),
    "ReverseKL": Leaf(ReverseKL, lambda p, q: kl(q, p)),
    "SymmetricKL": Leaf(SymmetricKL, lambda p, q: (kl(p, q) + kl(q, p)) / 2),
    "SymmetricKL(0.3)": Leaf(lambda: SymmetricKL(0.3), lambda p, q: 0.3 * kl(p, q) + 0.7 * kl(q, p)),
    "GeneralizedJSD": Leaf(GeneralizedJSD, lambda p, q: jsd(p, q, 0.5)),
    "GeneralizedJSD(0.1)": Leaf(lambda: GeneralizedJSD(0.1), lambda p, q: jsd(p, q, 0.1)),
    "TotalVariation": Leaf(TotalVariation, tv),
    "AdaptiveKL": Leaf(AdaptiveKL, lambda p, q: akl(p, q, 0.5, "covering"), detached=True),
    "AdaptiveKL(0.9)": Leaf(lambda: AdaptiveKL(0.9), lambda p, q: akl(p, q, 0.9, "covering"), detached=True),
    "AdaptiveKL(0.25, official)": Leaf(
        lambda: AdaptiveKL(0.25, "official"), lambda p, q: akl(p, q, 0.25, "official"), detached=True
    ),
    "AlphaDivergence(0.3)": Leaf(lambda: AlphaDivergence(0.3), lambda p, q: alpha_divergence(p, q, 0.3)),
    "AlphaDivergence(0.5)": Leaf(lambda: AlphaDivergence(0.5), lambda p, q: alpha_divergence(p, q, 0.5)),
    "AlphaDivergence(2)": Leaf(lambda: AlphaDivergence(2), lambda p, q: alpha_divergence(p, q, 2), negative=True),
    "WeightedSum": Leaf(lambda: WeightedSum([ForwardKL(), TotalVariation()], [0.5, 2]), half_and_two),
    "ToDi": Leaf(ToDi, todi, detached=True),
    "OnSupport(ReverseKL, 4)": Leaf(
        lambda: OnSupport(ReverseKL(), 4), lambda p, q: kl(*reversed(on_top(p, q, 4))), partial=True
    ),
    "OnSupport(ForwardKL, 1000)": Leaf(lambda: OnSupport(ForwardKL(), 1000), kl, partial=True),
    **{
        f"AlphaBeta({a}, {b})": Leaf(
            lambda a=a, b=b: AlphaBeta(a, b),  # type: ignore[misc]
            lambda p, q, a=a, b=b: ab(p, q, a, b),  # type: ignore[misc]
            negative=a < 0 or b < 0,
        )
        for a, b in (
            (0.2, 0.7),
            (0.7, 0.2),
            (1.0, 1.0),
            (1.0, 0.0),
            (0.0, 1.0),
            (0.5, 0.0),
            (0.0, 0.5),
            (0.0, 0.0),
            (0.5, -0.5),
            (2.0, -0.5),
            (-0.6, 0.2),
        )
    },
}

OBJECTIVES: dict[str, Leaf] = {
    "Objective(ReverseKL)": Leaf(lambda: Objective(ReverseKL()), lambda p, q: kl(q, p)),
    "Objective(JSD, harmonic, student, assistant)": Leaf(
        lambda: Objective(GeneralizedJSD(), AlphaMixture(3.0, 0.4), ("student", "assistant")),
        lambda p, q: jsd(q, mixture(p, q, 3, 0.4), 0.5),
    ),
    "SkewKL": Leaf(SkewKL, lambda p, q: kl(p, mixture(p, q, -1, 0.1))),
    "SkewReverseKL": Leaf(SkewReverseKL, lambda p, q: kl(q, mixture(p, q, -1, 0.9))),
    "SkewReverseKL(detached)": Leaf(
        lambda: SkewReverseKL(0.1, detach_assistant=True), lambda p, q: kl(q, mixture(p, q, -1, 0.9)), detached=True
    ),
    "TAID": Leaf(TAID, lambda p, q: kl(mixture(p, q, 1, 0.4), q), detached=True),
    "TAID(0.8)": Leaf(lambda: TAID(0.8), lambda p, q: kl(mixture(p, q, 1, 0.8), q), detached=True),
    "AMiD": Leaf(lambda: AMiD(AlphaBeta(0.2, 0.7), 0.5, 0.5), lambda p, q: ab(p, mixture(p, q, 0.5, 0.5), 0.2, 0.7)),
    **{
        f"AMiD({alpha}, {'-'.join(pair)})": Leaf(
            lambda alpha=alpha, pair=pair: AMiD(ForwardKL(), alpha, 0.3, pair),  # type: ignore[misc]
            lambda p, q, alpha=alpha, pair=pair: kl(  # type: ignore[misc]
                *({"teacher": p, "student": q, "assistant": mixture(p, q, alpha, 0.3)}[x] for x in pair)
            ),
        )
        for alpha in (-5.0, 0.9, 1.0, 3.0)
        for pair in (("teacher", "assistant"), ("assistant", "student"))
    },
    "Contrastive(teacher's)": Leaf(Contrastive, lambda p, q: kl(p, mixture(p, q, -1, 0.1)), rows={"source": 1}),
    "Contrastive(student's, 0.2)": Leaf(
        lambda: Contrastive(ForwardKL(), ReverseKL(), 0.2), lambda p, q: 1.6 * kl(q, p), rows={"source": 2}
    ),
    "SkewKL(ResponseGap)": Leaf(
        lambda: SkewKL(gap()),
        lambda p, q: kl(p, mixture(p, q, -1, 1 - 0.9 * 0.25 / (0.24 + 1e-5))),
        rows={"teacher_log_prob": math.log(0.34), "student_log_prob": math.log(0.1)},
    ),
}

TOKEN_WEIGHTS: dict[str, tuple[Callable[[], TokenWeight], Slow]] = {
    "TeacherEntropyGate": (lambda: TeacherEntropyGate(1.4), lambda p, q: float(entropy(p) > 1.4)),
    "TeacherEntropyGate(below)": (lambda: TeacherEntropyGate(1.4, above=False), lambda p, q: float(entropy(p) <= 1.4)),
    "StudentEntropyGate": (lambda: StudentEntropyGate(1.4), lambda p, q: float(entropy(q) > 1.4)),
    "StudentEntropyGate(schedule, below)": (
        lambda: StudentEntropyGate(Linear(0.9, 0.1), above=False),
        lambda p, q: float(entropy(q) <= 0.9),
    ),
    "GapGate": (GapGate, lambda p, q: gap_gate(1.0)),
    "GapGate(-2.5)": (lambda: GapGate(-2.5), lambda p, q: gap_gate(-2.5)),
    "TopShare": (lambda: TopShare(GapGate(2.0), 0.5), lambda p, q: gap_gate(2.0)),  # in the first step: all
    "TopShare(schedule)": (
        lambda: TopShare(TeacherEntropyGate(1.4), Linear(1.0, 0.1)),
        lambda p, q: float(entropy(p) > 1.4),
    ),
}

OBJECTIVES |= {
    f"Weighted({name})": Leaf(
        lambda make=make: Weighted(ForwardKL(), make()),  # type: ignore[misc]
        lambda p, q, slow=slow: slow(p, q) * kl(p, q),  # type: ignore[misc]
        partial=True,
        rows=dict(LABEL),
    )
    for name, (make, slow) in TOKEN_WEIGHTS.items()
    if "below" not in name  # 0 for every token of a large vocabulary
}
OBJECTIVES |= {
    "Weighted(AdaptiveKL, normalized)": Leaf(
        lambda: Weighted(AdaptiveKL(), GapGate(), normalize=True),
        lambda p, q: gap_gate(1.0) * akl(p, q, 0.5, "covering"),
        detached=True,
        rows=dict(LABEL),
    ),
    "Objective(Weighted, detached mixture)": Leaf(
        lambda: Objective(
            Weighted(ForwardKL(), TeacherEntropyGate(1.4)), GeometricMixture(0.4), ("assistant", "student")
        ),
        lambda p, q: float(entropy(mixture(p, q, 1, 0.4)) > 1.4) * kl(mixture(p, q, 1, 0.4), q),
        partial=True,
    ),
    "WeightedSum(Weighted, OnSupport)": Leaf(
        lambda: WeightedSum([Weighted(ReverseKL(), GapGate(0.5)), OnSupport(ForwardKL(), 3)], [2.0, 0.5]),
        lambda p, q: 2 * gap_gate(0.5) * kl(q, p) + 0.5 * kl(*on_top(p, q, 3)),
        rows=dict(LABEL),
    ),
}


@dataclass(frozen=True)
class LabelLeaf:
    """A label loss, with its value and its derivative with respect to log q as plain arithmetic.

    Args:
        make: builds it.
        slow: value and derivative, from log q of the label and the columns.
    """

    make: Callable[[], LabelLoss]
    slow: Callable[[float, dict[str, float]], tuple[float, float]]


def clipped(log_q: float, rows: dict[str, float]) -> tuple[float, float]:
    ratio = math.exp(log_q - rows["old_log_prob"]) * rows["importance"]
    plain, bound = -rows["advantage"] * ratio, -rows["advantage"] * min(max(ratio, 0.8), 1.2)
    return max(plain, bound), plain if plain >= bound else 0.0


def sampled(log_q: float, rows: dict[str, float], value: str, baseline: bool) -> tuple[float, float]:
    ratio = math.exp(log_q - rows["old_log_prob"]) * rows["importance"]
    k = log_q - rows["teacher_log_prob"]
    return ratio * (k if value == "k" else k * k / 2), ratio * (k - (rows["reverse_kl"] if baseline else 0.0))


LABEL_LOSSES: dict[str, LabelLeaf] = {
    "CrossEntropy": LabelLeaf(CrossEntropy, lambda log_q, rows: (-log_q, -1.0)),
    "ClippedPolicyGradient": LabelLeaf(ClippedPolicyGradient, clipped),
    "SampledReverseKL": LabelLeaf(SampledReverseKL, lambda log_q, rows: sampled(log_q, rows, "k2", False)),
    "SampledReverseKL(k1_reward)": LabelLeaf(
        lambda: SampledReverseKL("k1_reward"), lambda log_q, rows: sampled(log_q, rows, "k", False)
    ),
    "SampledReverseKL(baseline)": LabelLeaf(
        lambda: SampledReverseKL(baseline=True), lambda log_q, rows: sampled(log_q, rows, "k2", True)
    ),
    "SampledReverseKL(k1_reward, baseline)": LabelLeaf(
        lambda: SampledReverseKL("k1_reward", True), lambda log_q, rows: sampled(log_q, rows, "k", True)
    ),
}

ASSISTANTS: dict[str, tuple[Callable[[], Assistant], Callable[[Row, Row], list[float]]]] = {
    "ArithmeticMixture": (lambda: ArithmeticMixture(0.3), lambda p, q: mixture(p, q, -1, 0.3)),
    "GeometricMixture": (lambda: GeometricMixture(0.3), lambda p, q: mixture(p, q, 1, 0.3)),
    **{
        f"AlphaMixture({alpha})": (
            lambda alpha=alpha: AlphaMixture(alpha, 0.3),  # type: ignore[misc]
            lambda p, q, alpha=alpha: mixture(p, q, alpha, 0.3),  # type: ignore[misc]
        )
        for alpha in (-5.0, -1.0, 0.0, 0.5, 0.99, 1.0, 1.5, 3.0)
    },
}

SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "Linear": lambda: Linear(0.2, 0.8),
    "Cosine": lambda: Cosine(0.2, 0.8),
    "TAIDSchedule": TAIDSchedule,
    "TAIDSchedule(line)": lambda: TAIDSchedule(adaptive=False),
    "Linear(until)": lambda: Linear(0.2, 0.8, until=0.5),
    "ResponseGap": ResponseGap,
    "ResponseGap(student)": lambda: ResponseGap(side="student", start=0.5),
}

RESPONSES: dict[str, Callable[[], ResponseSource]] = {
    "OnPolicy": lambda: OnPolicy(Linear(0.2, 0.8)),
    "AdaptiveReplay": lambda: AdaptiveReplay(0.3),
    "MiniLLM": MiniLLM,
}

ALL = {**DIVERGENCES, **OBJECTIVES}


def gap() -> ResponseGap:
    """A schedule after a step with mean gap 0.25."""
    schedule = ResponseGap(minimum=0.001)
    schedule.update(0.5, {"gap": 0.25})
    return schedule
