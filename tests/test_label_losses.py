"""Label losses: values by hand, gradients in expectation by exact enumeration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from kd_lightning.divergences import ForwardKL, ReverseKL
from kd_lightning.engine.top_k import TopK, top_k
from kd_lightning.functional import log_softmax
from kd_lightning.label_losses import ClippedPolicyGradient, CrossEntropy, LabelLoss, SampledReverseKL
from kd_lightning.losses import DistillationLoss
from leaves import LABEL_LOSSES, LabelLeaf
from slow_reference import Problem, problem


def test_cross_entropy_is_read_at_temperature_one() -> None:
    log_q = torch.tensor([-0.5, -2.0])
    assert CrossEntropy()(log_q, {}).tolist() == [0.5, 2.0]
    assert CrossEntropy().temperature == 1.0


# ----------------------------------------------------------------------------------------------- policy gradient
def policy(ratio: float, advantage: float, importance: float = 1.0, clip: float = 0.2) -> tuple[float, float]:
    """Loss and derivative for a given ratio of probabilities."""
    log_q = torch.tensor([math.log(0.3)], dtype=torch.float64, requires_grad=True)
    rows = {
        "advantage": torch.tensor([advantage], dtype=torch.float64),
        "old_log_prob": torch.tensor([math.log(0.3 / ratio)], dtype=torch.float64),
        "importance": torch.tensor([importance], dtype=torch.float64),
    }
    loss = ClippedPolicyGradient(clip)(log_q, rows)
    (gradient,) = torch.autograd.grad(loss.sum(), log_q)
    return loss.item(), gradient.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "derivative"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),  # good and already more likely: clipped
        (0.5, 2.0, -1.0, -1.0),
        (0.5, -2.0, 1.6, 0.0),  # bad and already less likely: clipped
        (1.5, -2.0, 3.0, 3.0),
    ],
)
def test_the_ratio_is_clipped_only_where_that_is_the_worse(
    ratio: float, advantage: float, loss: float, derivative: float
) -> None:
    assert policy(ratio, advantage) == pytest.approx((loss, derivative))


def test_the_importance_is_in_the_ratio_before_it_is_clipped() -> None:
    assert policy(1.0, 2.0, importance=1.5) == pytest.approx((-2.4, 0.0))
    assert policy(1.5, 2.0, importance=0.7) == pytest.approx((-2.1, -2.1))
    assert policy(1.5, 2.0, clip=0.6) == pytest.approx((-3.0, -3.0))


# --------------------------------------------------------------------------------------------------- estimators
def expectation(loss: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Σ_y q(y) loss(y) with the sampling held constant: value and gradient in the logits; p and q."""
    z = (torch.randn(9, dtype=torch.float64) * 1.5).requires_grad_()
    log_p, log_q = log_softmax(torch.randn(9, dtype=torch.float64) * 1.5), log_softmax(z)
    mean = (log_q.detach().exp() * loss(log_q, log_p)).sum()
    (gradient,) = torch.autograd.grad(mean, z)
    return mean.detach(), gradient, log_p.exp(), log_q.detach().exp()


def reverse_kl_gradient(p: Tensor, q: Tensor) -> Tensor:
    k = (q / p).log()
    return q * (k - (q * k).sum())


@pytest.mark.parametrize("estimator", ["k2", "k1_reward"])
def test_the_mean_gradient_is_that_of_reverse_kl(estimator: str) -> None:
    loss = SampledReverseKL(estimator)
    old_name = "teacher_token_log_prob"  # read before the name that the loss supplies
    mean, gradient, p, q = expectation(
        lambda log_q, log_p: loss(log_q, {old_name: log_p, "teacher_log_prob": torch.zeros_like(log_p)})
    )
    torch.testing.assert_close(gradient, reverse_kl_gradient(p, q))
    k = (q / p).log()
    torch.testing.assert_close(mean, (q * (k if estimator == "k1_reward" else k**2 / 2)).sum())


def test_the_estimators_that_are_not_offered_have_another_gradient() -> None:
    _, gradient, p, q = expectation(lambda log_q, log_p: torch.expm1(log_p - log_q) + log_q - log_p)
    torch.testing.assert_close(gradient, q - p)  # of forward KL
    assert (gradient - reverse_kl_gradient(p, q)).abs().max() > 1e-2
    _, gradient, _, _ = expectation(lambda log_q, log_p: log_q - log_p)
    assert gradient.abs().max() < 1e-12


