r"""The second term of a token's loss: a function of the label's log-probability under the student."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from kd_lightning.schedules import check_number, column


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
    "advantage" (A), "old_log_prob", and "importance" (w: 1 where the student alone was sampled), at the sampling
    temperature. Beside `ReverseKL` with `ce_weight=0.5` it is half of the authors' loss.

    Args:
        clip: c in (0, 1).

    Raises:
        ValueError: clip is out of its range; in a call, a column is missing.

    Reference: Gu et al., arXiv 2306.08543.
    """

    temperature = None

    def __init__(self, clip: float = 0.2) -> None:
        super().__init__()
        check_number("clip", clip, 0, 1, "()")
        self.clip = clip

    def forward(self, log_q_label: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """Loss per token."""
        advantage = column(rows, "advantage", "ClippedPolicyGradient")
        ratio = (log_q_label - column(rows, "old_log_prob", "ClippedPolicyGradient")).exp()
        ratio = ratio * column(rows, "importance", "ClippedPolicyGradient")
        return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - self.clip, 1 + self.clip))


@final
class SampledReverseKL(LabelLoss):
    r"""Reverse KL estimated from the student's own sampled tokens; in expectation the gradient of `ReverseKL`.

    With \(k = \log q_y - \log p_y\) both estimators have the gradient \(k \nabla \log q_y\): "k2" has the value
    \(k^2/2\), never negative, "k1_reward" the value k, unbiased. (Differentiating k itself gives 0 in expectation,
    and the popular \(e^{-k} - 1 + k\) gives the gradient of **forward** KL: neither is offered.) Reads the
    column "teacher_token_log_prob", at the sampling temperature.

    Args:
        estimator: "k2" or "k1_reward".

    Raises:
        ValueError: the estimator is neither; in a call, the column is missing.
    """

    temperature = None

    def __init__(self, estimator: str = "k2") -> None:
        super().__init__()
        if estimator not in ("k2", "k1_reward"):
            raise ValueError(f"estimator must be 'k2' or 'k1_reward', got {estimator!r}")
        self.estimator = estimator

    def forward(self, log_q_label: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """Loss per token."""
        k = log_q_label - column(rows, "teacher_token_log_prob", "SampledReverseKL")
        if self.estimator == "k2":
            return 0.5 * k * k
        reward = k.detach()
        return reward + reward * (k - reward)  # the value k, the gradient k ∇ log q
