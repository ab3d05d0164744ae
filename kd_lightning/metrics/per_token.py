r"""Torchmetrics that compare a student with its teacher: means over the tokens with a label.

They reduce correctly across ranks and uneven batches: every metric keeps a sum and a count in float64, both summed over
ranks. Log-probabilities are `functional.log_softmax` of the logits, \(\log p\) of the teacher and \(\log q\) of the
student, aligned with the labels (position t predicts `labels[..., t]`). They work in any loop, and Lightning's `log`
accepts them. The value of one token is the function of the same name in `functional`, or the divergence.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from kd_lightning import functional
from kd_lightning.divergences import Divergence, evaluate
from kd_lightning.metrics.tokens import labeled, labeled_pair, select, shape_of, targets_of


class _Plotted(Metric, ABC):
    """Common settings of all metrics in this file."""

    full_state_update = False
    is_differentiable = False
    higher_is_better: bool | None = None
    plot_lower_bound = 0.0

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Plot the value with matplotlib; arguments and result as in torchmetrics."""
        return self._plot(val, ax)


class _PerTokenMean(_Plotted, ABC):
    """Sum and count of one value per token."""

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # A run may validate on 1e9 tokens, and fp32 cannot count beyond 1.7e7.
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        # A MetricCollection merges metrics whose states are equal after the first batch, as those of two divergences
        # are if p = q there. NaN is never equal.
        self.add_state("unlike", torch.tensor(float("nan")), dist_reduce_fx="max")

    def _add(self, values: Tensor, weights: Tensor | None = None) -> None:
        # Not in place: a state made in inference mode (`Trainer.validate`) cannot be written to outside of it.
        values = values.detach().double()
        if weights is None:
            self.count = self.count + values.numel()
        else:
            weights = weights.detach().double()
            values = values * weights
            self.count = self.count + weights.sum()
        self.total = self.total + values.sum()

    def compute(self) -> Tensor:
        """Mean over all tokens of all ranks, 0-d fp32; NaN without tokens."""
        return (self.total / self.count).float()


