"""Reference implementation of the loss: full logits, float64, a Python loop over tokens, plain autograd."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kd_lightning.divergences import Composite, Divergence
from kd_lightning.engine.head import Head
from kd_lightning.losses import fused_distillation_loss

B, T, V, HS, HT = 3, 5, 17, 4, 6  # of `Problem`


class Hellinger(Divergence):
    """A custom divergence: the squared Hellinger distance."""

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return 1 - ((log_p + log_q) / 2).exp().sum(-1)


class Forward(Divergence):
    """Its gradient does not depend on q."""

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_p.exp() * (log_p - log_q)).sum(-1)


class Reverse(Divergence):
    """Its gradient is a small difference of large terms."""

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_q.exp() * (log_q - log_p)).sum(-1)


class DetachedMixture(Divergence):
    """KL from a detached mixture, as in TAID."""

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        log_r = torch.log_softmax((0.3 * log_p + 0.7 * log_q).detach(), -1)
        return (log_r.exp() * (log_r - log_q)).sum(-1)


class ByColumn(Composite):
    """Weights two divergences by an extra input per token."""

    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        assert rows is not None
        share = rows["share"]
        return share * Forward()(log_p, log_q) + (1 - share) * Reverse()(log_p, log_q)


def logits(hidden: Tensor, head: Head) -> Tensor:
    x = hidden.double() @ head.weight.double().T
    if head.bias is not None:
        x = x + head.bias.double()
    x = x * head.scale
    return x if head.softcap is None else head.softcap * torch.tanh(x / head.softcap)


def token_losses(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    objective: Divergence,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    square_temperature: bool = True,
    rows: Mapping[str, Tensor] | None = None,
) -> list[list[Tensor]]:
    """Losses of the tokens with a label of each response, from the logits [B, T, V] of both models."""
    common = min(student.shape[-1], teacher.shape[-1])
    student, teacher = student.double()[..., :common], teacher.double()[..., :common]
    losses: list[list[Tensor]] = []
    for b in range(labels.shape[0]):
        losses.append([])
        for t in range(labels.shape[1]):
            if labels[b, t] == -100:
                continue
            log_p = torch.log_softmax(teacher[b, t] / temperature, -1)
            log_q = torch.log_softmax(student[b, t] / temperature, -1)
            row = {name: column[b, t] if column.ndim == 2 else column[b] for name, column in (rows or {}).items()}
            kd = objective(log_p, log_q, row) if isinstance(objective, Composite) else objective(log_p, log_q)
            ce = -torch.log_softmax(student[b, t], -1)[labels[b, t]]
            factor = temperature**2 if square_temperature else 1.0
            losses[b].append((1 - ce_weight) * factor * kd + ce_weight * ce)
    return losses


def reduce(losses: list[list[Tensor]], reduction: str) -> Tensor:
    responses = [torch.stack(response) for response in losses if response]
    if reduction == "token_mean":
        return torch.cat(responses).mean()
    if reduction == "sequence_mean":
        return torch.stack([response.mean() for response in responses]).mean()
    return torch.cat(responses).sum()


def error(mine: Tensor, reference: Tensor) -> float:
    """Relative L2 distance."""
    return ((mine.double() - reference.double()).norm() / reference.double().norm()).item()


class Problem:
    """Hidden states, LM heads and labels of two models; the second response has one label, the third none."""

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


def problem(
    n: int = 11, vocabulary: int = 23, dtype: torch.dtype = torch.float64, widths: tuple[int, int] = (4, 6)
) -> dict[str, Any]:
    """Arguments of `fused_distillation_loss` for one response of n tokens with labels."""
    g = torch.Generator().manual_seed(3)
    student, teacher = widths
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    return {
        "student_hidden": randn(1, n, student).requires_grad_(),
        "student_head": randn(vocabulary, student).requires_grad_(),
        "teacher_hidden": randn(1, n, teacher),
        "teacher_head": randn(vocabulary, teacher),
        "labels": torch.randint(0, vocabulary, (1, n), generator=g),
    }


def results(arguments: dict[str, Any], **settings: Any) -> tuple[Tensor, ...]:
    loss = fused_distillation_loss(**arguments, **{"compile": False, **settings})
    return loss, *torch.autograd.grad(loss, (arguments["student_hidden"], arguments["student_head"]))
