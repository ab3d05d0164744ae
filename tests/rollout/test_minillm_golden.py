"""MiniLLM's official loss: the clipped policy gradient as label loss, beside reverse KL, in the same pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kd_lightning.divergences import ReverseKL
from kd_lightning.label_losses import ClippedPolicyGradient
from kd_lightning.losses import distillation_loss, fused_distillation_loss
from minillm_golden import RECORDS, counted, tensors


def advantages(x: dict[str, Tensor], mask: Tensor, gamma: float) -> Tensor:
    """Discounted returns from the current token on, over the tokens that remain; whitened over all positions."""
    rewards, lengths = (x["rewards"] * mask).double(), mask.sum(1)
    returns = torch.zeros_like(rewards)
    for b in range(len(rewards)):
        after = 0.0
        for t in reversed(range(int(lengths[b]))):
            after = rewards[b, t].item() + gamma * after
            returns[b, t] = after / (int(lengths[b]) - t)
    return (returns - returns.mean()) / (returns.var() + 1e-8).sqrt()


@pytest.mark.parametrize("path", ["logits", "hidden"])
@pytest.mark.parametrize("record", RECORDS, ids=[record["id"] for record in RECORDS])
def test_loss_and_gradient(record: dict[str, Any], path: str) -> None:
    x, hyper = tensors(record), record["hyper"]
    mask = counted(x, hyper)
    advantage = advantages(x, mask, hyper["gamma"])
    torch.testing.assert_close(advantage[mask], x["advantages"].double()[mask], rtol=1e-4, atol=1e-5)

    response = slice(hyper["query_len"] - 1, -1)
    labels = x["response_ids"].masked_fill(~mask, -100)
    student = x["student_logits"].clone().requires_grad_()
    settings: dict[str, Any] = {
        "objective": ReverseKL(),
        "label_loss": ClippedPolicyGradient(hyper["cliprange"]),
        "rows": {"advantage": advantage, "old_log_prob": x["old_logprobs"], "importance": x["w"]},
        "ce_weight": 0.5 if hyper["single_step_reg"] else 1.0,
        "temperature": hyper["temperature"],
        "square_temperature": False,
    }
    if path == "logits":
        models = (student[:, response], x["teacher_logits"][:, response])
        loss = distillation_loss(*models, labels, **settings)
    else:
        one = torch.eye(student.shape[-1])
        models = (student[:, response], one, x["teacher_logits"][:, response], one)
        loss = fused_distillation_loss(*models, labels, chunk=5, **settings)
    if hyper["single_step_reg"]:  # the official loss is the sum of both, not their mean
        loss = 2 * loss
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(record["official_loss"], rel=5e-6)
    assert (gradient - x["grad"]).abs().max() <= 5e-6 * x["grad"].abs().max()


def test_the_five_settings_are_there() -> None:
    assert len(RECORDS) == 5
    assert {record["hyper"]["single_step_reg"] for record in RECORDS} == {True, False}
    assert {record["hyper"]["temperature"] for record in RECORDS} == {1.0, 2.0}
