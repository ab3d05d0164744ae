"""Extra inputs and outputs of the loss: columns, schedules, monitors; and arguments that are refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from kd_lightning.label_losses import LabelLoss
from kd_lightning.losses import DistillationLoss, distillation_loss, fused_distillation_loss
from kd_lightning.schedules import Schedule
from slow_reference import (
    HS,
    HT,
    B,
    ByColumn,
    Forward,
    Hellinger,
    Problem,
    Reverse,
    T,
    V,
    error,
    reduce,
    token_losses,
)


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
    """A policy gradient term at the loss's temperature."""

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
    """A constant schedule."""

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
    """Reads how much more probable a response is under the teacher."""

    columns = ("teacher_log_prob", "student_log_prob")

    def forward(self, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        assert rows is not None
        return rows["teacher_log_prob"].exp() - rows["student_log_prob"].exp()


class Scheduled(ByColumn):
    """A composite with such a schedule."""

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
        ({"temperature": 0.0}, r"temperature must be a number in \[0.001, 1000\], got 0.0"),
        ({"temperature": math.nan}, r"temperature must be a number in \[0.001, 1000\], got nan"),
        ({"reduction": "mean"}, "reduction must be one of token_mean, sequence_mean, sum, none, got 'mean'"),
        ({"label_loss": Forward()}, "label_loss must be a LabelLoss or None, got"),
        ({"chunk": -512}, "chunk must be a number of tokens > 0 or None, got -512"),
        ({"chunk": 0}, "chunk must be a number of tokens > 0 or None, got 0"),
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
        ({"student_hidden": torch.zeros(B, T, HS + 1)}, r"student_hidden has width 5 .* student_head expects 4"),
        ({"teacher_head": torch.zeros(V, HT + 1)}, r"teacher_hidden has width 6 .* teacher_head expects 7"),
        ({"teacher_head": None}, "teacher_head must be given with teacher_hidden"),
        ({"teacher_hidden": None}, "ce_weight must be 1 without a teacher, got 0.0"),
        (
            {"student_hidden": torch.zeros(B, T, HS, device="meta")},
            "on one device, got student on cpu and meta, .* labels on cpu",
        ),
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
    with pytest.raises(ValueError, match="monitors need a teacher, got none: remove x"):
        loss.from_logits(problem.logits()[0], None, problem.labels)
