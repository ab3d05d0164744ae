r"""Torchmetrics of a student and its teacher: means over counted tokens, right over ranks and unequal batches.

Every metric keeps a sum and a count in float64, both added up over ranks; one line divides. Log-probabilities are
`functional.log_softmax` of the logits, \(\log p\) the teacher's and \(\log q\) the student's, already aligned with the
labels (position t predicts `labels[..., t]`). Usable in any loop; Lightning logs them as they are. The value of one
token is the function of the same name in `functional` (of a divergence: the divergence).
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from kd_lightning import functional
from kd_lightning.constants import IGNORE_INDEX
from kd_lightning.divergences import Divergence, evaluate


class _Plotted(Metric, ABC):
    """What every metric here has in common."""

    full_state_update = False
    is_differentiable = False
    higher_is_better: bool | None = None
    plot_lower_bound = 0.0

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Draw the value with matplotlib, as torchmetrics' own metrics do.

        Args:
            val: a value, or one a step; None: `compute()`.
            ax: axes to draw on; None: new ones.

        Returns:
            The figure, None where axes were given, and the axes.
        """
        return self._plot(val, ax)


class _PerTokenMean(_Plotted, ABC):
    """Sum and count of values that stand one to a token."""

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # A run's validation may add up 1e9 tokens: fp32 stops counting at 1.7e7.
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        # A MetricCollection takes metrics for one and the same whose states are equal after the first batch, as those
        # of two divergences are where p = q there. NaN equals nothing.
        self.add_state("unlike", torch.tensor(float("nan")), dist_reduce_fx="max")

    def _add(self, values: Tensor, weights: Tensor | None = None) -> None:
        # Not in place: a state made in inference mode (`Trainer.validate`) must not be written to outside of it.
        values = values.detach().double()
        if weights is None:
            self.count = self.count + values.numel()
        else:
            weights = weights.detach().double()
            values = values * weights
            self.count = self.count + weights.sum()
        self.total = self.total + values.sum()

    def compute(self) -> Tensor:
        """Mean over every token seen on every rank, 0-d fp32; NaN where none was."""
        return (self.total / self.count).float()


class TokenMean(_PerTokenMean):
    r"""Mean of values that are there already, \(\sum_i w_i x_i / \sum_i w_i\): the `values` of `LossParts`, say.

    Reduces to the plain mean without weights. NaN before the first token.

    Args:
        kwargs: arguments of `torchmetrics.Metric`.
    """

    def update(self, values: Tensor, weights: Tensor | None = None) -> None:
        """Add values.

        Args:
            values: any shape, any float type; empty is fine.
            weights: the same shape, not negative; None: 1 each.

        Raises:
            ValueError: the shapes differ.
        """
        if weights is not None and weights.shape != values.shape:
            raise ValueError(f"weights must have the shape of values, {_shape(values)}, got {_shape(weights)}")
        self._add(values, weights)


class DivergenceMetric(_PerTokenMean):
    r"""Mean divergence of teacher and student, \(\frac1N \sum_t D(p_t, q_t)\), whatever the training loss is.

    Args:
        divergence: any `Divergence`, the user's own included.
        kwargs: arguments of `torchmetrics.Metric`.
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
            labels: [...], −100 where a token is not counted; None: all are.
            rows: columns of shape [...] for a divergence that reads them (`Contrastive`: "source").

        Raises:
            ValueError: shapes differ.
        """
        _check_pair(log_p, log_q)
        index = _counted(log_q, labels)
        columns = None if rows is None else {name: column.reshape(-1)[index] for name, column in rows.items()}
        self._add(evaluate(self.divergence, _rows(log_p, index), _rows(log_q, index), columns))


class NLL(_PerTokenMean):
    r"""Mean negative log-likelihood of the labels, \(-\frac1N \sum_t \log q_t(y_t)\), in nats per counted token.

    Args:
        kwargs: arguments of `torchmetrics.Metric`.
    """

    higher_is_better = False

    def update(self, log_q: Tensor, labels: Tensor) -> None:
        """Add tokens.

        Args:
            log_q: log-probabilities of either model, [..., V].
            labels: [...], −100 where a token is not counted.

        Raises:
            ValueError: shapes differ, or a counted label lies outside the vocabulary.
        """
        index = _counted(log_q, labels)
        self._add(functional.nll(_rows(log_q, index), _targets(log_q, labels, index)))