class _OfTwoModels(_Plotted, ABC):
    """A metric whose `update` takes the log-probabilities of teacher and student."""

    def update_from_logits(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> None:
        """Add tokens from logits [..., V], aligned with the labels; other arguments and errors as in `update`.

        The order is that of the losses: the student first.
        """
        log_p, log_q = functional.log_softmax(teacher_logits.detach()), functional.log_softmax(student_logits.detach())
        self.update(log_p, log_q, labels=labels, **kwargs)


class _OfOneModel(_Plotted, ABC):
    """A metric whose `update` takes the log-probabilities of one model."""

    def update_from_logits(self, logits: Tensor, labels: Tensor | None = None) -> None:
        """Add tokens from logits of either model, [..., V], aligned with the labels; labels, errors: see `update`."""
        self.update(functional.log_softmax(logits.detach()), labels=labels)


class TokenMean(_PerTokenMean):
    r"""Mean of given values, \(\sum_i w_i x_i / \sum_i w_i\), for example the `values` of `LossParts`.

    Reduces to the unweighted mean without weights. NaN before the first token.

    Args:
        kwargs: arguments of `torchmetrics.Metric`.

    Examples:
        >>> import torch
        >>> from kd_lightning import TokenMean
        >>> TokenMean()(torch.tensor([1.0, 3.0]), weights=torch.tensor([3.0, 1.0]))
        tensor(1.5000)
    """

    def update(self, values: Tensor, weights: Tensor | None = None) -> None:
        """Add values.

        Args:
            values: any shape and floating-point dtype; may be empty.
            weights: the same shape, not negative; None: all 1.

        Raises:
            ValueError: the shapes differ.
        """
        if weights is not None and weights.shape != values.shape:
            raise ValueError(f"weights must have the shape of values, {shape_of(values)}, got {shape_of(weights)}")
        self._add(values, weights)


class DivergenceMetric(_PerTokenMean, _OfTwoModels):
    r"""Mean divergence of teacher and student, \(\frac1N \sum_t D(p_t, q_t)\), independent of the training loss.

    Args:
        divergence: any `Divergence`, also your own.
        kwargs: arguments of `torchmetrics.Metric`.

    Examples:
        >>> import torch
        >>> from kd_lightning import DivergenceMetric, ForwardKL
        >>> log_p, log_q = torch.tensor([[[0.5, 0.5]] * 2, [[0.25, 0.75], [0.5, 0.5]]]).log()
        >>> DivergenceMetric(ForwardKL())(log_p, log_q)  # 0.1438 and 0
        tensor(0.0719)
    """

    higher_is_better = False

    def __init__(self, divergence: Divergence, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.divergence = divergence

    def update(
        self,
        log_p: Tensor,
        log_q: Tensor,
        labels: Tensor | None = None,
        rows: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add tokens.

        Args:
            log_p: the teacher's log-probabilities, [..., V].
            log_q: the student's, the same shape.
            labels: [...]; −100: no label; None: all tokens are used.
            rows: extra inputs per token by name, [...], for a divergence that reads them (`Contrastive`: "source").

        Raises:
            ValueError: shapes differ.
        """
        index = labeled_pair(log_p, log_q, labels)
        columns = None if rows is None else {name: column.reshape(-1)[index] for name, column in rows.items()}
        self._add(evaluate(self.divergence, select(log_p, index), select(log_q, index), columns))


class NLL(_PerTokenMean, _OfOneModel):
    r"""Mean negative log-likelihood of the labels, \(-\frac1N \sum_t \log q_t(y_t)\), in nats per token with a label.

    Args:
        kwargs: arguments of `torchmetrics.Metric`.

    Examples:
        >>> import torch
        >>> from kd_lightning import NLL
        >>> NLL()(torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log(), torch.tensor([1, -100]))  # log 2
        tensor(0.6931)
    """

    higher_is_better = False

    def update(self, log_q: Tensor, labels: Tensor) -> None:
        """Add tokens.

        Args:
            log_q: log-probabilities of either model, [..., V].
            labels: [...]; −100: no label.

        Raises:
            ValueError: shapes differ, or a label is outside the vocabulary.
        """
        index = labeled(log_q, labels)
        self._add(functional.nll(select(log_q, index), targets_of(log_q, labels, index)))


class BeatsTeacher(_PerTokenMean, _OfTwoModels):
    r"""Share of tokens whose label has a higher probability under the student, \(q_t(y_t) > p_t(y_t)\), in [0, 1].

    Equal probabilities count ½, so that a copy of the teacher scores ½.

    Args:
        kwargs: arguments of `torchmetrics.Metric`.

    Examples:
        >>> import torch
        >>> from kd_lightning import BeatsTeacher
        >>> log_p, log_q = torch.tensor([[[0.5, 0.5]] * 2, [[0.25, 0.75]] * 2]).log()
        >>> BeatsTeacher()(log_p, log_q, torch.tensor([0, 1]))
        tensor(0.5000)
    """

    higher_is_better = True
    plot_upper_bound = 1.0

    def update(self, log_p: Tensor, log_q: Tensor, labels: Tensor) -> None:
        """Add tokens; distributions as in `DivergenceMetric.update`, labels and errors as in `NLL.update`."""
        index = labeled_pair(log_p, log_q, labels)
        targets = targets_of(log_q, labels, index)
        self._add(functional.beats_teacher(select(log_p, index), select(log_q, index), targets))


class Agreement(_PerTokenMean, _OfTwoModels):
    r"""Share of the teacher's k most probable tokens that are among the student's k most probable ones, in [0, 1].

    Reduces to the share of positions with the same most probable token, \(\arg\max p_t = \arg\max q_t\), at k = 1.

    Args:
        top_k: k, at least 1.
        kwargs: arguments of `torchmetrics.Metric`.

    Raises:
        ValueError: `top_k` is not positive, or (in `update`) larger than the vocabulary.

    Examples:
        >>> import torch
        >>> from kd_lightning import Agreement
        >>> log_p, log_q = torch.tensor([[[0.6, 0.3, 0.1]], [[0.5, 0.1, 0.4]]]).log()
        >>> Agreement()(log_p, log_q), Agreement(top_k=2)(log_p, log_q)
        (tensor(1.), tensor(0.5000))
    """

    higher_is_better = True
    plot_upper_bound = 1.0

    def __init__(self, top_k: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        self.top_k = top_k

    def update(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None = None) -> None:
        """Add tokens; arguments as in `DivergenceMetric.update`."""
        index = labeled_pair(log_p, log_q, labels)
        if self.top_k > log_p.shape[-1]:
            raise ValueError(f"top_k must be at most the vocabulary's size, {log_p.shape[-1]}, got {self.top_k}")
        self._add(functional.agreement(select(log_p, index), select(log_q, index), self.top_k))


class Entropy(_PerTokenMean, _OfOneModel):
    r"""Mean entropy of one model, \(-\frac1N \sum_t \sum_v q_t(v) \log q_t(v)\), in nats.

    Zero if and only if every distribution has one token with probability 1; at most \(\log V\).

    Args:
        kwargs: arguments of `torchmetrics.Metric`.

    Examples:
        >>> import torch
        >>> from kd_lightning import Entropy
        >>> Entropy()(torch.tensor([[0.5, 0.5], [1.0, 0.0]]).log().clamp_min(-1e4))  # log 2 and 0
        tensor(0.3466)
    """

    def update(self, log_q: Tensor, labels: Tensor | None = None) -> None:
        """Add tokens; `log_q` and errors as in `NLL.update`, at least −1e4 everywhere; labels None: all tokens."""
        self._add(functional.entropy(select(log_q, labeled(log_q, labels))))


class CalibrationError(_OfOneModel):
    r"""Expected calibration error of the top token, \(\sum_b \frac{n_b}{N} |\mathrm{acc}_b - \mathrm{conf}_b|\).

    The mean difference between accuracy and confidence \(\max_v q_t(v)\) over bins of equal width of the confidence.
    Equal to torchmetrics' `MulticlassCalibrationError` with norm l1, which stores every confidence; this metric stores
    three sums per bin.

    Args:
        bins: number of bins, at least 1.
        kwargs: arguments of `torchmetrics.Metric`.

    Raises:
        ValueError: `bins` is not positive.

    Examples:
        >>> import torch
        >>> from kd_lightning import CalibrationError
        >>> log_q = torch.tensor([[0.8, 0.2]] * 2).log()
        >>> CalibrationError()(log_q, torch.tensor([0, 1]))  # confidence 0.8, accuracy 0.5
        tensor(0.3000)
    """

    higher_is_better = False
    plot_upper_bound = 1.0
    sums: Tensor

    def __init__(self, bins: int = 15, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if bins < 1:
            raise ValueError(f"bins must be at least 1, got {bins}")
        self.bins = bins
        self.add_state("sums", torch.zeros(3, bins, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, log_q: Tensor, labels: Tensor) -> None:
        """Add tokens; arguments and errors as in `NLL.update`."""
        index = labeled(log_q, labels)
        targets = targets_of(log_q, labels, index)
        self.sums = self.sums + functional.calibration_sums(select(log_q, index), targets, self.bins)

    def compute(self) -> Tensor:
        """The error in [0, 1], 0-d fp32; NaN before the first token."""
        count, confidence, correct = self.sums
        error: Tensor = (correct - confidence).abs().sum() / count.sum()
        return error.float()
