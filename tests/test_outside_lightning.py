"""What other loops need: shifted labels, one division, one call for schedules; silent traps are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd_lightning import (
    TAID,
    DistillationLoss,
    Divergence,
    ForwardKL,
    Linear,
    TeacherEntropyGate,
    TopShare,
    Weighted,
    fused_distillation_loss,
    shift_labels,
    update_schedules,
)


def logits(seed: int, rows: int = 3, tokens: int = 5, vocabulary: int = 11) -> Tensor:
    return torch.randn(rows, tokens, vocabulary, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1,), (6,), (3, 4), (2, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_shifted_labels_stand_at_the_position_that_predicts_them(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    labels = torch.randint(0, 9, shape, dtype=dtype)
    found = shift_labels(labels)
    assert found.shape == labels.shape
    assert found.dtype == dtype
    assert torch.equal(found[..., :-1], labels[..., 1:])
    assert (found[..., -1] == -100).all()


def parts_of(reduction: str = "token_mean", seed: int = 0) -> Any:
    loss = DistillationLoss(ForwardKL(), reduction=reduction)
    student = logits(seed).requires_grad_()
    labels = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(seed))
    labels[0, :3], labels[2] = -100, -100
    return loss.from_logits(student, logits(seed + 1), labels)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sum"])
def test_divided_by_its_own_divisor_is_the_mean(reduction: str) -> None:
    parts = parts_of(reduction)
    assert torch.equal(parts.divided(), parts.mean)


def test_divided_by_the_number_of_tokens_of_the_step() -> None:
    parts = parts_of()
    for by in (20, 20.0, torch.tensor(20)):
        torch.testing.assert_close(parts.divided(by=by), parts.loss / 20)
    for by in (0, -3, 0.0):
        with pytest.raises(ValueError, match="by must be above 0"):
            parts.divided(by=by)


@pytest.mark.parametrize("reduction", ["sequence_mean", "sum"])
def test_a_number_of_tokens_is_refused_where_the_divisor_is_another(reduction: str) -> None:
    with pytest.raises(ValueError, match=f"reduction '{reduction}' does not divide by that"):
        parts_of(reduction).divided(by=7)


def test_losses_of_tokens_cannot_be_divided() -> None:
    with pytest.raises(ValueError, match="reduction must not be 'none'"):
        parts_of("none").divided()


def test_one_call_moves_every_schedule_and_weight() -> None:
    objective = Weighted(TAID(), TopShare(TeacherEntropyGate(0.5), 0.5))
    loss = DistillationLoss(objective, ce_weight=Linear(0.0, 1.0))
    labels = torch.randint(0, 11, (3, 5))
    before = {name: copy.deepcopy(part.state_dict()) for name, part in loss.schedules().items()}
    parts = [loss.from_logits(logits(n), logits(n + 9), labels) for n in range(2)]
    update_schedules(loss, 0.25, parts)
    assert float(loss.ce_weight()) == pytest.approx(0.25)  # type: ignore[operator]
    moved = {
        name: any(not torch.equal(x, before[name][key]) for key, x in part.state_dict().items())
        for name, part in loss.schedules().items()
    }
    assert len(moved) == 2
    assert all(moved.values())
    for progress in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"progress must be in \[0, 1\]"):
            update_schedules(loss, progress, parts)


def test_two_batches_move_a_schedule_as_one() -> None:
    student, teacher = logits(1, rows=4), logits(2, rows=4)
    labels = torch.randint(0, 11, (4, 5))
    states = []
    for sizes in ((4,), (1, 3)):
        loss = DistillationLoss(TAID())
        pieces = zip(student.split(sizes), teacher.split(sizes), labels.split(sizes), strict=True)
        for progress in (0.1, 0.2, 0.3):
            update_schedules(loss, progress, [loss.from_logits(*piece) for piece in copy.deepcopy(list(pieces))])
            pieces = zip(student.split(sizes), teacher.split(sizes), labels.split(sizes), strict=True)
        states.append(loss.state_dict())
    for name, x in states[0].items():
        torch.testing.assert_close(x, states[1][name], rtol=1e-6, atol=1e-7)


class Learned(Divergence):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return self.scale * (log_p.exp() * (log_p - log_q)).sum(-1)


class Forgotten(Divergence):
    def __init__(self) -> None:
        pass

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_p.exp() * (log_p - log_q)).sum(-1)


def test_parameters_that_would_get_no_gradient_are_refused() -> None:
    with pytest.raises(ValueError, match="got 'scale' of Learned"):
        DistillationLoss(Learned())
    DistillationLoss(Learned().requires_grad_(False))


def test_a_constructor_that_forgets_its_base_is_named() -> None:
    with pytest.raises(ValueError, match=r"Forgotten.__init__ must call super\(\).__init__\(\)"):
        DistillationLoss(Forgotten())


def test_a_module_is_no_head() -> None:
    hidden, layer = torch.randn(2, 3, 8), nn.Linear(8, 11)
    with pytest.raises(ValueError, match=r"got the module Linear: pass student_head\.weight"):
        fused_distillation_loss(
            hidden, layer, hidden, layer.weight, torch.zeros(2, 3, dtype=torch.long), objective=ForwardKL()
        )