class BeatsTeacher(_PerTokenMean):
    r"""Share of tokens to whose label the student gives more than the teacher, \(q_t(y_t) > p_t(y_t)\), in [0, 1].

    ½ where both give the same, so that a copy of the teacher scores ½.

    Args:
        kwargs: arguments of `torchmetrics.Metric`.
    """

    higher_is_better = True
    plot_upper_bound = 1.0

    def update(self, log_p: Tensor, log_q: Tensor, labels: Tensor) -> None:
        """Add tokens.

        Args:
            log_p: the teacher's log-probabilities, [..., V].
            log_q: the student's, the same shape.
            labels: [...], −100 where a token is not counted.

        Raises:
            ValueError: shapes differ, or a counted label lies outside the vocabulary.
        """
        _check_pair(log_p, log_q)
        index = _counted(log_q, labels)
        targets = _targets(log_q, labels, index)
        self._add(functional.beats_teacher(_rows(log_p, index), _rows(log_q, index), targets))


class Agreement(_PerTokenMean):
    r"""Share of the teacher's k likeliest tokens that are among the student's k likeliest, in [0, 1].

    Reduces to the share of tokens where both put the same one first, \(\arg\max p_t = \arg\max q_t\), at k = 1.

    Args:
        top_k: k, at least 1.
        kwargs: arguments of `torchmetrics.Metric`.

    Raises:
        ValueError: `top_k` is not positive, or (in `update`) larger than the vocabulary.
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
        _check_pair(log_p, log_q)
        if self.top_k > log_p.shape[-1]:
            raise ValueError(f"top_k must be at most the vocabulary's size, {log_p.shape[-1]}, got {self.top_k}")
        index = _counted(log_q, labels)
        self._add(functional.agreement(_rows(log_p, index), _rows(log_q, index), self.top_k))


class Entropy(_PerTokenMean):
    r"""Mean entropy of one model, \(-\frac1N \sum_t \sum_v q_t(v) \log q_t(v)\), in nats.

    Zero iff every distribution is certain, at most \(\log V\).

    Args:
        kwargs: arguments of `torchmetrics.Metric`.
    """

    def update(self, log_q: Tensor, labels: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            log_q: log-probabilities of either model, [..., V], −1e4 or more everywhere.
            labels: [...], −100 where a token is not counted; None: all are.

        Raises:
            ValueError: shapes differ.
        """
        self._add(functional.entropy(_rows(log_q, _counted(log_q, labels))))


class CalibrationError(_Plotted):
    r"""Expected calibration error of the likeliest token, \(\sum_b \frac{n_b}{N} |\mathrm{acc}_b - \mathrm{conf}_b|\).

    Over bins of equal width of the model's confidence \(\max_v q_t(v)\): how far "80 % sure" is from being right 80 %
    of the time. Equal to torchmetrics' `MulticlassCalibrationError` with norm l1, which keeps every confidence; here
    three sums a bin are kept.

    Args:
        bins: how many, at least 1.
        kwargs: arguments of `torchmetrics.Metric`.

    Raises:
        ValueError: `bins` is not positive.
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
        index = _counted(log_q, labels)
        targets = _targets(log_q, labels, index)
        self.sums = self.sums + functional.calibration_sums(_rows(log_q, index), targets, self.bins)

    def compute(self) -> Tensor:
        """The error in [0, 1], 0-d fp32; NaN before the first token."""
        count, confidence, right = self.sums
        error: Tensor = (right - confidence).abs().sum() / count.sum()
        return error.float()


def _counted(log_q: Tensor, labels: Tensor | None) -> Tensor:
    """Indices of the counted rows among all of them."""
    if labels is None:
        return torch.arange(log_q.shape[:-1].numel(), device=log_q.device)
    if labels.shape != log_q.shape[:-1]:
        raise ValueError(
            f"labels must have the shape of the log-probabilities less their vocabulary, {_shape(log_q[..., 0])}, "
            f"got {_shape(labels)}"
        )
    return (labels.reshape(-1).long() != IGNORE_INDEX).nonzero().squeeze(-1)  # uint8 holds no −100


def _targets(log_q: Tensor, labels: Tensor, index: Tensor) -> Tensor:
    """Labels of the counted rows, seen to lie in the vocabulary."""
    targets = labels.reshape(-1)[index].long()
    outside = targets[(targets < 0) | (targets >= log_q.shape[-1])]
    if outside.numel():
        raise ValueError(f"labels must lie in [0, {log_q.shape[-1]}) or be −100, got {int(outside[0])}")
    return targets


def _rows(log_p: Tensor, index: Tensor) -> Tensor:
    return log_p.detach().reshape(-1, log_p.shape[-1]).index_select(0, index)


def _check_pair(log_p: Tensor, log_q: Tensor) -> None:
    if log_p.shape != log_q.shape:
        raise ValueError(f"log_p and log_q must have one shape, got {_shape(log_p)} and {_shape(log_q)}")


def _shape(x: Tensor) -> str:
    return str(list(x.shape))
