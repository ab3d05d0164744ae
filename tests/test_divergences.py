"""Generic tests of every divergence and objective in `leaves.py`, followed by tests of single ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from kd_lightning.divergences import (
    AdaptiveKL,
    AlphaBeta,
    AlphaDivergence,
    Composite,
    Divergence,
    ForwardKL,
    GeneralizedJSD,
    ReverseKL,
    SymmetricKL,
    TotalVariation,
    WeightedSum,
    evaluate,
)
from kd_lightning.functional import log_softmax
from kd_lightning.schedules import Linear, ResponseGap
from leaves import ALL, Leaf

every = pytest.mark.parametrize("leaf", ALL.values(), ids=ALL)
smooth = pytest.mark.parametrize(
    "leaf", [x for x in ALL.values() if not x.detached], ids=[name for name, x in ALL.items() if not x.detached]
)
bounded = pytest.mark.parametrize(
    "leaf", [x for x in ALL.values() if not x.negative], ids=[name for name, x in ALL.items() if not x.negative]
)


def call(leaf: Leaf, divergence: Divergence, log_p: Tensor, log_q: Tensor) -> Tensor:
    return evaluate(divergence, log_p, log_q, leaf.columns(log_p))


def value_and_gradient(leaf: Leaf, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """Values per token, and the gradient of their sum with respect to the student's logits."""
    student = student.detach().requires_grad_()
    values = call(leaf, leaf.make(), log_softmax(teacher), log_softmax(student))
    (gradient,) = torch.autograd.grad(values.sum(), student)
    return values.detach(), gradient


def logits(*shape: int, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape, dtype=torch.float64) * scale, torch.randn(*shape, dtype=torch.float64) * scale


def probabilities(x: Tensor) -> list[float]:
    return log_softmax(x).exp().tolist()  # type: ignore[no-any-return]


# -------------------------------------------------------------------------------------------------------- every leaf
@every
def test_equals_its_definition(leaf: Leaf) -> None:
    teacher, student = logits(5, 13)
    values, _ = value_and_gradient(leaf, teacher, student)
    slow = [leaf.slow(probabilities(x), probabilities(y)) for x, y in zip(teacher, student, strict=True)]
    torch.testing.assert_close(values, torch.tensor(slow, dtype=torch.float64), rtol=1e-7, atol=1e-9)


@smooth
def test_gradient_equals_finite_differences(leaf: Leaf) -> None:
    teacher, student = logits(3, 7, scale=1.0)
    divergence = leaf.make()
    inputs = student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: call(leaf, divergence, log_softmax(teacher), log_softmax(z)), inputs)


@every
def test_zero_with_zero_gradient_where_the_models_agree(leaf: Leaf) -> None:
    teacher, _ = logits(4, 50, scale=4.0)
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        values, gradient = value_and_gradient(leaf, teacher.to(dtype), teacher.to(dtype))
        if leaf.negative:  # every term is multiplied by a power of 1/q
            tolerance *= 1e4
        assert values.abs().max() <= tolerance
        assert gradient.abs().max() <= tolerance


@pytest.mark.parametrize(
    "leaf", [x for x in ALL.values() if not x.partial], ids=[name for name, x in ALL.items() if not x.partial]
)
def test_positive_where_they_differ(leaf: Leaf) -> None:
    teacher, _ = logits(4, 50)
    student = teacher + 0.1 * torch.randn_like(teacher)
    values, _ = value_and_gradient(leaf, teacher, student)
    assert values.min() > 1e-5


@every
def test_never_below_zero_by_more_than_fp32_can_tell(leaf: Leaf) -> None:
    teacher = torch.randn(32, 2000) * 4
    for distance in (1e-5, 1e-4, 1e-3, 1e-2):
        values, _ = value_and_gradient(leaf, teacher, teacher + distance * torch.randn_like(teacher))
        assert values.min() >= -1e-6


@bounded
@pytest.mark.parametrize("factor", [60.0, 3 / 0.05], ids=["scale 60", "temperature 0.05"])
def test_finite_on_peaked_rows(leaf: Leaf, factor: float) -> None:
    teacher, student = logits(8, 300, scale=1.0)
    values, gradient = value_and_gradient(leaf, (factor * teacher).float(), (factor * student).float())
    assert values.isfinite().all()
    assert gradient.isfinite().all()
    exact, exact_gradient = value_and_gradient(leaf, factor * teacher, factor * student)
    torch.testing.assert_close(values.double(), exact, rtol=1e-4, atol=1e-4)
    scale = exact_gradient.abs().max().clamp_min(1)
    torch.testing.assert_close(gradient / scale, (exact_gradient / scale).float(), rtol=0, atol=1e-3)


