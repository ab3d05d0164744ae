r"""The second term of a token's loss: a function of the label's log-probability under the student."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn


class LabelLoss(nn.Module, ABC):
    """A loss of log q at the label; `temperature` is where it wants log q (None: at the loss's own)."""

    temperature: float | None = 1.0

    @abstractmethod
    def forward(self, log_q_label: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """Loss per token.

        Args:
            log_q_label: student's log-probability of the label, [N].
            rows: columns, [N].

        Returns:
            [N].
        """


def column(rows: Mapping[str, Tensor], name: str, reader: str) -> Tensor:
    """One column.

    Raises:
        ValueError: it is missing; naming it and who reads it.
    """
    if name not in rows:
        raise ValueError(f"{reader} reads the column {name!r} of rows, which is missing")
    return rows[name]


@final
class CrossEntropy(LabelLoss):
    r"""\(-\log q_y\), at temperature 1: plain fine-tuning on the labels."""

    def forward(self, log_q_label: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """Loss per token."""
        return -log_q_label


@final
class ClippedPolicyGradient(LabelLoss):
    r"""MiniLLM's and PPO's clipped surrogate, \(\max(-A\rho, -A\,\mathrm{clip}(\rho, 1-c, 1+c))\).

    \(\rho = w\,e^{\log q_y - \log q_y^{old}}\), clipped after the importance weight w is in it. Reads the columns
    "advantage" (A), "old_log_prob", and "importance" (w; 1 where it is absent), at the sampling temperature.

    Args:
        clip: c in (0, 1).

    Raises:
        ValueError: clip is out of its range; in a call, a column is missing.

    Reference: Gu et al., arXiv 2306.08543.
    """

    temperature = None

    def __init__(self, clip: float = 0.2) -> None:
        super().__init__()
        if not 0 < clip < 1:
            raise ValueError(f"clip must be in (0, 1), got {clip}")
        self.clip = clip

    def forward(self, log_q_label: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """Loss per token."""
        advantage = column(rows, "advantage", "ClippedPolicyGradient")
        ratio = (log_q_label - column(rows, "old_log_prob", "ClippedPolicyGradient")).exp()
        if "importance" in rows:
            ratio = ratio * rows["importance"]
        return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - self.clip, 1 + self.clip))


@final
class SampledReverseKL(LabelLoss):
    r"""An estimate of reverse KL from the student's own sampled tokens: gradient in expectation \(\nabla\mathrm{KL}(q\|p)\).

    With \(k = \log q_y - \log p_y\): "k2": \(k^2/2\); "reward": \(\mathrm{sg}[k]\log q_y\). (Differentiating k itself gives
    0 in expectation, and the popular \(e^{-k} - 1 + k\) gives the gradient of **forward** KL: neither is offered.) Reads the
    column "teacher_token_log_prob", at the sampling temperature.

    Args:
        estimator: "k2" or "reward".

    Raises:
        ValueError: the estimator is neither; in a call, the column is missing.
    """

    temperature = None

    def __init__(self, estimator: str = "k2") -> None:
        super().__init__()
        if estimator not in ("k2", "reward"):
            raise ValueError(f"estimator must be 'k2' or 'reward', got {estimator!r}")
        self.estimator = estimator

    def forward(self, log_q_label: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """Loss per token."""
        k = log_q_label - column(rows, "teacher_token_log_prob", "SampledReverseKL")
        return 0.5 * k * k if self.estimator == "k2" else k.detach() * log_q_label
