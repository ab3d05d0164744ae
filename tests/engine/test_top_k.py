"""A top-k teacher: values and gradients of f-divergences on k + 1 outcomes, never above those of all tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from kd_lightning import (
    TAID,
    AdaptiveKL,
    AlphaBeta,
    AlphaDivergence,
    AMiD,
    ArithmeticMixture,
    Assistant,
    Composite,
    Contrastive,
    DistillationLoss,
    Divergence,
    ForwardKL,
    GeneralizedJSD,
    Head,
    Objective,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    SymmetricKL,
    TotalVariation,
    WeightedSum,
)
from kd_lightning.divergences import evaluate
from kd_lightning.engine.top_k import TopK, check_lower_bound, top_k

V, K, H = 50, 6, 8


class SquaredHellinger(Divergence):
    """A custom f-divergence."""

    is_f_divergence = True

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return 0.5 * ((0.5 * log_p).exp() - (0.5 * log_q).exp()).square().sum(-1)


class Undeclared(Divergence):
    """The same divergence, not declared as an f-divergence."""

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return SquaredHellinger()(log_p, log_q)


class Halved(Assistant):
    """A custom assistant that keeps the lower bound: the arithmetic mean of both models."""

    keeps_lower_bound = True

    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        return torch.logaddexp(log_p, log_q) - math.log(2)


class Doubled(Composite):
    """A custom composite that is an f-divergence because its component is one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = SquaredHellinger()

    @property
    def is_f_divergence(self) -> bool:
        return self.inner.is_f_divergence

    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        return 2 * evaluate(self.inner, log_p, log_q, rows)


BOUNDS: dict[str, Divergence] = {
    "forward": ForwardKL(),
    "reverse": ReverseKL(),
    "symmetric": SymmetricKL(0.3),
    "JSD": GeneralizedJSD(0.3),
    "total variation": TotalVariation(),
    "alpha": AlphaDivergence(0.4),
    "alpha above 1": AlphaDivergence(1.6),
    "alpha-beta that add up to 1": AlphaBeta(0.25, 0.75),
    "SKL": SkewKL(0.1),
    "SRKL": SkewReverseKL(0.1),
    "SRKL, detached": SkewReverseKL(0.1, detach_assistant=True),
    "sum": WeightedSum([ForwardKL(), SkewReverseKL(0.2)], [0.5, 2.0]),
    "reversed": Objective(ReverseKL(), ArithmeticMixture(0.4), ("assistant", "student")),
    "custom": SquaredHellinger(),
    "custom, skewed": Objective(SquaredHellinger(), Halved(), ("teacher", "assistant")),
    "custom composite": WeightedSum([Doubled(), ForwardKL()], [1.0, 0.5]),
}


def example(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, TopK]:
    """Logits of both models, labels of which some are −100, and the teacher's top k."""
    student = torch.randn(2, 5, V, dtype=dtype, requires_grad=True)
    teacher = 2 * torch.randn(2, 5, V, dtype=dtype)
    labels = torch.randint(0, V, (2, 5))
    found = top_k(teacher.view(-1, V), labels.view(-1), K)
    known = TopK(found.ids.view(2, 5, K), found.log_probs.view(2, 5, K), found.log_tail.view(2, 5), V)
    labels[0, :2] = -100
    return student, teacher, labels, known