@every
def test_fp32_keeps_what_fp32_can(leaf: Leaf) -> None:
    teacher, _ = logits(4, 500)
    for distance, tolerance in ((1.0, 2e-5), (0.05, 5e-4)):
        student = teacher + distance * torch.randn_like(teacher)
        exact, exact_gradient = value_and_gradient(leaf, teacher, student)
        values, gradient = value_and_gradient(leaf, teacher.float(), student.float())
        assert (values - exact).abs().max() < tolerance * exact.abs().max() + 5e-7
        assert (gradient - exact_gradient).norm() / exact_gradient.norm() < tolerance


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dead_columns_are_as_if_deleted(leaf: Leaf, dtype: torch.dtype) -> None:
    teacher, student = (x.to(dtype) for x in logits(4, 9))
    alive = [0, 2, 3, 6, 8]
    expected = value_and_gradient(leaf, teacher[:, alive], student[:, alive])
    dead = torch.ones(9, dtype=torch.bool)
    dead[alive] = False
    values, gradient = value_and_gradient(
        leaf, teacher.masked_fill(dead, -math.inf), student.masked_fill(dead, -math.inf)
    )
    torch.testing.assert_close(values, expected[0])
    torch.testing.assert_close(gradient[:, alive], expected[1])
    assert not gradient[:, dead].any()


@bounded
def test_a_column_dead_in_one_model_is_no_fault(leaf: Leaf) -> None:
    teacher, student = (x.float() for x in logits(4, 9))
    teacher[:, 2], student[:, 5] = -math.inf, -math.inf
    for x in value_and_gradient(leaf, teacher, student):
        assert x.isfinite().all()


@every
def test_a_batch_is_its_rows(leaf: Leaf) -> None:
    teacher, student = logits(2, 3, 11)
    values, gradient = value_and_gradient(leaf, teacher, student)
    assert values.shape == (2, 3)
    for b in range(2):
        for t in range(3):
            value, row = value_and_gradient(leaf, teacher[b, t], student[b, t])
            torch.testing.assert_close(values[b, t], value)
            torch.testing.assert_close(gradient[b, t], row)


