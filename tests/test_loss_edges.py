"""Edge cases: label dtypes and masks, losses inside a user's training step, and mistakes in custom classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kd_lightning import (
    DistillationLoss,
    Divergence,
    ForwardKL,
    GeneralizedJSD,
    LabelLoss,
    ReverseKL,
    SkewKL,
    distillation_loss,
    fused_distillation_loss,
)

LABELS = torch.tensor([[3, 156, -100], [100, 0, 5]])


def logits(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(*shape, generator=generator), torch.randn(*shape, generator=generator)


# ------------------------------------------------------------------------------------------------------------- labels
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_dtype_count_alike(dtype: torch.dtype) -> None:
    student, teacher = logits(2, 3, 200)
    labels = LABELS.clamp_min(0)  # uint8 cannot hold −100, which would become 156
    each = [
        distillation_loss(student, teacher, x, objective=ForwardKL(), ce_weight=0.3, reduction="none")
        for x in (labels, labels.to(dtype))
    ]
    assert torch.equal(*each)
    assert (each[0] > 0).all()


def test_labels_that_are_not_contiguous() -> None:
    student, teacher = logits(3, 2, 200)
    a, b = (
        distillation_loss(student, teacher, x, objective=ForwardKL(), ce_weight=0.3, reduction="none")
        for x in (LABELS.T, LABELS.T.contiguous())
    )
    assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(3, 0), (0, 5), (0,), (0, 0)])
def test_no_labels_at_all_are_0(shape: tuple[int, ...]) -> None:
    student, teacher = logits(*shape, 7)
    student.requires_grad_()
    loss = distillation_loss(student, teacher, torch.zeros(shape, dtype=torch.long), objective=ForwardKL())
    loss.backward()
    assert loss == 0
    assert student.grad is not None and student.grad.shape == student.shape


# ------------------------------------------------------------------------------------------- in other people's steps
def test_a_second_derivative_is_refused_and_not_left_out() -> None:
    student, teacher = logits(2, 3, 200)
    student.requires_grad_()
    loss = distillation_loss(student, teacher, LABELS, objective=ReverseKL())
    (plain,) = torch.autograd.grad(loss, student, retain_graph=True)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    assert torch.allclose(plain, gradient) and gradient.requires_grad
    with pytest.raises(RuntimeError, match="has no second derivative"):
        (loss + gradient.square().sum()).backward()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_what_was_evaluated_first_can_still_train(mode: Callable[[], Any]) -> None:
    hidden, head = torch.randn(2, 3, 4), torch.randn(200, 4)
    objective = SkewKL(0.3)
    with mode():
        before = fused_distillation_loss(hidden, head, hidden * 2, head, LABELS, objective=objective)
    hidden = hidden.clone().requires_grad_()
    after = fused_distillation_loss(hidden, head, hidden * 2, head, LABELS, objective=objective)
    after.backward()
    assert before == after and hidden.grad is not None


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's compiler, where a graph ends, to itself
@pytest.mark.parametrize("form", ["logits", "hidden"])
def test_inside_a_step_that_is_compiled(form: str) -> None:
    hidden, head = torch.randn(2, 3, 4), torch.randn(200, 4)
    objective = GeneralizedJSD()

    def step(x: Tensor) -> Tensor:
        if form == "logits":
            return distillation_loss(x * 2 @ head.T, hidden @ head.T, LABELS, objective=objective)
        return fused_distillation_loss(x * 2, head, hidden, head, LABELS, objective=objective)

    found = []
    for function in (step, torch.compile(step, backend="eager")):
        x = hidden.clone().requires_grad_()
        loss = function(x)
        loss.backward()
        found.append((loss.detach(), x.grad))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled)


# ------------------------------------------------------------------------------------------------------ a user's own
class Unsummed(Divergence):
    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return log_p.exp() * (log_p - log_q)


class Averaged(LabelLoss):
    def forward(self, log_q_label: Tensor, rows: Any = None) -> Tensor:
        return -log_q_label.mean()


@pytest.mark.parametrize("gradient", [True, False])
def test_a_part_that_does_not_give_one_value_per_token_is_named(gradient: bool) -> None:
    student, teacher = logits(2, 3, 200)
    student.requires_grad_(gradient)
    with pytest.raises(
        ValueError, match=r"Unsummed must return one value per token, shape \[5\], got \[5, 200\]: sum over"
    ):
        distillation_loss(student, teacher, LABELS, objective=Unsummed())
    with pytest.raises(ValueError, match=r"Averaged must return one value per token, shape \[5\], got \[\]: sum over"):
        distillation_loss(student, teacher, LABELS, objective=ForwardKL(), ce_weight=0.5, label_loss=Averaged())


@pytest.mark.parametrize("name", ["labels", "weights", "student_label", "teacher_label"])
def test_columns_with_names_of_the_loss_are_refused(name: str) -> None:
    student, teacher = logits(2, 3, 200)
    with pytest.raises(ValueError, match=f"rows must not be named labels, .*, got '{name}'"):
        distillation_loss(student, teacher, LABELS, objective=ForwardKL(), rows={name: torch.rand(2, 3)})


@pytest.mark.parametrize(
    ("name", "reason"), [("label_gradient", "must not be named"), ("a.b", "without a dot"), ("", "not empty")]
)
def test_monitors_whose_names_cannot_be_reported_are_refused(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"monitors .*{reason}.*'{name}'"):
        DistillationLoss(ForwardKL(), monitors={name: ReverseKL()})