# -------------------------------------------------------------------------------------------------------- every leaf
ROWS = {"teacher_log_prob": -1.9, "reverse_kl": 0.7, "advantage": 1.4, "old_log_prob": -0.9, "importance": 0.8}


@pytest.mark.parametrize("leaf", LABEL_LOSSES.values(), ids=LABEL_LOSSES)
@pytest.mark.parametrize("log_q", [-0.05, -0.6, -0.9, -3.0])
def test_value_and_derivative_equal_the_definition(leaf: LabelLeaf, log_q: float) -> None:
    x = torch.tensor([log_q], dtype=torch.float64, requires_grad=True)
    loss = leaf.make()(x, {name: torch.tensor([number], dtype=torch.float64) for name, number in ROWS.items()})
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert (loss.item(), gradient.item()) == pytest.approx(leaf.slow(log_q, ROWS), rel=1e-12)


# ------------------------------------------------------------------------------------------------- sampled in the loss
def enumerated(loss: SampledReverseKL, temperature: float, k: int | None) -> tuple[Tensor, Tensor]:
    """Expected gradient of the loss over all labels of one position, and that of reverse KL."""
    vocabulary = 9
    z = (torch.randn(vocabulary, dtype=torch.float64) * 1.5).requires_grad_()
    teacher = torch.randn(vocabulary, dtype=torch.float64) * 1.5
    labels = torch.arange(vocabulary).unsqueeze(0)
    known: Tensor | TopK = teacher.expand(1, vocabulary, -1)
    if k is not None:
        known = top_k(teacher.expand(vocabulary, -1), labels[0], k)
        known = TopK(known.ids[None], known.log_probs[None], known.log_tail[None], vocabulary)
    sampled = DistillationLoss(ForwardKL(), 1.0, temperature, "none", label_loss=loss, chunk=4)
    losses = sampled.from_logits(z.expand(1, vocabulary, -1), known, labels).loss
    q = torch.softmax(z.detach() / temperature, -1)
    (found,) = torch.autograd.grad((q * losses).sum(), z)
    whole = DistillationLoss(ReverseKL(), temperature=temperature, square_temperature=False)
    value = whole.from_logits(z.view(1, 1, -1), teacher.view(1, 1, -1), labels[:, :1]).loss
    return found, torch.autograd.grad(value, z)[0]


@pytest.mark.parametrize("k", [None, 1, 2, 4, 8])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("estimator", ["k2", "k1_reward"])
def test_the_expected_gradient_in_the_loss_is_that_of_reverse_kl(
    estimator: str, baseline: bool, temperature: float, k: int | None
) -> None:
    if k is not None and temperature != 1:
        return  # a top-k teacher is known at temperature 1 only
    found, expected = enumerated(SampledReverseKL(estimator, baseline), temperature, k)
    torch.testing.assert_close(found, expected, atol=1e-6 if k else 1e-12, rtol=1e-5 if k else 1e-9)
    assert expected.norm() > 0.05


