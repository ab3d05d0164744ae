"""Losses on batches: equal to a slow loop in float64, whichever path, mask, vocabulary, reduction or precision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from kd_lightning.engine import Head
from kd_lightning.label_losses import LabelLoss
from kd_lightning.losses import DistillationLoss, distillation_loss, fused_distillation_loss
from kd_lightning.schedules import Schedule
from slow_reference import (
    ByColumn,
    DetachedMixture,
    Forward,
    Hellinger,
    Reverse,
    error,
    logits,
    reduce,
    token_losses,
)

OBJECTIVES = [Forward(), Reverse(), Hellinger(), DetachedMixture()]
B, T, V, HS, HT = 3, 5, 17, 4, 6


class Problem:
    """Hidden states, heads and labels of two models; the second response has one counted token, the third none."""

    def __init__(
        self, dtype: torch.dtype = torch.float64, pad: int = 0, scale: float = 1.0, near: bool = False
    ) -> None:
        g = torch.Generator().manual_seed(1)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        hidden, weight = randn(B, T, HS), randn(V + pad, HS)
        self.student_hidden = hidden.to(dtype).requires_grad_()
        self.student_head = Head(weight.to(dtype).requires_grad_())
        self.teacher_hidden, self.teacher_head = randn(B, T, HT).to(dtype), Head(randn(V, HT).to(dtype))
        self.labels = torch.randint(0, V, (B, T), generator=g)
        self.labels[0, 1] = self.labels[1, :4] = self.labels[2] = -100

    @property
    def hidden(self) -> tuple[Any, ...]:
        return self.student_hidden, self.student_head, self.teacher_hidden, self.teacher_head, self.labels

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.student_hidden, self.student_head.weight

    def logits(self) -> tuple[Tensor, Tensor]:
        return logits(self.student_hidden, self.student_head), logits(self.teacher_hidden, self.teacher_head)

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, self.leaves)


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
    for _ in range(2):  # it can be asked twice, for it computes anew
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


# ------------------------------------------------------------------------------------------------ columns, schedules
def test_columns_reach_their_rows_in_every_chunk() -> None:
    problem = Problem()
    share = torch.rand(B, T, dtype=torch.float64)
    for rows in ({"share": share}, {"share": share[:, 0]}):
        expected = reduce(token_losses(*problem.logits(), problem.labels, ByColumn(), rows=rows), "token_mean")
        for chunk in (1, 2, 100):
            loss = fused_distillation_loss(*problem.hidden, objective=ByColumn(), rows=rows, chunk=chunk)
            torch.testing.assert_close(loss, expected)
        whole = distillation_loss(*problem.logits(), problem.labels, objective=ByColumn(), rows=rows)
        torch.testing.assert_close(whole, expected)
    with pytest.raises(ValueError, match=r"rows\['share'\] must have the labels' shape \[3, 5\], or \[3\].*got \[5\]"):
        fused_distillation_loss(*problem.hidden, objective=ByColumn(), rows={"share": share[0]})


class Advantage(LabelLoss):
    """A policy gradient's term, read at the loss's temperature."""

    temperature = None

    def forward(self, log_q_label: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        return -rows["advantage"] * log_q_label.exp()


def test_a_label_loss_reads_columns_and_its_own_temperature() -> None:
    problem = Problem()
    advantage = torch.randn(B, T, dtype=torch.float64)
    temperature, counted = 2.0, problem.labels != -100
    log_q = torch.log_softmax(problem.logits()[0] / temperature, -1)
    picked = log_q.gather(-1, problem.labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    kd = reduce(token_losses(*problem.logits(), problem.labels, Forward(), temperature=temperature), "token_mean")
    expected = 0.5 * kd + 0.5 * (-advantage * picked.exp())[counted].mean()
    loss = fused_distillation_loss(
        *problem.hidden,
        objective=Forward(),
        ce_weight=0.5,
        temperature=temperature,
        label_loss=Advantage(),
        rows={"advantage": advantage},
        chunk=2,
    )
    torch.testing.assert_close(loss, expected)
    assert max(map(error, problem.gradients(loss), problem.gradients(expected))) < 1e-12


class Half(Schedule):
    """A schedule that stands still."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("now", torch.tensor(0.5))

    def forward(self, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        return self.now

    def update(self, progress: Any, stats: Any) -> None:
        raise NotImplementedError


def test_the_label_weight_may_be_a_schedule() -> None:
    problem = Problem()
    schedule = Half()
    for now in (0.0, 0.25, 1.0):
        schedule.now.fill_(now)
        expected = fused_distillation_loss(*problem.hidden, objective=Reverse(), ce_weight=now)
        loss = fused_distillation_loss(*problem.hidden, objective=Reverse(), ce_weight=schedule)
        torch.testing.assert_close(loss, expected)
        assert max(map(error, problem.gradients(loss), problem.gradients(expected))) < 1e-12
    assert DistillationLoss(Reverse(), ce_weight=schedule).ce_weight is schedule


class Gap(Half):
    """Reads how much better the teacher likes a response."""

    columns = ("teacher_log_prob", "student_log_prob")

    def forward(self, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        assert rows is not None
        return rows["teacher_log_prob"].exp() - rows["student_log_prob"].exp()


class Scheduled(ByColumn):
    """A composite with such a schedule inside."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = Gap()

    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        return self.weight(rows) * Forward()(log_p, log_q)


@pytest.mark.parametrize("path", ["logits", "hidden"])
def test_log_probabilities_of_responses_are_there_where_a_schedule_wants_them(path: str) -> None:
    problem = Problem()
    columns, counted = {}, problem.labels != -100
    for name, x in zip(("student_log_prob", "teacher_log_prob"), problem.logits(), strict=True):
        tokens = torch.log_softmax(x, -1).gather(-1, problem.labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        columns[name] = ((tokens * counted).sum(1) / counted.sum(1).clamp_min(1)).detach()
    gap = columns["teacher_log_prob"].exp() - columns["student_log_prob"].exp()
    tokens = token_losses(*problem.logits(), problem.labels, Forward())
    expected = reduce([[gap[b] * x for x in response] for b, response in enumerate(tokens)], "token_mean")
    loss = DistillationLoss(Scheduled(), chunk=2, temperature=1.0)
    parts = (
        loss.from_logits(*problem.logits(), problem.labels) if path == "logits" else loss.from_hidden(*problem.hidden)
    )
    torch.testing.assert_close(parts.mean, expected)
    torch.testing.assert_close(parts.values["gap"], gap.unsqueeze(1).expand(B, T)[counted])
    assert max(map(error, problem.gradients(parts.loss), problem.gradients(5 * expected))) < 1e-12
    given = loss.from_hidden(*problem.hidden, rows={**columns, "teacher_log_prob": torch.zeros(B)})
    assert (given.values["gap"] > parts.values["gap"]).all()


def test_monitors_and_diagnostics_are_read_at_temperature_one_and_change_no_gradient() -> None:
    problem = Problem()
    counted = problem.labels != -100
    loss = DistillationLoss(
        Reverse(), temperature=2.0, monitors={"forward_kl": Forward(), "mine": Hellinger()}, diagnostics=True, chunk=2
    )
    student, teacher = (torch.log_softmax(x, -1)[counted] for x in problem.logits())
    labels = problem.labels[counted].unsqueeze(1)
    wanted = {
        "forward_kl": Forward()(teacher, student),
        "mine": Hellinger()(teacher, student),
        "student_nll": -student.gather(1, labels).squeeze(1),
        "teacher_nll": -teacher.gather(1, labels).squeeze(1),
        "agreement": (student.argmax(-1) == teacher.argmax(-1)).double(),
    }
    for parts in (loss.from_hidden(*problem.hidden), loss.from_logits(*problem.logits(), problem.labels)):
        assert set(parts.values) == {"loss", "kd", "ce", *wanted}
        for name, value in wanted.items():
            torch.testing.assert_close(parts.values[name], value.detach())
        plain = DistillationLoss(Reverse(), temperature=2.0).from_hidden(*problem.hidden)
        assert max(map(error, problem.gradients(parts.loss), problem.gradients(plain.loss))) < 1e-12


def test_without_a_teacher_it_is_cross_entropy() -> None:
    problem = Problem()
    student = problem.logits()[0].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(student, problem.labels.flatten())
    wanted = problem.gradients(expected)
    loss = DistillationLoss(Forward(), ce_weight=1.0, temperature=3.0, diagnostics=True)
    for parts in (
        loss.from_hidden(problem.student_hidden, problem.student_head, None, None, problem.labels),
        loss.from_logits(problem.logits()[0], None, problem.labels),
    ):
        torch.testing.assert_close(parts.mean, expected)
        assert set(parts.values) == {"loss", "ce", "student_nll"}
        assert max(map(error, problem.gradients(parts.mean), wanted)) < 1e-12


# -------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": lambda p, q: p}, "objective must be a Divergence, got"),
        ({"ce_weight": 1.5}, r"ce_weight must be .*\[0, 1\].* got 1.5"),
        ({"ce_weight": -0.1}, r"ce_weight must be .*\[0, 1\].* got -0.1"),
        ({"temperature": 0.0}, "temperature must be a finite number > 0, got 0.0"),
        ({"temperature": math.nan}, "temperature must be a finite number > 0, got nan"),
        ({"reduction": "mean"}, "reduction must be one of token_mean, sequence_mean, sum, none, got 'mean'"),
        ({"label_loss": Forward()}, "label_loss must be a LabelLoss or None, got"),
        ({"chunk": 0}, "chunk must be a number of rows > 0 or None, got 0"),
        ({"monitors": {"kd": Forward()}}, "monitors must not be named .*, got 'kd'"),
        ({"monitors": {"x": 3}}, r"monitors\['x'\] must be a Divergence, got 3"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillationLoss(**{"objective": Forward(), **arguments})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(B, T)}, "labels must be integers, got torch.float32"),
        ({"labels": torch.zeros(B, T, dtype=torch.bool)}, "labels must be integers, got torch.bool"),
        ({"labels": torch.full((B, T), V)}, rf"labels must be −100 or in \[0, {V}\), the vocabulary .* got {V}"),
        ({"labels": torch.full((B, T), -1)}, rf"labels must be −100 or in \[0, {V}\), the vocabulary .* got -1"),
        ({"labels": torch.tensor(1)}, r"labels must be \[B, T\] or \[T\]"),
        (
            {"student_hidden": torch.zeros(B, T - 1, HS)},
            r"student_hidden must have .* \[3, 5\].*\[3, 4, 4\]",
        ),
        ({"teacher_hidden": torch.zeros(B - 1, T, HT)}, r"teacher_hidden must have .* \[3, 5\].*\[2, 5, 6\]"),
        ({"student_hidden": torch.zeros(B, T, HS + 1)}, r"student_hidden has width 5 .* student_head reads 4"),
        ({"teacher_head": torch.zeros(V, HT + 1)}, r"teacher_hidden has width 6 .* teacher_head reads 7"),
        ({"teacher_head": None}, "teacher_head must be given with teacher_hidden"),
        ({"teacher_hidden": None}, "ce_weight must be 1 where there is no teacher, got 0.0"),
        ({"student_hidden": torch.zeros(B, T, HS, device="meta")}, "on one device, got cpu, meta"),
        ({"student_hidden": torch.zeros(B, T, HS, dtype=torch.int64)}, "student_hidden must be floating point"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    problem = Problem(torch.float32)
    names = ("student_hidden", "student_head", "teacher_hidden", "teacher_head", "labels")
    arguments = {**dict(zip(names, problem.hidden, strict=True)), **change}
    with pytest.raises(ValueError, match=message):
        fused_distillation_loss(**arguments, objective=Forward())


def test_monitors_need_a_teacher() -> None:
    problem = Problem()
    loss = DistillationLoss(Forward(), ce_weight=1.0, monitors={"x": Forward()})
    with pytest.raises(ValueError, match="monitors need a teacher, and there is none: x"):
        loss.from_logits(problem.logits()[0], None, problem.labels)
