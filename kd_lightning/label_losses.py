r"""Label losses, the second term of the loss: functions of the student's log-probability of the label."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from kd_lightning.schedules import check_flag, check_number, column


class LabelLoss(nn.Module, ABC):
    """A loss of the label's log q.

    `temperature`: the one at which log q is computed; None: that of the whole loss.

    `columns`: entries of `rows` that it reads and the loss computes wherever there is a teacher, at the same
    temperature and without gradient: "teacher_log_prob", log p of the label (the default), and "reverse_kl", KL(q ‖ p)
    of the token. With an entry, the teacher is run also at `ce_weight=1`; set `columns = ()` if it reads none of them.

    `sampled`: whether it is correct only for labels that are sampled from the student at that temperature.

    Examples:
        >>> import torch
        >>> from kd_lightning import LabelLoss
        >>> class Brier(LabelLoss):
        ...     columns = ()  # it reads nothing of the teacher
        ...     def forward(self, log_q_label, rows):
        ...         return (1 - log_q_label.exp()).square()
        >>> Brier()(torch.tensor([0.5, 0.9]).log(), {})
        tensor([0.2500, 0.0100])
    """

    temperature: float | None = 1.0
    columns: tuple[str, ...] = ("teacher_log_prob",)
    sampled: bool = False

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
    r"""\(-\log q_y\), at temperature 1: supervised fine-tuning on the labels.

    Examples:
        >>> import torch
        >>> from kd_lightning import CrossEntropy
        >>> CrossEntropy()(torch.tensor([0.5, 0.25]).log(), {})
        tensor([0.6931, 1.3863])
    """

    columns = ()

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

    Examples:
        >>> import torch
        >>> from kd_lightning import ClippedPolicyGradient
        >>> one, old = torch.ones(2), torch.tensor([0.5, 0.5]).log()
        >>> rows = {"advantage": one, "old_log_prob": old, "importance": one}
        >>> ClippedPolicyGradient(0.2)(torch.tensor([0.5, 1.0]).log(), rows)  # ρ is 1 and 2, which is clipped to 1.2
        tensor([-1.0000, -1.2000])
    """

    temperature = None
    columns = ()

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

    With \(k = \log q_y - \log p_y\) both estimators have the gradient \((k - b) \nabla \log q_y\): "k2" has the value
    \(k^2/2\), never negative, "k1_reward" the value k, unbiased. (Neither k itself nor \(e^{-k} - 1 + k\) is offered:
    the expected gradient of k is 0, and that of the other is the gradient of **forward** KL.) The baseline b is 0, or
    KL(q ‖ p) of the token: then the reward has mean 0, which changes no value and no expected gradient, and usually
    lowers the variance.

    Reads "teacher_log_prob" (log p of the label; the older name "teacher_token_log_prob" is read first) and with a
    baseline "reverse_kl", all at the sampling temperature; the loss computes them wherever there is a teacher. For
    responses that were sampled by an earlier student, or from a mixture, everything is multiplied by the importance
    weight without gradient: \(e^{\log q_y - \log q_y^{old}}\) if `rows` has "old_log_prob", times "importance" if it
    has that. It corrects the token's own distribution, not that of the prefix.

    Args:
        estimator: "k2" or "k1_reward".
        baseline: whether b is the full reverse KL of the token. With a teacher's top-k log-probabilities it is computed
            on tokens that do not depend on the label: the top k − 1, and all others together.

    Raises:
        ValueError: an argument is out of range; in `forward`, an entry of `rows` is missing.

    Reference: Lu et al., On-Policy Distillation, Thinking Machines 2025; baseline: vOPD, arXiv 2605.07865.

    Examples:
        >>> import torch
        >>> from kd_lightning import SampledReverseKL
        >>> log_q, rows = torch.tensor([0.5]).log(), {"teacher_log_prob": torch.tensor([0.25]).log()}
        >>> SampledReverseKL("k1_reward")(log_q, rows), SampledReverseKL("k2")(log_q, rows)  # k = log 2, and k² / 2
        (tensor([0.6931]), tensor([0.2402]))
    """

    temperature = None
    sampled = True

    def __init__(self, estimator: str = "k2", baseline: bool = False) -> None:
        super().__init__()
        if not isinstance(estimator, str) or estimator not in ("k2", "k1_reward"):
            raise ValueError(f"estimator must be 'k2' or 'k1_reward', got {estimator!r}")
        check_flag("baseline", baseline)
        self.estimator, self.baseline = estimator, baseline
        self.columns = ("teacher_log_prob", "reverse_kl") if baseline else ("teacher_log_prob",)

    def forward(self, log_q_label: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """Loss per token."""
        old_name = "teacher_token_log_prob"
        k = log_q_label - column(rows, old_name if old_name in rows else "teacher_log_prob", "SampledReverseKL")
        reward = k.detach()
        if self.baseline:
            value = reward if self.estimator == "k1_reward" else 0.5 * reward * reward
            loss = value + (reward - column(rows, "reverse_kl", "SampledReverseKL")) * (k - reward)
        elif self.estimator == "k2":
            loss = 0.5 * k * k
        else:
            loss = reward + reward * (k - reward)  # the value k, the gradient k ∇ log q
        if "old_log_prob" in rows:
            loss = (log_q_label.detach() - rows["old_log_prob"]).exp() * loss
        return rows["importance"] * loss if "importance" in rows else loss
