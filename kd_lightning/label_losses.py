r"""The term of the loss that reads one number per token, the student's log-probability of the label."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kd_lightning.schedules import check_number, column


class LabelLoss(nn.Module, ABC):
    """A function of log q(label) and of columns of the rows.

    Attributes:
        temperature: at which it reads q; None: the loss's temperature.
    """

    temperature: float | None = None

    @abstractmethod
    def forward(self, log_q_label: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """The loss of each row.

        Args:
            log_q_label: the student's log-probability of the label, [N].
            rows: columns, [N] each.

        Returns:
            [N].
        """


class CrossEntropy(LabelLoss):
    r"""\(-\log q(y)\), at temperature 1."""

    temperature = 1.0

    def forward(self, log_q_label: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """The negative log-likelihood of each row."""
        return -log_q_label


class ClippedPolicyGradient(LabelLoss):
    r"""MiniLLM's policy gradient, \(-\min\big(\rho A, \mathrm{clip}(\rho, 1-\epsilon, 1+\epsilon) A\big)\).

    \(\rho = w \exp(\log q(y) - \log q_\mathrm{old}(y))\), on sampled tokens, at the loss's temperature.
    Reads the columns "advantage" (A), "old_log_prob" (of the student that sampled) and "importance" (w, q over the
    distribution sampled from: 1 where that is q itself). Beside `ReverseKL` with `ce_weight=0.5` it is half of the
    authors' loss.

    Args:
        clip: ε, in (0, 1).

    Raises:
        ValueError: clip is out of its range; a column is missing.

    Gu et al., ICLR 2024, arXiv 2306.08543.
    """

    def __init__(self, clip: float = 0.2) -> None:
        super().__init__()
        check_number("clip", clip, 0, 1, "()")
        self.clip = clip

    def forward(self, log_q_label: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """The clipped loss of each row."""
        advantage, old, importance = (column(rows, name) for name in ("advantage", "old_log_prob", "importance"))
        ratio = (log_q_label - old).exp() * importance
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        return torch.maximum(-advantage * ratio, -advantage * clipped)


class SampledReverseKL(LabelLoss):
    r"""Reverse KL from tokens that the student sampled, where only their log p is known (a served teacher).

    With \(k = \log q(y) - \log p(y)\), both estimators have the gradient \(k \nabla \log q(y)\), whose mean over y ~ q
    is that of `ReverseKL`. They differ in value: "k1" gives k, unbiased; "k2" gives \(k^2/2\), never negative. The
    third in use, \(e^{-k} - 1 + k\), has the gradient of **forward** KL in the mean, and is not offered therefore.

    Reads the column "teacher_token_log_prob". Tokens have to be sampled from q at the loss's temperature.

    Args:
        estimator: "k1" or "k2".

    Raises:
        ValueError: the estimator is unknown; the column is missing.

    Schulman, 2020, "Approximating KL divergence".
    """

    def __init__(self, estimator: str = "k1") -> None:
        super().__init__()
        if estimator not in ("k1", "k2"):
            raise ValueError(f"estimator must be 'k1' or 'k2', got {estimator!r}")
        self.estimator = estimator

    def forward(self, log_q_label: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """The estimate of each row."""
        k = log_q_label - column(rows, "teacher_token_log_prob")
        if self.estimator == "k2":
            return k * k / 2
        constant = k.detach()  # k's own derivative is 0 in the mean: the value is k, the gradient k ∇ log q
        return constant + constant * (k - constant)
