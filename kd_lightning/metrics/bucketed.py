"""Any token metric per bucket of tokens: by position in the response, or by origin of the response."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.wrappers.abstract import WrapperMetric

from kd_lightning.constants import IGNORE_INDEX, SOURCES


class Bucketed(WrapperMetric, ABC):
    """One copy of a metric per bucket of tokens; every token with a label is in one bucket.

    `columns`: keyword arguments of `update` that are passed to `bucket` instead of the metric.

    Args:
        metric: any metric whose `update` takes `labels`, with −100 for tokens without a label.
        names: names of the buckets.
        kwargs: arguments of `torchmetrics.Metric`.
    """

    columns: tuple[str, ...] = ()

    def __init__(self, metric: Metric, names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = tuple(names)
        self.metrics: Any = nn.ModuleList(deepcopy(metric) for _ in names)

    @abstractmethod
    def bucket(self, labels: Tensor, **kwargs: Tensor) -> Tensor:
        """Bucket index of every token, in the shape of `labels` or broadcastable to it."""

    def update(self, *args: Tensor, labels: Tensor, **kwargs: Any) -> None:
        """Add tokens.

        Args:
            args: arguments of the metric before its labels (`log_p`, `log_q`).
            labels: [B, T]; −100: no label.
            kwargs: further arguments of the metric or of `bucket`.

        Raises:
            ValueError: raised by the metric or by `bucket`.
        """
        for metric, selected in self._split(labels, kwargs):
            metric.update(*args, labels=selected, **metric._filter_kwargs(**kwargs))

    def update_from_logits(self, *args: Tensor, labels: Tensor, **kwargs: Any) -> None:
        """Add tokens from logits.

        Args:
            args: arguments of the metric's `update_from_logits` before its labels (`student_logits`, `teacher_logits`).
            labels: [B, T]; −100: no label.
            kwargs: further arguments of the metric or of `bucket`.

        Raises:
            ValueError: raised by the metric or by `bucket`.
        """
        for metric, selected in self._split(labels, kwargs):
            update: Any = metric.update_from_logits  # a metric of this package
            update(*args, labels=selected, **metric._filter_kwargs(**kwargs))

    def forward(self, *args: Tensor, labels: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        """Add tokens and return the metric of each bucket over these tokens; arguments as in `update`."""
        buckets = self._split(labels, kwargs)
        values = [metric(*args, labels=selected, **metric._filter_kwargs(**kwargs)) for metric, selected in buckets]
        return dict(zip(self.names, values, strict=True))

    def _split(self, labels: Tensor, kwargs: dict[str, Any]) -> list[tuple[Metric, Tensor]]:
        """The metric and the labels of each bucket; arguments of `bucket` are removed from `kwargs`."""
        own = {name: kwargs.pop(name) for name in self.columns if name in kwargs}
        bucket = self.bucket(labels, **own)
        return [(metric, labels.masked_fill(bucket != i, IGNORE_INDEX)) for i, metric in enumerate(self.metrics)]

    def merge_state(self, incoming_state: Any) -> None:
        """Add the state of another metric, bucket by bucket.

        Raises:
            ValueError: it has other buckets.
        """
        if not isinstance(incoming_state, Bucketed) or incoming_state.names != self.names:
            raise ValueError(f"merge_state needs a metric with the buckets {self.names}, got {incoming_state!r}")
        for metric, other in zip(self.metrics, incoming_state.metrics, strict=True):
            metric.merge_state(other)

    def compute(self) -> dict[str, Tensor]:
        """The metric of each bucket by name; NaN for a bucket without tokens."""
        return {name: metric.compute() for name, metric in zip(self.names, self.metrics, strict=True)}

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot the values of all buckets with matplotlib; arguments and result as in torchmetrics.

        Args:
            val: a result of `compute`, or a sequence of them, one per step; None: `compute()`.
            ax: axes to draw on; None: new axes.
        """
        return self._plot(val, ax)

    def reset(self) -> None:
        """Reset all buckets."""
        super().reset()
        for metric in self.metrics:
            metric.reset()


def response_positions(labels: Tensor) -> Tensor:
    """Position of every token in its response: n for the n-th labeled token of its row, from 0.

    Args:
        labels: [..., T], −100 for tokens without a label, whose position has no meaning.
    """
    return (labels != IGNORE_INDEX).cumsum(-1) - 1


class ByPosition(Bucketed):
    """A metric by position in the response: the n-th token with a label of its row, from 0.

    Args:
        metric: any metric whose `update` takes `labels`.
        edges: first position of each bucket: (0, 4, 16) gives "position_0-3", "position_4-15" and "position_16-".
        kwargs: arguments of `torchmetrics.Metric`.

    Raises:
        ValueError: `edges` do not start with 0 or do not increase.

    Examples:
        >>> import torch
        >>> from kd_lightning import NLL, ByPosition
        >>> log_q, labels = torch.tensor([[[0.5, 0.5], [0.25, 0.75], [0.25, 0.75]]]).log(), torch.tensor([[0, 0, 0]])
        >>> ByPosition(NLL(), edges=(0, 1))(log_q, labels=labels)
        {'position_0-0': tensor(0.6931), 'position_1-': tensor(1.3863)}
    """

    def __init__(self, metric: Metric, edges: Sequence[int] = (0, 4, 16, 64), **kwargs: Any) -> None:
        edges = tuple(edges)
        if not edges or edges[0] != 0 or any(b <= a for a, b in pairwise(edges)):
            raise ValueError(f"edges must start with 0 and increase, got {edges}")
        names = [f"position_{a}-{b - 1}" for a, b in pairwise(edges)] + [f"position_{edges[-1]}-"]
        super().__init__(metric, names, **kwargs)
        self.edges = edges

    def bucket(self, labels: Tensor, **kwargs: Tensor) -> Tensor:
        """Bucket of each token's position."""
        position = response_positions(labels)
        inner = torch.tensor(self.edges[1:], device=labels.device, dtype=position.dtype)
        return torch.bucketize(position, inner, right=True)


class BySource(Bucketed):
    """A metric by the origin of the response: "source_dataset", "source_teacher" and "source_student".

    `update` also takes `source`, [B] or [B, T]: an index into `objectives.SOURCES`.

    Args:
        metric: any metric whose `update` takes `labels`.
        kwargs: arguments of `torchmetrics.Metric`.

    Examples:
        >>> import torch
        >>> from kd_lightning import NLL, BySource
        >>> log_q, labels = torch.tensor([[[0.5, 0.5]], [[0.25, 0.75]]]).log(), torch.tensor([[0], [0]])
        >>> BySource(NLL())(log_q, labels=labels, source=torch.tensor([0, 2]))
        {'source_dataset': tensor(0.6931), 'source_teacher': tensor(nan), 'source_student': tensor(1.3863)}
    """

    columns = ("source",)

    def __init__(self, metric: Metric, **kwargs: Any) -> None:
        super().__init__(metric, [f"source_{name}" for name in SOURCES], **kwargs)

    def bucket(self, labels: Tensor, **kwargs: Tensor) -> Tensor:
        """The column `source`.

        Raises:
            ValueError: it is missing, or has values that are not indices into `objectives.SOURCES`.
        """
        if kwargs.get("source") is None:
            raise ValueError(f"update needs source=, [B]: an index into {SOURCES} for every response")
        source = kwargs["source"]
        if source.numel() and not 0 <= int(source.min()) <= int(source.max()) < len(SOURCES):
            raise ValueError(
                f"source must contain indices into {SOURCES}, got {int(source.min())} to {int(source.max())}"
            )
        return source.unsqueeze(-1) if source.ndim < labels.ndim else source
