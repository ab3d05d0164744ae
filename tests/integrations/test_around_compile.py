"""`torch.compile` around a loss: one break, the same value and gradient; a full graph is refused by torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kd_lightning import AdaptiveKL, distillation_loss, fused_distillation_loss


def from_logits(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return 2 * distillation_loss(student * 1.5, teacher, labels, objective=AdaptiveKL())


def from_hidden(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    weight = torch.linspace(-1, 1, 8 * 11).view(11, 8).sin()
    return 2 * fused_distillation_loss(student * 1.5, weight, teacher, weight, labels, objective=AdaptiveKL())


@pytest.mark.filterwarnings("ignore")  # of torch.compile's own parts
@pytest.mark.parametrize(("loss", "width"), [(from_logits, 11), (from_hidden, 8)])
def test_the_body_may_be_compiled_with_the_loss(loss: Callable[..., Tensor], width: int) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, width, requires_grad=True), torch.randn(2, 5, width)
    labels = torch.randint(0, 11, (2, 5))
    torch._dynamo.reset()
    expected = loss(student, teacher, labels)
    found = torch.compile(loss, backend="eager")(student, teacher, labels)
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(value, student)[0] for value in (found, expected)))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(loss, backend="eager", fullgraph=True)(student, teacher, labels)
