"""Metrics take logits in the order of the losses, and refuse logits in the place of log-probabilities."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kd_lightning import (
    NLL,
    Agreement,
    BeatsTeacher,
    ByPosition,
    CalibrationError,
    DivergenceMetric,
    Entropy,
    ForwardKL,
    ReverseKL,
)
from kd_lightning.functional import log_softmax

TWO: list[Any] = [lambda: DivergenceMetric(ForwardKL()), lambda: DivergenceMetric(ReverseKL()), Agreement, BeatsTeacher]
ONE: list[Any] = [NLL, Entropy, CalibrationError]


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(0, 9, (3, 4))
    labels[1, :2] = -100
    return 5 + 3 * torch.randn(3, 4, 9), 3 * torch.randn(3, 4, 9), labels


@pytest.mark.parametrize("make", TWO)
def test_of_two_models_the_student_comes_first(make: Any) -> None:
    student, teacher, labels = inputs()
    found, expected = make(), make()
    found.update_from_logits(student, teacher, labels)
    expected.update(log_softmax(teacher), log_softmax(student), labels=labels)
    assert torch.equal(found.compute(), expected.compute())
    for swapped in ((student, log_softmax(teacher)), (log_softmax(teacher), student)):
        with pytest.raises(ValueError, match="use update_from_logits for logits"):
            make().update(*swapped, labels=labels)


@pytest.mark.parametrize("make", ONE)
def test_of_one_model(make: Any) -> None:
    student, _, labels = inputs()
    found, expected = make(), make()
    found.update_from_logits(student, labels)
    expected.update(log_softmax(student), labels=labels)
    assert torch.equal(found.compute(), expected.compute())
    with pytest.raises(ValueError, match="use update_from_logits for logits"):
        make().update(student, labels=labels)


def test_buckets() -> None:
    student, teacher, labels = inputs()
    found, expected = (ByPosition(DivergenceMetric(ForwardKL()), edges=(0, 2)) for _ in range(2))
    found.update_from_logits(student, teacher, labels=labels)
    expected.update(log_softmax(teacher), log_softmax(student), labels=labels)
    for name, value in expected.compute().items():
        assert torch.equal(found.compute()[name], value)


def test_tokens_without_a_label_may_hold_anything() -> None:
    student, teacher, labels = inputs()
    log_p, log_q = log_softmax(teacher), log_softmax(student)
    log_q[1, 0] = 17.0
    DivergenceMetric(ForwardKL()).update(log_p, log_q, labels)
