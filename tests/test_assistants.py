"""Assistants are distributions between the two models and equal their definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kd_lightning.assistants import AlphaMixture, ArithmeticMixture, Assistant, GeometricMixture
from kd_lightning.functional import log_softmax
from kd_lightning.schedules import Linear, ResponseGap
from leaves import ASSISTANTS

every = pytest.mark.parametrize(("make", "slow"), ASSISTANTS.values(), ids=ASSISTANTS)


def logits(*shape: int, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape, dtype=torch.float64) * scale, torch.randn(*shape, dtype=torch.float64) * scale


@every
def test_equals_its_definition(make: Any, slow: Any) -> None:
    log_p, log_q = (log_softmax(x) for x in logits(5, 11))
    mine = make()(log_p, log_q).exp()
    expected = [slow(p, q) for p, q in zip(log_p.exp().tolist(), log_q.exp().tolist(), strict=True)]
    torch.testing.assert_close(mine, torch.tensor(expected, dtype=torch.float64))


@every
def test_is_a_distribution(make: Any, slow: Any) -> None:
    for scale in (1.0, 60.0):
        log_p, log_q = (log_softmax(x.float()) for x in logits(2, 3, 500, scale=scale))
        torch.testing.assert_close(make()(log_p, log_q).exp().sum(-1), torch.ones(2, 3))


@every
def test_is_both_where_they_agree(make: Any, slow: Any) -> None:
    log_p = log_softmax(logits(4, 50, scale=5.0)[0].float())
    assert (make()(log_p, log_p) - log_p).abs().max() < 5e-6


@every
def test_gradient_equals_finite_differences(make: Any, slow: Any) -> None:
    teacher, student = logits(3, 6)
    assistant, weights = make(), torch.randn(3, 6, dtype=torch.float64)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: weights * assistant(log_softmax(teacher), log_softmax(z)).exp(), student)


@every
def test_dead_columns_are_as_if_deleted(make: Any, slow: Any) -> None:
    teacher, student = logits(4, 7)
    expected = make()(log_softmax(teacher[:, :5]), log_softmax(student[:, :5]))
    teacher[:, 5:] = student[:, 5:] = -math.inf
    mine = make()(log_softmax(teacher), log_softmax(student))
    torch.testing.assert_close(mine[:, :5], expected)
    assert not mine[:, 5:].exp().any()


def same(a: Assistant, b: Assistant, tolerance: float = 1e-12) -> None:
    log_p, log_q = (log_softmax(x) for x in logits(5, 11))
    torch.testing.assert_close(a(log_p, log_q), b(log_p, log_q), rtol=tolerance, atol=tolerance)


def test_alpha_names_the_means() -> None:
    same(AlphaMixture(-1.0, 0.3), ArithmeticMixture(0.3))
    same(AlphaMixture(1.0, 0.3), GeometricMixture(0.3))
    for alpha in (1 - 1e-6, 1 + 1e-6):
        same(AlphaMixture(alpha, 0.3), GeometricMixture(0.3), 1e-4)
    log_p, log_q = (log_softmax(x) for x in logits(5, 11))
    harmonic = 1 / (0.3 / log_p.exp() + 0.7 / log_q.exp())
    mine = AlphaMixture(3.0, 0.3)(log_p, log_q).exp()
    torch.testing.assert_close(mine, harmonic / harmonic.sum(-1, keepdim=True))


def test_the_geometric_mixture_is_a_softmax_of_mixed_logits() -> None:
    teacher, student = logits(5, 11)
    mine = GeometricMixture(0.3)(log_softmax(teacher), log_softmax(student))
    torch.testing.assert_close(mine, torch.log_softmax(0.3 * teacher + 0.7 * student, -1))


def test_below_one_it_lives_where_either_does_from_one_on_where_both_do() -> None:
    log_p, log_q = (log_softmax(torch.tensor(x)) for x in ([0.0, 0.0, -math.inf], [0.0, -math.inf, 0.0]))
    for alpha in (-1.0, 0.0, 0.9):
        assert AlphaMixture(alpha, 0.5)(log_p, log_q).exp().min() > 0
    for alpha in (1.0, 3.0):
        r = AlphaMixture(alpha, 0.5)(log_p, log_q).exp()
        torch.testing.assert_close(r, torch.tensor([1.0, 0.0, 0.0]))


def test_a_schedule_moves_it_and_may_reach_the_ends() -> None:
    log_p, log_q = (log_softmax(x) for x in logits(5, 11))
    schedule = Linear(0.0, 1.0)
    for mixture in (ArithmeticMixture(schedule), GeometricMixture(schedule), AlphaMixture(0.5, schedule)):
        for progress, expected in ((0.0, log_q), (1.0, log_p)):
            schedule.update(progress, {})
            torch.testing.assert_close(mixture(log_p, log_q), expected)
        assert schedule in set(mixture.modules())


def test_a_schedule_may_differ_from_row_to_row() -> None:
    log_p, log_q = (log_softmax(x) for x in logits(2, 11))
    schedule = ResponseGap()
    schedule.update(0.0, {"gap": 0.25})
    rows = {
        "teacher_log_prob": torch.tensor([0.6, 0.5]).double().log(),
        "student_log_prob": torch.tensor([0.1, 0.255]).double().log(),
    }
    mixed, weights = ArithmeticMixture(schedule)(log_p, log_q, rows), schedule(rows)
    assert weights[0] != weights[1]
    for row in range(2):
        expected = ArithmeticMixture(weights[row].item())(log_p[row], log_q[row])
        torch.testing.assert_close(mixed[row], expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ArithmeticMixture(0.0), r"teacher_weight must be a number in \(0, 1\) or a schedule, got 0.0"),
        (lambda: GeometricMixture(1), r"teacher_weight must be a number in \(0, 1\) or a schedule, got 1"),
        (lambda: AlphaMixture(0.5, math.nan), "teacher_weight must be .*, got nan"),
        (lambda: AlphaMixture(math.inf, 0.5), "alpha must be a finite number, got inf"),
        (lambda: AlphaMixture(True, 0.5), "alpha must be a finite number, got True"),
    ],
)
def test_bad_arguments_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
