"""Batches of log-probabilities for the tests of metrics."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_lightning.functional import log_softmax

V = 7


def case(batch: int = 3, length: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    log_p, log_q = (log_softmax(2 * torch.randn(batch, length, V, generator=generator)) for _ in range(2))
    labels = torch.randint(V, (batch, length), generator=generator)
    labels[torch.rand(batch, length, generator=generator) < 0.4] = -100
    return log_p, log_q, labels