@every
def test_captured_whole_with_its_gradient(leaf: Leaf) -> None:
    divergence = leaf.make()
    log_p, log_q = (log_softmax(x) for x in logits(3, 11))
    rows = leaf.columns(log_p)

    def step(log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        values, pull = torch.func.vjp(lambda x: evaluate(divergence, log_p, x, rows), log_q)[:2]
        return values, pull(torch.ones_like(values))[0]

    torch._dynamo.reset()
    captured = torch.compile(step, backend="eager", fullgraph=True)(log_p, log_q, rows)
    for mine, expected in zip(captured, step(log_p, log_q, rows), strict=True):
        torch.testing.assert_close(mine, expected)


@every
def test_half_precision_logits_are_computed_in_fp32(leaf: Leaf) -> None:
    teacher, student = (x.bfloat16() for x in logits(3, 11))
    values, gradient = value_and_gradient(leaf, teacher, student)
    expected, expected_gradient = value_and_gradient(leaf, teacher.float(), student.float())
    assert values.dtype == torch.float32
    assert torch.equal(values, expected)
    torch.testing.assert_close(gradient, expected_gradient.bfloat16())


@every
def test_moves_between_dtypes_and_copies(leaf: Leaf) -> None:
    teacher, student = (log_softmax(x) for x in logits(3, 11))
    divergence = leaf.make()
    expected = call(leaf, divergence, teacher, student)
    twin = leaf.make()
    twin.load_state_dict(divergence.state_dict())
    for other in (divergence.bfloat16(), divergence.double(), twin):
        assert torch.equal(call(leaf, other, teacher, student), expected)
    assert type(divergence).__name__ in repr(divergence)


# ------------------------------------------------------------------------------------------------- one leaf or another
def same(a: Divergence, b: Divergence, tolerance: float = 1e-10, scale: float = 1.0) -> None:
    """Check that a equals b times `scale` in value and gradient."""
    teacher, student = logits(5, 17)
    one, other = (value_and_gradient(Leaf(lambda d=d: d, _none), teacher, student) for d in (a, b))  # type: ignore[misc]
    torch.testing.assert_close(one[0], other[0] * scale, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(one[1], other[1] * scale, rtol=tolerance, atol=tolerance)


def _none(p: Any, q: Any) -> float:
    raise NotImplementedError


@pytest.mark.parametrize(
    ("special", "general"),
    [
        (ForwardKL(), SymmetricKL(1.0)),
        (ReverseKL(), SymmetricKL(0.0)),
        (ForwardKL(), AdaptiveKL(1.0)),
        (ForwardKL(), AlphaDivergence(1)),
        (ReverseKL(), AlphaDivergence(0)),
        (ForwardKL(), AlphaBeta(1, 0)),
        (ReverseKL(), AlphaBeta(0, 1)),
        (AlphaDivergence(0.3), AlphaBeta(0.3, 0.7)),
    ],
    ids=repr,
)
def test_reduces_to(special: Divergence, general: Divergence) -> None:
    same(special, general)


@pytest.mark.parametrize(
    ("point", "direction"),
    [
        ((1.0, 0.0), (0, 1)),
        ((0.0, 1.0), (1, 0)),
        ((0.5, 0.0), (1, -1)),
        ((0.0, 0.5), (-1, 1)),
        ((0.5, -0.5), (1, 0)),
        ((0.3, 0.3), (1, -1)),  # where the larger exponent changes
        ((0.0, 0.0), (1, 1)),
        ((0.0, 0.0), (1, -1)),
    ],
)
def test_every_limit_of_the_alpha_beta_plane_is_continuous(point: Any, direction: Any) -> None:
    step = 1e-6
    for sign in (step, -step):
        same(AlphaBeta(*point), AlphaBeta(point[0] + sign * direction[0], point[1] + sign * direction[1]), 1e-3)


@pytest.mark.parametrize("pair", [(0.2, 0.7), (0.7, 0.2), (0.5, -0.5), (2, -0.5), (0.4, 0.4), (0.5, 0.0), (0, 0)])
def test_swapping_the_exponents_swaps_the_models(pair: Any) -> None:
    log_p, log_q = (log_softmax(x) for x in logits(5, 17))
    alpha, beta = pair
    torch.testing.assert_close(AlphaBeta(alpha, beta)(log_p, log_q), AlphaBeta(beta, alpha)(log_q, log_p))


def test_alpha_one_half_is_hellinger() -> None:
    log_p, log_q = (log_softmax(x) for x in logits(5, 17))
    torch.testing.assert_close(
        AlphaDivergence(0.5)(log_p, log_q), 4 * (1 - ((log_p + log_q) / 2).exp().sum(-1)), rtol=1e-9, atol=1e-12
    )


def test_jsd_over_beta_tends_to_the_kl_divergences_but_vanishes_at_the_ends() -> None:
    same(ForwardKL(), GeneralizedJSD(1e-5), 3e-2, scale=1e5)
    same(ReverseKL(), GeneralizedJSD(1 - 1e-5), 3e-2, scale=1e5)
    log_p, log_q = (log_softmax(x) for x in logits(5, 17))
    schedule = Linear(0.0, 1.0)
    for progress in (0.0, 1.0):
        schedule.update(progress, {})
        assert GeneralizedJSD(schedule)(log_p, log_q).abs().max() < 1e-12


def test_symmetric_jsd_is_symmetric_and_others_are_not() -> None:
    log_p, log_q = (log_softmax(x) for x in logits(5, 17))
    torch.testing.assert_close(GeneralizedJSD()(log_p, log_q), GeneralizedJSD()(log_q, log_p))
    torch.testing.assert_close(GeneralizedJSD(0.1)(log_p, log_q), GeneralizedJSD(0.9)(log_q, log_p))
    assert (GeneralizedJSD(0.1)(log_p, log_q) - GeneralizedJSD(0.1)(log_q, log_p)).abs().max() > 1e-3


def test_weights_of_adaptive_kl_are_constants() -> None:
    log_p, log_q = (log_softmax(x) for x in logits(1, 17))
    log_q.requires_grad_()
    (gradient,) = torch.autograd.grad(AdaptiveKL()(log_p, log_q).sum(), log_q)
    forward, reverse = ForwardKL()(log_p, log_q), ReverseKL()(log_p, log_q)
    w = ((AdaptiveKL()(log_p, log_q) - reverse) / (forward - reverse)).detach()
    (expected,) = torch.autograd.grad((w * forward + (1 - w) * reverse).sum(), log_q)
    torch.testing.assert_close(gradient, expected)


def test_head_rules_of_adaptive_kl() -> None:
    log_p = torch.tensor([0.4, 0.3, 0.2, 0.1]).double().log()
    log_q = torch.tensor([0.1, 0.2, 0.3, 0.4]).double().log()  # gaps 0.3, 0.1, 0.1, 0.3
    forward, reverse = ForwardKL()(log_p, log_q), ReverseKL()(log_p, log_q)
    assert forward.isclose(reverse)
    log_q = torch.tensor([0.05, 0.3, 0.35, 0.3]).double().log()  # gaps 0.35, 0, 0.15, 0.2
    forward, reverse = ForwardKL()(log_p, log_q), ReverseKL()(log_p, log_q)

    def share(**arguments: Any) -> float:
        return ((AdaptiveKL(**arguments)(log_p, log_q) - reverse) / (forward - reverse)).item()

    assert share(mu=0.8) == pytest.approx(0.5 / 0.7)  # 0.4 + 0.3 < 0.8: the third is in
    assert share(mu=0.8, head_rule="official") == pytest.approx(0.35 / 0.7)  # the third crosses: out
    for rule in ("covering", "official"):
        assert share(mu=0.1, head_rule=rule) == pytest.approx(0.35 / 0.7)  # the first is in for any μ
        assert share(mu=1.0, head_rule=rule) == pytest.approx(1.0)  # all are in, although the sum rounds


class Hellinger(Divergence):
    """A custom divergence."""

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return 1 - ((log_p + log_q) / 2).exp().sum(-1)


class Column(Composite):
    """A custom divergence that reads an extra input per token."""

    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        assert rows is not None
        return rows["x"] * ForwardKL()(log_p, log_q)


def test_a_sum_hands_rows_on_and_moves_with_its_schedules() -> None:
    log_p, log_q = (log_softmax(x) for x in logits(3, 5))
    schedule = Linear(0.5, 1.0)
    total = WeightedSum([Hellinger(), Column()], [schedule, 2])
    assert schedule in set(total.modules())
    rows = {"x": torch.tensor([1.0, 2.0, 3.0])}
    expected = 0.5 * Hellinger()(log_p, log_q) + 2 * rows["x"] * ForwardKL()(log_p, log_q)
    torch.testing.assert_close(total(log_p, log_q, rows), expected)
    schedule.update(1.0, {})
    torch.testing.assert_close(total(log_p, log_q, rows), expected + 0.5 * Hellinger()(log_p, log_q))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GeneralizedJSD(0), r"beta must be a number in \(0, 1\) .*ForwardKL.*ReverseKL.*, got 0$"),
        (lambda: GeneralizedJSD(1.0), r"beta must be a number in \(0, 1\) .*ForwardKL.*ReverseKL.*, got 1.0$"),
        (lambda: GeneralizedJSD(True), "beta must be a number in .* got True"),
        (lambda: GeneralizedJSD(ResponseGap()), "beta must be a number or a schedule with one value for all tokens"),
        (lambda: SymmetricKL(1.5), r"forward_weight must be a number in \[0, 1\] or a schedule, got 1.5"),
        (lambda: SymmetricKL("0.5"), "forward_weight must be a number in .*, got '0.5'"),  # type: ignore[arg-type]
        (lambda: SymmetricKL(math.nan), "forward_weight must be a number in .*, got nan"),
        (lambda: AdaptiveKL(0.0), r"mu must be a number in \(0, 1\], got 0.0"),
        (lambda: AdaptiveKL(head_rule="paper"), "head_rule must be 'covering' or 'official', got 'paper'"),
        (lambda: AlphaDivergence(math.inf), "alpha must be a finite number, got inf"),
        (lambda: AlphaBeta(None, 1.0), "alpha must be a finite number, got None"),  # type: ignore[arg-type]
        (lambda: AlphaBeta(1.0, math.nan), "beta must be a finite number, got nan"),
        (lambda: WeightedSum([], []), "divergences and weights must have the same length, at least 1, got 0 and 0"),
        (
            lambda: WeightedSum([ForwardKL()], [1.0, 2.0]),
            "divergences and weights must have the same length, .* got 1 and 2",
        ),
        (
            lambda: WeightedSum([ForwardKL()], [-1.0]),
            r"weights\[0\] must be .* ≥ 0 or a schedule, got -1.0",
        ),
        (lambda: WeightedSum([TotalVariation], [1.0]), r"divergences\[0\] must be a Divergence"),  # type: ignore[list-item]
    ],
)
def test_bad_arguments_are_refused_in_one_line(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
