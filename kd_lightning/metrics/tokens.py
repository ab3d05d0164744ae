"""What metrics are given: log-probabilities of one shape, and which tokens have a label."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_lightning.constants import IGNORE_INDEX


def labeled(log_q: Tensor, labels: Tensor | None) -> Tensor:
    """Indices of the tokens with a label among all tokens."""
    index = _with_label(log_q, labels)
    check_normalized(log_q, index)
    return index


def check_normalized(log_q: Tensor, index: Tensor) -> None:
    """Raise a ValueError unless these are log-probabilities; logits would give a number without meaning."""
    sums = torch.logsumexp(select(log_q, index).float(), -1)
    tolerance = 0.1 if log_q.dtype in (torch.bfloat16, torch.float16) else 1e-2
    wrong = sums[sums.abs() > tolerance]  # NaN is kept: the value shows it
    if wrong.numel():
        raise ValueError(
            "update takes log-probabilities, whose exponentials sum to 1, got a sum of "
            f"exp({float(wrong[0]):.3g}): use update_from_logits for logits"
        )


def _with_label(log_q: Tensor, labels: Tensor | None) -> Tensor:
    if labels is None:
        return torch.arange(log_q.shape[:-1].numel(), device=log_q.device)
    if labels.shape != log_q.shape[:-1]:
        raise ValueError(
            f"labels must have the shape of the log-probabilities without the vocabulary, {shape_of(log_q[..., 0])}, "
            f"got {shape_of(labels)}"
        )
    return (labels.reshape(-1).long() != IGNORE_INDEX).nonzero().squeeze(-1)  # uint8 cannot hold −100


def targets_of(log_q: Tensor, labels: Tensor, index: Tensor) -> Tensor:
    """Labels of the tokens with a label; a ValueError if one is outside the vocabulary."""
    targets = labels.reshape(-1)[index].long()
    outside = targets[(targets < 0) | (targets >= log_q.shape[-1])]
    if outside.numel():
        raise ValueError(f"labels must be in [0, {log_q.shape[-1]}) or −100, got {int(outside[0])}")
    return targets


def select(log_p: Tensor, index: Tensor) -> Tensor:
    """The distributions of some tokens, [N, V]."""
    return log_p.detach().reshape(-1, log_p.shape[-1]).index_select(0, index)


def labeled_pair(log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
    """Indices of the tokens with a label; a ValueError unless both are log-probabilities of one shape."""
    if log_p.shape != log_q.shape:
        raise ValueError(f"log_p and log_q must have the same shape, got {shape_of(log_p)} and {shape_of(log_q)}")
    index = labeled(log_q, labels)
    check_normalized(log_p, index)
    return index


def shape_of(x: Tensor) -> str:
    """A shape, for messages."""
    return str(list(x.shape))