class Read(LabelLoss):
    """Returns what the loss hands over."""

    temperature = None

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.columns = (name,)

    def forward(self, log_q_label: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        return rows[self.name] + 0 * log_q_label


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_every_label_loss_gets_the_teachers_log_probability_of_the_label(temperature: float) -> None:
    problem = Problem()
    log_q, log_p = (torch.log_softmax(x.detach() / temperature, -1) for x in problem.logits())
    counted = problem.labels != -100
    wanted = {
        "teacher_log_prob": log_p.gather(-1, problem.labels.clamp_min(0).unsqueeze(-1)).squeeze(-1),
        "student_log_prob": log_q.gather(-1, problem.labels.clamp_min(0).unsqueeze(-1)).squeeze(-1),
        "reverse_kl": ReverseKL()(log_p, log_q),
    }
    for name, expected in wanted.items():
        loss = DistillationLoss(ForwardKL(), 1.0, temperature, label_loss=Read(name), chunk=2)
        for parts in (loss.from_hidden(*problem.hidden), loss.from_logits(*problem.logits(), problem.labels)):
            torch.testing.assert_close(parts.values["ce"], expected[counted])


def test_the_default_is_to_be_handed_the_teachers_log_probability() -> None:
    class Custom(LabelLoss):
        def forward(self, log_q_label: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
            return log_q_label - rows["teacher_log_prob"]

    problem = Problem()
    assert DistillationLoss(ForwardKL(), 1.0, label_loss=Custom()).reads_teacher
    assert not DistillationLoss(ForwardKL(), 1.0).reads_teacher
    parts = DistillationLoss(ForwardKL(), 0.5, label_loss=Custom(), diagnostics=True).from_hidden(*problem.hidden)
    torch.testing.assert_close(parts.values["ce"], parts.values["teacher_nll"] - parts.values["student_nll"])


def test_with_a_top_k_teacher_the_label_is_exact_and_the_baseline_is_the_same_for_every_label() -> None:
    vocabulary, k = 23, 5
    student, teacher = (torch.randn(vocabulary, dtype=torch.float64) * 2 for _ in range(2))
    labels = torch.arange(vocabulary)
    known = top_k(teacher.expand(vocabulary, -1), labels, k)
    order = torch.randperm(k)  # the label may stand anywhere
    known = TopK(known.ids[:, order], known.log_probs[:, order], known.log_tail, vocabulary)

    def read(name: str) -> Tensor:
        loss = DistillationLoss(ForwardKL(), 1.0, label_loss=Read(name), chunk=4)
        return loss.from_logits(student.expand(vocabulary, -1), known, labels).values["ce"]

    torch.testing.assert_close(read("teacher_log_prob"), torch.log_softmax(teacher, -1), atol=1e-6, rtol=1e-6)
    top = teacher.argsort(descending=True)[: k - 1]
    p, q = (torch.softmax(x, -1)[top] for x in (teacher, student))
    p, q = (torch.cat([x, 1 - x.sum(0, keepdim=True)]) for x in (p, q))
    torch.testing.assert_close(read("reverse_kl"), (q * (q / p).log()).sum().expand(vocabulary), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_sampled_reverse_kl_equals_its_slow_loop_in_every_chunk(chunk: int) -> None:
    arguments = problem()
    x, w, y, v, labels = arguments.values()
    rows = {"importance": torch.rand(labels.shape, dtype=torch.float64)}
    loss = DistillationLoss(ForwardKL(), 1.0, label_loss=SampledReverseKL("k1_reward", True), chunk=chunk)
    parts = loss.from_hidden(**arguments, rows=rows)
    log_p, log_q = torch.log_softmax(y @ v.T, -1), torch.log_softmax(x @ w.T, -1)
    slow = []
    for t, label in enumerate(labels[0].tolist()):
        p, q = log_p[0, t], log_q[0, t]
        baseline = math.fsum(math.exp(a) * (a - b) for a, b in zip(q.tolist(), p.tolist(), strict=True))
        reward = float(q[label].detach() - p[label])
        slow.append(rows["importance"][0, t] * (reward - baseline) * q[label])
        assert float(parts.values["ce"][t]) == pytest.approx(float(rows["importance"][0, t]) * reward)
    expected = torch.autograd.grad(torch.stack(slow).mean(), (x, w))
    for mine, theirs in zip(torch.autograd.grad(parts.mean, (x, w)), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


# ---------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("loss", "names"),
    [
        (ClippedPolicyGradient(), ("advantage", "old_log_prob", "importance")),
        (SampledReverseKL(), ("teacher_log_prob",)),
        (SampledReverseKL(baseline=True), ("teacher_log_prob", "reverse_kl")),
    ],
    ids=["ClippedPolicyGradient", "SampledReverseKL", "SampledReverseKL(baseline)"],
)
def test_a_missing_column_is_named(loss: LabelLoss, names: tuple[str, ...]) -> None:
    for missing in names:
        rows = {name: torch.zeros(2) for name in names if name != missing}
        with pytest.raises(ValueError, match=f"missing column '{missing}' in rows, which .* reads"):
            loss(torch.zeros(2), rows)
    assert loss.temperature is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClippedPolicyGradient(0.0), r"clip must be a number in \(0, 1\), got 0.0"),
        (lambda: ClippedPolicyGradient("0.2"), r"clip must be a number in \(0, 1\), got '0.2'"),  # type: ignore[arg-type]
        (lambda: SampledReverseKL("k3"), "estimator must be 'k2' or 'k1_reward', got 'k3'"),
        (lambda: SampledReverseKL(baseline=0.5), "baseline must be True or False, got 0.5"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
