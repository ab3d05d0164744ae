"""Losses whose teacher reads an input of its own: the k-th label of a response is the same token on both sides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kd_lightning.engine.head import Head
from kd_lightning.engine.top_k import TopK, top_k
from kd_lightning.losses import DistillationLoss, distillation_loss, fused_distillation_loss
from slow_reference import HT, B, Forward, Hellinger, Problem, Reverse, T, V, error, logits, reduce, token_losses

WIDE = 11
SETTINGS = [{}, {"ce_weight": 0.3, "temperature": 2.0}]


class Apart:
    """A problem whose teacher has longer rows, with its labels elsewhere."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        numbers = torch.Generator().manual_seed(7)
        self.problem = Problem(dtype)
        self.labels = self.problem.labels
        self.hidden = torch.randn(B, WIDE, HT, generator=numbers, dtype=torch.float64).to(dtype)
        self.head: Head = self.problem.teacher_head
        self.teacher_labels = torch.full((B, WIDE), -100)
        for row in range(B):
            tokens = self.labels[row][self.labels[row] != -100]
            places = torch.randperm(WIDE, generator=numbers)[: len(tokens)].sort().values
            self.teacher_labels[row, places] = tokens

    def aligned(self) -> Tensor:
        """The teacher's logits at the student's positions, by a loop."""
        whole = logits(self.hidden, self.head)
        found = torch.zeros(B, T, V, dtype=torch.float64)
        for row in range(B):
            ours = (self.labels[row] != -100).nonzero().flatten().tolist()
            theirs = (self.teacher_labels[row] != -100).nonzero().flatten().tolist()
            for one, other in zip(ours, theirs, strict=True):
                found[row, one] = whole[row, other]
        return found


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("objective", [Forward(), Reverse(), Hellinger()], ids=lambda x: type(x).__name__)
def test_both_paths_equal_a_loop_that_pairs_the_labels(objective: Any, settings: dict[str, Any]) -> None:
    x = Apart()
    student = x.problem.logits()[0]
    for reduction in ("token_mean", "sequence_mean", "sum"):
        expected = reduce(token_losses(student, x.aligned(), x.labels, objective, **settings), reduction)
        wanted = x.problem.gradients(expected)
        own = {"objective": objective, "reduction": reduction, "teacher_labels": x.teacher_labels, **settings}
        student = x.problem.logits()[0]
        whole = distillation_loss(student, logits(x.hidden, x.head), x.labels, **own)
        fused = fused_distillation_loss(
            *x.problem.hidden[:2], x.hidden, x.head, x.labels, chunk=2, compile=False, **own
        )
        for loss in (whole, fused):
            torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
            for mine, reference in zip(x.problem.gradients(loss), wanted, strict=True):
                assert error(mine, reference) < 1e-12
        student = x.problem.logits()[0]


def test_the_labels_themselves_change_no_bit() -> None:
    x = Problem(torch.float32)
    for reduction in ("token_mean", "none"):
        found = []
        for own in (None, x.labels, x.labels.int()):
            loss = fused_distillation_loss(*x.hidden, objective=Forward(), reduction=reduction, teacher_labels=own)
            found.append([loss, *x.gradients(loss.sum())])
        for other in found[1:]:
            assert all(torch.equal(one, same) for one, same in zip(found[0], other, strict=True))


def test_one_response_and_no_reduction() -> None:
    x = Apart()
    loss = DistillationLoss(Reverse(), reduction="none")
    student = x.problem.logits()[0]
    whole = loss.from_logits(student, logits(x.hidden, x.head), x.labels, teacher_labels=x.teacher_labels).loss
    assert whole.shape == x.labels.shape
    for row in range(B):
        args = (student[row], logits(x.hidden[row], x.head), x.labels[row])
        torch.testing.assert_close(loss.from_logits(*args, teacher_labels=x.teacher_labels[row]).loss, whole[row])


def shaped(known: TopK, shape: torch.Size) -> TopK:
    ids, log_probs, log_tail = (x.reshape(*shape, *x.shape[1:]) for x in (known.ids, known.log_probs, known.log_tail))
    return TopK(ids, log_probs, log_tail, known.vocabulary)


def test_the_top_of_the_teacher_is_read_at_its_own_positions() -> None:
    x = Apart()
    teacher, student = logits(x.hidden, x.head).float(), x.problem.logits()[0].float()
    known, aligned = (
        shaped(top_k(found.flatten(0, 1), labels.flatten().clamp_min(0), 4), labels.shape)
        for found, labels in ((teacher, x.teacher_labels), (x.aligned().float(), x.labels))
    )
    loss = DistillationLoss(Forward())
    own = loss.from_logits(student, known, x.labels, teacher_labels=x.teacher_labels).mean
    torch.testing.assert_close(own, loss.from_logits(student, aligned, x.labels).mean)


def test_columns_and_schedules_stand_at_the_students_positions() -> None:
    x = Apart()
    column = torch.rand(B, T, dtype=torch.float64)
    loss = DistillationLoss(Forward(), monitors={"reverse": Reverse()}, diagnostics=True)
    own = loss.from_logits(x.problem.logits()[0], logits(x.hidden, x.head), x.labels, {"any": column}, x.teacher_labels)
    plain = loss.from_logits(x.problem.logits()[0], x.aligned(), x.labels, {"any": column})
    assert own.values.keys() == plain.values.keys()
    for name, values in plain.values.items():
        torch.testing.assert_close(own.values[name], values)


@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_response_with_another_number_of_labels_is_refused_by_its_row(row: int) -> None:
    x = Apart()
    wrong = x.teacher_labels.clone()
    free = int((wrong[row] == -100).nonzero()[0])
    wrong[row, free] = 3
    count = int((x.labels[row] != -100).sum())
    with pytest.raises(ValueError, match=rf"teacher_labels .* got {count + 1} in row {row}, where labels has {count}"):
        distillation_loss(
            x.problem.logits()[0], logits(x.hidden, x.head), x.labels, objective=Forward(), teacher_labels=wrong
        )


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (torch.zeros(B, WIDE), "teacher_labels must be integers"),
        (torch.zeros(B + 1, WIDE, dtype=torch.long), "teacher_labels must have one row per row of labels"),
        (torch.zeros(WIDE, dtype=torch.long), "shape|row"),
    ],
)
def test_labels_of_another_form_are_refused(own: Tensor, words: str) -> None:
    x = Apart()
    teacher = logits(x.hidden, x.head)
    teacher = torch.cat([teacher, teacher[:1]]) if len(own) == B + 1 else teacher[0] if own.ndim == 1 else teacher
    with pytest.raises(ValueError, match=words):
        distillation_loss(x.problem.logits()[0], teacher, x.labels, objective=Forward(), teacher_labels=own)
