"""Numerics of the formulas that the generic tests of divergences do not cover."""

from __future__ import annotations

import math

import pytest
import torch

from kd_lightning import functional
from kd_lightning.functional import FLOOR, log_softmax


def pair(*shape: int, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = (log_softmax(torch.randn(*shape, dtype=torch.float64) * scale) for _ in range(2))
    return a, b


@pytest.mark.parametrize(
    ("given", "computed"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_log_softmax_is_fp32_at_least(given: torch.dtype, computed: torch.dtype) -> None:
    logits = torch.randn(3, 7).to(given)
    assert log_softmax(logits).dtype == computed
    torch.testing.assert_close(log_softmax(logits), torch.log_softmax(logits.to(computed), -1))


def test_log_softmax_is_clamped_where_exp_is_zero() -> None:
    logits = torch.tensor([0.0, 1.0, -math.inf, -3e4], requires_grad=True)
    log_p = log_softmax(logits)
    assert log_p[2] == log_p[3] == FLOOR
    assert log_p.exp()[2] == 0
    (gradient,) = torch.autograd.grad(log_p.sum(), logits)
    assert gradient.isfinite().all()


# -------------------------------------------------------------------------------------------------------- AKL's head
def head_by_sorting(log_p: torch.Tensor, mu: float, rule: str) -> torch.Tensor:
    values, order = log_p.sort(dim=-1, descending=True, stable=True)
    mass = values.exp().cumsum(-1)
    head = mass - values.exp() < mu if rule == "covering" else mass <= mu
    head[..., 0] = True
    return torch.zeros_like(head).scatter(-1, order, head)


@pytest.mark.parametrize("rule", ["covering", "official"])
@pytest.mark.parametrize("mu", [0.01, 0.25, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bisection_finds_the_head_that_a_sort_finds(dtype: torch.dtype, mu: float, rule: str) -> None:
    for scale in (0.3, 2.0, 10.0):
        log_p = log_softmax(torch.randn(50, 1000).to(dtype) * scale)
        assert torch.equal(functional.head_mask(log_p, mu, rule), head_by_sorting(log_p, mu, rule))


def test_equal_probabilities_go_together() -> None:
    log_p = torch.tensor([0.3, 0.2, 0.2, 0.2, 0.1]).double().log()
    assert functional.head_mask(log_p, 0.4).tolist() == [True, True, True, True, False]
    assert functional.head_mask(log_p, 0.6, "official").tolist() == [True, False, False, False, False]
    assert functional.head_mask(torch.full((8,), 1 / 8).log(), 0.5).all()


def test_the_head_of_a_certain_teacher_is_one_token() -> None:
    log_p = log_softmax(torch.tensor([0.0, 900.0, -math.inf, 3.0]))
    for rule in ("covering", "official"):
        assert functional.head_mask(log_p, 0.5, rule).tolist() == [False, True, False, False]


# ------------------------------------------------------------------------------------------------------- the α-β plane
def test_the_gradient_is_right_where_single_entries_agree() -> None:
    log_p, log_q = pair(3, 9)
    log_q[:, :3] = log_p[:, :3]  # x = 0: where sign, abs, copysign and clamp have another gradient
    log_q = log_q.requires_grad_()
    for alpha, beta in ((0.2, 0.7), (0.5, 0.0), (0.5, -0.5), (-0.2, 0.9)):
        (gradient,) = torch.autograd.grad(functional.alpha_beta(log_p, log_q, alpha, beta).sum(), log_q)
        s, x = alpha + beta, log_p - log_q.detach()
        exact = -(s * log_q.detach()).exp() * torch.expm1(alpha * x) / alpha
        torch.testing.assert_close(gradient, exact)


def test_the_accuracy_does_not_depend_on_small_exponents() -> None:
    log_p, log_q = pair(8, 200)
    for alpha, beta in ((0.7, 1e-5), (1e-5, 0.7), (0.7, 1e-3)):
        exact = functional.alpha_beta(log_p, log_q, alpha, beta)
        torch.testing.assert_close(
            functional.alpha_beta(log_p.float(), log_q.float(), alpha, beta).double(), exact, rtol=1e-5, atol=1e-6
        )


# ------------------------------------------------------------------------------------------------------------- mixtures
@pytest.mark.parametrize("k", [-3.0, -1e-2, -1e-7, 0.0, 1e-7, 1e-5, 1e-3, 1e-2, 0.25, 0.49, 0.5, 1.0, 3.0])
def test_mixtures_are_accurate_for_every_exponent(k: float) -> None:
    log_p, log_q = pair(20, 300, scale=3.0)
    weight, p, q = 0.3, log_p.exp(), log_q.exp()
    if abs(k) < 1e-4:  # two terms of the series in k, which is exact to k²
        mean = weight * log_p + (1 - weight) * log_q
        h = mean + k / 2 * weight * (1 - weight) * (log_p - log_q) ** 2
    else:
        h = (weight * p**k + (1 - weight) * q**k).log() / k
    exact = h - h.exp().sum(-1, keepdim=True).log()
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 2e-5)):
        mine = functional.alpha_mixture(log_p.to(dtype), log_q.to(dtype), 1 - 2 * k, weight)
        assert (mine - exact).abs().max() < tolerance


@pytest.mark.parametrize("alpha", [-5.0, -1.0, 0.0, 0.9, 1.0, 3.0])
def test_a_weight_at_its_ends_gives_one_of_the_two(alpha: float) -> None:
    log_p, log_q = pair(4, 30, scale=3.0)
    log_q = log_q.requires_grad_()
    for end, model in ((torch.tensor(0.0), log_q), (torch.tensor(1.0), log_p)):
        log_r = functional.alpha_mixture(log_p, log_q, alpha, end)
        torch.testing.assert_close(log_r, model)
        (gradient,) = torch.autograd.grad((log_p * log_r).sum(), log_q)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("alpha", [-5.0, -1.0, 0.5, 1.0, 3.0])
def test_a_weight_per_row_is_the_weight_of_that_row(alpha: float) -> None:
    log_p, log_q = pair(2, 3, 7)
    weights = torch.rand(2, 3, dtype=torch.float64)
    batch = functional.alpha_mixture(log_p, log_q, alpha, weights)
    for b in range(2):
        for t in range(3):
            row = functional.alpha_mixture(log_p[b, t], log_q[b, t], alpha, weights[b, t].item())
            torch.testing.assert_close(batch[b, t], row)


def test_peaked_mixtures_stay_finite() -> None:
    log_p, log_q = (x.float().requires_grad_() for x in pair(6, 100, scale=400.0))
    for alpha in (-9.0, -1.0, 0.9, 0.999999, 1.0, 1.1, 3.0, 9.0):
        log_r = functional.alpha_mixture(log_p, log_q, alpha, 0.3)
        (gradient,) = torch.autograd.grad((log_r.exp() * log_r).sum(), log_q)
        assert log_r.isfinite().all()
        assert gradient.isfinite().all()
        torch.testing.assert_close(log_r.exp().sum(-1), torch.ones(6))
