r"""Label losses, the second term of the loss: functions of the student's log-probability of the label."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from kd_lightning.schedules import check_number, column


class LabelLoss(nn.Module, ABC):
    """A loss of the label's log q. `temperature`: the one at which log q is computed; None: that of the whole loss."""

    temperature: float | None = 1.0

    @abstractmethod
    def forward(self, log_q_label: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """Loss per token.

        Args:
            log_q_label: the student's log-probability of the label, [N].
            rows: extra inputs per token by name, each [N].

        Returns:
            One value per token, [N].
        """


@final
class CrossEntropy(LabelLoss):
    r"""\(-\log q_y\), at temperature 1: supervised fine-tuning on the labels."""

    def forward(self, log_q_label: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """Loss per token."""
        return -log_q_label


@final
class ClippedPolicyGradient(LabelLoss):
    r"""The clipped surrogate loss of MiniLLM and PPO, \(\max(-A\rho, -A\,\mathrm{clip}(\rho, 1-c, 1+c))\).

    \(\rho = w\,e^{\log q_y - \log q_y^{old}}\), clipped after multiplication by the importance weight w. Reads
    "advantage" (A), "old_log_prob" and "importance" (w: 1 for tokens sampled from the student alone) from `rows`, at
    the sampling temperature. With `ReverseKL` and `ce_weight=0.5` the loss is half of the authors' loss.

    Args:
        clip: c in (0, 1).

    Raises:
        ValueError: clip is out of range; in `forward`, an entry of `rows` is missing.

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
    r"""Reverse KL estimated from tokens sampled from the student; its expected gradient is that of `ReverseKL`.

    With \(k = \log q_y - \log p_y\) both estimators have the gradient \(k \nabla \log q_y\): "k2" has the value
    \(k^2/2\), never negative, "k1_reward" the value k, unbiased. (Neither k itself nor \(e^{-k} - 1 + k\) is offered:
    the expected gradient of k is 0, and that of the other is the gradient of **forward** KL.) Reads
    "teacher_token_log_prob" from `rows`, at the sampling temperature.

    Args:
        estimator: "k2" or "k1_reward".

    Raises:
        ValueError: the estimator is unknown; in `forward`, the entry of `rows` is missing.
    """

    temperature = None

    def __init__(self, estimator: str = "k2") -> None:
        super().__init__()
        if not isinstance(estimator, str) or estimator not in ("k2", "k1_reward"):
            raise ValueError(f"estimator must be 'k2' or 'k1_reward', got {estimator!r}")
        self.estimator = estimator

    def forward(self, log_q_label: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """Loss per token."""
        k = log_q_label - column(rows, "teacher_token_log_prob", "SampledReverseKL")
        if self.estimator == "k2":
            return 0.5 * k * k
        reward = k.detach()
        return reward + reward * (k - reward)  # the value k, the gradient k ∇ log q