def cut(log_q: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of k + 1 outcomes."""
    inside = log_q.gather(-1, ids)
    return torch.cat([inside, torch.log1p(-inside.exp().sum(-1, keepdim=True))], dim=-1)


@pytest.mark.parametrize("objective", BOUNDS.values(), ids=BOUNDS.keys())
def test_it_equals_the_divergence_on_k_plus_one_outcomes(objective: Divergence) -> None:
    check_lower_bound(objective)
    student, teacher, labels, known = example()
    counted = labels != -100
    loss = DistillationLoss(objective, reduction="sum", diagnostics=True)
    parts = loss.from_logits(student, known, labels)
    log_p = torch.cat([known.log_probs, known.log_tail.unsqueeze(-1)], dim=-1)[counted].double()
    expected = objective(log_p, cut(student.log_softmax(-1)[counted], known.ids[counted])).sum()
    torch.testing.assert_close(parts.loss, expected, atol=3e-6, rtol=3e-6)
    (found,), (gradient,) = (torch.autograd.grad(x, student) for x in (parts.loss, expected))
    torch.testing.assert_close(found, gradient, atol=3e-6, rtol=1e-5)

    full = DistillationLoss(objective, reduction="sum", diagnostics=True).from_logits(student, teacher, labels)
    assert (parts.values["kd"] <= full.values["kd"] + 1e-6).all()
    assert parts.loss < full.loss - 1e-2
    torch.testing.assert_close(parts.values["teacher_nll"], full.values["teacher_nll"], atol=1e-5, rtol=0)


def test_a_custom_f_divergence_equals_a_slow_loop_over_k_plus_one_outcomes() -> None:
    student, _, labels, known = example()
    loss = DistillationLoss(SquaredHellinger(), reduction="sum").from_logits(student, known, labels).loss
    slow = 0.0
    for row, t in (labels != -100).nonzero().tolist():
        q = student[row, t].softmax(-1).tolist()
        ids = known.ids[row, t].tolist()
        outcomes = list(zip(known.log_probs[row, t].exp().tolist(), (q[v] for v in ids), strict=True))
        outcomes.append((math.exp(float(known.log_tail[row, t])), 1 - math.fsum(q[v] for v in ids)))
        slow += math.fsum(0.5 * (math.sqrt(a) - math.sqrt(b)) ** 2 for a, b in outcomes)
    assert len(outcomes) == K + 1
    assert float(loss.detach()) == pytest.approx(slow, rel=1e-6)


def test_hidden_states_and_logits_agree() -> None:
    _, _, labels, known = example(torch.float32)
    hidden, head = torch.randn(2, 5, H), Head(torch.randn(V + 3, H), torch.randn(V + 3), scale=0.4, softcap=2.0)
    whole = 2.0 * torch.tanh(0.4 * (hidden @ head.weight.T + head.bias) / 2.0)
    loss = DistillationLoss(GeneralizedJSD(0.5), ce_weight=0.3, chunk=3)
    found, expected = loss.from_hidden(hidden, head, known, None, labels), loss.from_logits(whole, known, labels)
    torch.testing.assert_close(found.mean, expected.mean, atol=1e-6, rtol=1e-6)


def test_all_tokens_but_one_equal_the_full_distribution() -> None:
    student, teacher, labels, _ = example()
    found = top_k(teacher.view(-1, V), labels.view(-1).clamp_min(0), V - 1)
    known = TopK(found.ids.view(2, 5, -1), found.log_probs.view(2, 5, -1), found.log_tail.view(2, 5), V)
    loss = DistillationLoss(ReverseKL())
    values = [loss.from_logits(student, told, labels).loss for told in (known, teacher)]
    torch.testing.assert_close(*values, atol=1e-5, rtol=1e-6)


def test_the_label_is_always_included_and_the_mass_sums_to_one() -> None:
    logits, labels = 9 * torch.randn(40, V), torch.randint(0, V, (40,))
    known = top_k(logits, labels, 3)
    assert (known.ids == labels.unsqueeze(1)).any(1).all()
    assert all(len(set(row)) == 3 for row in known.ids.tolist())
    torch.testing.assert_close(known.log_probs.exp().sum(-1) + known.log_tail.exp(), torch.ones(40))


@pytest.mark.parametrize(
    ("part", "name"),
    [
        (AdaptiveKL(), "AdaptiveKL"),
        (AlphaBeta(0.2, 0.7), "AlphaBeta"),
        (TAID(), "TAID .its assistant is GeometricMixture"),
        (AMiD(ForwardKL(), 0.5, 0.3), "AMiD .its assistant is AlphaMixture"),
        (WeightedSum([ForwardKL(), AdaptiveKL()], [1.0, 1.0]), "AdaptiveKL"),
        (Contrastive(SkewKL(0.1), TAID()), "TAID"),
        (Objective(AdaptiveKL()), "AdaptiveKL"),
        (Undeclared(), "Undeclared"),
        (WeightedSum([SquaredHellinger(), Undeclared()], [1.0, 1.0]), "Undeclared"),
    ],
)
def test_divergences_without_a_lower_bound_are_refused(part: Divergence, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.* cannot be computed from a teacher's top-k log-probabilities"):
        check_lower_bound(part)
    with pytest.raises(ValueError, match=name):
        check_lower_bound(ForwardKL(), {"mine": part})


def test_it_must_match_the_student() -> None:
    student, _, labels, known = example()
    with pytest.raises(ValueError, match=r"top k refer to 50 tokens and the student has 40"):
        DistillationLoss(ForwardKL()).from_logits(student[..., :40], known, labels.clamp_max(39))
    with pytest.raises(ValueError, match=r"the labels' shape \[2, 5\], got \[2, 4\]"):
        DistillationLoss(ForwardKL()).from_logits(student, known[:, :-1], labels)
