"""Losses on batches: equal to a slow loop in float64 for every path, mask, vocabulary, reduction and precision."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kd_lightning.engine.head import Head
from kd_lightning.losses import DistillationLoss, distillation_loss, fused_distillation_loss
from slow_reference import (
    HT,
    B,
    DetachedMixture,
    Forward,
    Hellinger,
    Problem,
    Reverse,
    T,
    V,
    error,
    logits,
    reduce,
    token_losses,
)

OBJECTIVES = [Forward(), Reverse(), Hellinger(), DetachedMixture()]


SETTINGS = [
    {},
    {"temperature": 2.0},
    {"temperature": 0.5, "square_temperature": False},
    {"ce_weight": 0.3},
    {"ce_weight": 0.3, "temperature": 2.0},
    {"ce_weight": 1.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda x: type(x).__name__)
def test_both_paths_equal_the_slow_loop_in_value_and_gradient(objective: Any, settings: dict[str, Any]) -> None:
    problem = Problem()
    for reduction in ("token_mean", "sequence_mean", "sum"):
        expected = reduce(token_losses(*problem.logits(), problem.labels, objective, **settings), reduction)
        wanted = problem.gradients(expected)
        student, teacher = problem.logits()
        whole = distillation_loss(
            student, teacher, problem.labels, objective=objective, reduction=reduction, **settings
        )
        fused = fused_distillation_loss(
            *problem.hidden, objective=objective, reduction=reduction, chunk=2, compile=False, **settings
        )
        for loss in (whole, fused):
            torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
            for mine, reference in zip(problem.gradients(loss), wanted, strict=True):
                assert error(mine, reference) < 1e-12


@pytest.mark.parametrize("ce_weight", [0.0, 0.4])
@pytest.mark.parametrize("path", ["logits", "hidden"])
def test_without_reduction_every_token_has_its_loss_and_takes_any_weight(path: str, ce_weight: float) -> None:
    problem = Problem()
    settings: dict[str, Any] = {"objective": Reverse(), "ce_weight": ce_weight, "temperature": 2.0}
    weights = torch.randn(B, T, dtype=torch.float64)
    expected = torch.zeros(B, T, dtype=torch.float64)
    counted = problem.labels != -100
    tokens = [x for response in token_losses(*problem.logits(), problem.labels, **settings) for x in response]
    expected[counted] = torch.stack(tokens)
    if path == "logits":
        loss = distillation_loss(*problem.logits(), problem.labels, reduction="none", **settings)
    else:
        loss = fused_distillation_loss(*problem.hidden, reduction="none", chunk=2, **settings)
    torch.testing.assert_close(loss, expected)
    for _ in range(2):  # a second backward computes everything again
        mine = torch.autograd.grad((loss * weights).sum(), problem.leaves, retain_graph=True)
        wanted = torch.autograd.grad((expected * weights).sum(), problem.leaves, retain_graph=True)
        assert max(map(error, mine, wanted)) < 1e-12


@pytest.mark.parametrize("near", [False, True], ids=["far", "near"])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, (3e-6, 5e-5)), (torch.bfloat16, (2.5e-3, 2.5e-3))], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("objective", OBJECTIVES[:3], ids=lambda x: type(x).__name__)
def test_gradients_are_as_exact_as_their_dtype_also_where_the_models_nearly_agree(
    objective: Any, dtype: torch.dtype, bound: tuple[float, float], near: bool
) -> None:
    g = torch.Generator().manual_seed(2)
    n, vocabulary, width = 48, 2048, 64
    hidden = torch.randn(1, n, width, generator=g).to(dtype)
    weight = torch.randn(vocabulary, width, generator=g).to(dtype) / 4
    other = torch.randn(vocabulary, width, generator=g)
    teacher_weight = weight + (0.05 * other / 4).to(dtype) if near else (other / 4).to(dtype)
    teacher_hidden = hidden if near else torch.randn(1, n, width, generator=g).to(dtype)
    labels = torch.randint(0, vocabulary, (1, n), generator=g)
    leaves = [x.double().requires_grad_() for x in (hidden, weight)]
    student, teacher = leaves[0] @ leaves[1].T, teacher_hidden.double() @ teacher_weight.double().T
    log_q, log_p = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    wanted = torch.autograd.grad(objective(log_p, log_q).mean(), leaves)
    mine = [x.requires_grad_() for x in (hidden, weight)]
    for context in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=context):
            loss = fused_distillation_loss(
                *mine, teacher_hidden, teacher_weight, labels, objective=objective, chunk=20, compile=False
            )
        gradients = torch.autograd.grad(loss, mine)
        assert loss.dtype == torch.float32
        assert [x.dtype for x in gradients] == [dtype, dtype]
        assert max(map(error, gradients, wanted)) < bound[near]


def test_autocast_around_it_changes_nothing() -> None:
    problem = Problem(torch.float32)
    results = []
    for enabled in (False, True):
        for reduction in ("token_mean", "none"):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = fused_distillation_loss(*problem.hidden, objective=Reverse(), reduction=reduction).sum()
                results.append((loss, *problem.gradients(loss)))
    for one, other in zip(results[:2], results[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_fp16_keeps_small_gradients_for_the_scaler() -> None:
    problem, scale = Problem(torch.float16), 2.0**16
    leaves = [x.detach().double().requires_grad_() for x in problem.leaves]
    student = logits(leaves[0], Head(leaves[1]))
    expected = 1e-6 * reduce(token_losses(student, problem.logits()[1], problem.labels, Forward()), "token_mean")
    wanted = torch.autograd.grad(scale * expected, leaves)
    loss = 1e-6 * fused_distillation_loss(*problem.hidden, objective=Forward())
    assert max(map(error, problem.gradients(scale * loss), wanted)) < 1e-3


def test_a_mask_is_a_deletion_whatever_stands_there() -> None:
    problem = Problem()
    loss = fused_distillation_loss(*problem.hidden, objective=Reverse(), chunk=2)
    d_hidden, d_weight = problem.gradients(loss)
    counted = problem.labels != -100
    assert d_hidden[~counted].eq(0).all()
    kept = [x[counted].detach().requires_grad_() for x in (problem.student_hidden, problem.teacher_hidden)]
    alone = fused_distillation_loss(
        kept[0], problem.student_head, kept[1], problem.teacher_head, problem.labels[counted], objective=Reverse()
    )
    torch.testing.assert_close(loss, alone)
    wanted = torch.autograd.grad(alone, (kept[0], problem.student_head.weight))
    assert error(d_hidden[counted], wanted[0]) < 1e-14
    assert error(d_weight, wanted[1]) < 1e-14
    spoilt = problem.student_hidden.detach().clone()
    spoilt[~counted] = math.nan
    spoilt.requires_grad_()
    again = fused_distillation_loss(spoilt, *problem.hidden[1:], objective=Reverse(), chunk=2)
    assert torch.equal(again, loss)
    assert torch.equal(torch.autograd.grad(again, spoilt)[0], d_hidden)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sum", "none"])
@pytest.mark.parametrize("settings", [{}, {"ce_weight": 0.5}, {"ce_weight": 1.0, "temperature": 2.0}], ids=str)
@pytest.mark.parametrize("path", ["logits", "hidden"])
def test_nothing_counted_is_a_zero_that_keeps_the_graph(path: str, settings: dict[str, Any], reduction: str) -> None:
    problem = Problem(torch.float32)
    problem.labels[:] = -100
    settings = {"objective": Reverse(), "reduction": reduction, **settings}
    if path == "logits":
        leaves = [x.detach().requires_grad_() for x in problem.logits()]
        loss = distillation_loss(*leaves, problem.labels, **settings)
        leaves = leaves[:1]
    else:
        leaves = list(problem.leaves)
        loss = fused_distillation_loss(*problem.hidden, **settings)
    assert loss.eq(0).all()
    assert all(g.eq(0).all() for g in torch.autograd.grad(loss.sum(), leaves))


def test_parts_are_sums_and_their_divisor() -> None:
    problem = Problem()
    for reduction, divisor in (("token_mean", 5), ("sequence_mean", 2), ("sum", 1)):
        parts = DistillationLoss(Reverse(), ce_weight=0.25, reduction=reduction).from_hidden(*problem.hidden)
        assert parts.divisor.item() == divisor
        assert set(parts.values) == {"loss", "kd", "ce"}
        torch.testing.assert_close(parts.loss, (parts.weights * parts.values["loss"]).sum())
        torch.testing.assert_close(parts.values["loss"], 0.75 * parts.values["kd"] + 0.25 * parts.values["ce"])
        assert not any(value.requires_grad for value in parts.values.values())
    problem.labels[:] = -100
    parts = DistillationLoss(Reverse()).from_hidden(*problem.hidden)
    assert parts.divisor.item() == 0
    assert all(value.shape == (0,) for value in parts.values.values())


@pytest.mark.parametrize(("student_pad", "teacher_pad"), [(3, 0), (0, 3), (2, 3)])
def test_padded_vocabularies_equal_their_common_part(student_pad: int, teacher_pad: int) -> None:
    problem = Problem(pad=student_pad)
    problem.teacher_head = Head(torch.cat([problem.teacher_head.weight, torch.randn(teacher_pad, HT).double()]))
    common = min(V + student_pad, V + teacher_pad)
    fused = fused_distillation_loss(*problem.hidden, objective=Reverse(), ce_weight=0.2, chunk=2)
    d_hidden, d_weight = problem.gradients(fused)
    cut = problem.student_head.weight[:common].detach().requires_grad_()
    teacher = problem.teacher_head.weight[:common]
    expected = fused_distillation_loss(
        problem.student_hidden, cut, problem.teacher_hidden, teacher, problem.labels, objective=Reverse(), ce_weight=0.2
    )
    wanted = torch.autograd.grad(expected, (problem.student_hidden, cut))
    torch.testing.assert_close(fused, expected)
    assert error(d_hidden, wanted[0]) < 1e-14
    assert error(d_weight[:common], wanted[1]) < 1e-14
    assert d_weight[common:].eq(0).all()
    student = logits(problem.student_hidden, problem.student_head).detach().requires_grad_()
    whole = distillation_loss(
        student,
        logits(problem.teacher_hidden, problem.teacher_head),
        problem.labels,
        objective=Reverse(),
        ce_weight=0.2,
    )
    torch.testing.assert_close(whole, expected)
    assert torch.autograd.grad(whole, student)[0][..., common:].eq(0).all()


@pytest.mark.parametrize("objective", OBJECTIVES[:3], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dead_columns_equal_their_deletion(objective: Any, dtype: torch.dtype) -> None:
    student, teacher = (torch.randn(2, 3, 9, dtype=dtype) for _ in range(2))
    labels = torch.tensor([[0, 1, 5], [1, 0, -100]])
    dead = torch.tensor([2, 6])
    alive = torch.tensor([0, 1, 3, 4, 5, 7, 8])
    moved = torch.where(labels > 0, torch.searchsorted(alive, labels.clamp_min(0)), labels)
    for logits_ in (student, teacher):
        logits_[..., dead] = -math.inf
    student.requires_grad_()
    less = student.detach()[..., alive].requires_grad_()
    loss = distillation_loss(student, teacher, labels, objective=objective, ce_weight=0.3)
    expected = distillation_loss(less, teacher[..., alive], moved, objective=objective, ce_weight=0.3)
    torch.testing.assert_close(loss, expected)
    gradient = torch.autograd.grad(loss, student)[0]
    torch.testing.assert_close(gradient[..., alive], torch.autograd.grad(expected, less)[0])
    assert gradient[..., dead].eq(0).all()


def test_far_apart_logits_and_a_low_temperature_stay_finite() -> None:
    student = (60 * torch.randn(2, 3, 50)).requires_grad_()
    labels = torch.randint(0, 50, (2, 3))
    for objective in OBJECTIVES:
        loss = distillation_loss(
            student, 60 * torch.randn(2, 3, 50), labels, objective=objective, ce_weight=0.1, temperature=0.05
        )
        assert loss.isfinite()
        assert torch.autograd.grad(loss, student)[0].isfinite().all()


def test_one_response_may_come_without_a_batch_dimension() -> None:
    problem = Problem()
    flat = [x[0] for x in (problem.student_hidden, problem.teacher_hidden, problem.labels)]
    batch = [x[:1] for x in (problem.student_hidden, problem.teacher_hidden, problem.labels)]
    for reduction in ("token_mean", "sequence_mean"):
        one, other = (
            fused_distillation_loss(
                x[0], problem.student_head, x[1], problem.teacher_head, x[2], objective=Forward(), reduction=reduction
            )
            for x in (flat, batch)
        )
        assert torch.equal(one, other)
