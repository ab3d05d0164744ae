"""Label losses: values by hand, gradients in expectation by exact enumeration."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kd_lightning.functional import log_softmax
from kd_lightning.label_losses import ClippedPolicyGradient, CrossEntropy, LabelLoss, SampledReverseKL


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
    mean, gradient, p, q = expectation(lambda log_q, log_p: loss(log_q, {"teacher_token_log_prob": log_p}))
    torch.testing.assert_close(gradient, reverse_kl_gradient(p, q))
    k = (q / p).log()
    torch.testing.assert_close(mean, (q * (k if estimator == "k1_reward" else k**2 / 2)).sum())


def test_the_estimators_that_are_not_offered_have_another_gradient() -> None:
    _, gradient, p, q = expectation(lambda log_q, log_p: torch.expm1(log_p - log_q) + log_q - log_p)
    torch.testing.assert_close(gradient, q - p)  # of forward KL
    assert (gradient - reverse_kl_gradient(p, q)).abs().max() > 1e-2
    _, gradient, _, _ = expectation(lambda log_q, log_p: log_q - log_p)
    assert gradient.abs().max() < 1e-12


# ---------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("loss", "names"),
    [
        (ClippedPolicyGradient(), ("advantage", "old_log_prob", "importance")),
        (SampledReverseKL(), ("teacher_token_log_prob",)),
    ],
    ids=["ClippedPolicyGradient", "SampledReverseKL"],
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
    ],
)
def test_bad_arguments_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
