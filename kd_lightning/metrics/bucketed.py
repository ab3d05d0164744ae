"""Any metric of tokens once more for each part of them: by place in the response, by who wrote it."""

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
    """A metric for each bucket of tokens; every counted token lies in one.

    Args:
        metric: any metric whose `update` takes `labels`, with −100 where a token is not counted.
        names: the buckets'.
        kwargs: arguments of `torchmetrics.Metric`.
    """

    columns: tuple[str, ...] = ()  # what `bucket` takes out of the keywords of `update`

    def __init__(self, metric: Metric, names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = tuple(names)
        self.metrics: Any = nn.ModuleList(deepcopy(metric) for _ in names)

    @abstractmethod
    def bucket(self, labels: Tensor, **kwargs: Tensor) -> Tensor:
        """Index of the bucket of every token, of the shape of `labels` or broadcast to it."""

    def update(self, *args: Tensor, labels: Tensor, **kwargs: Any) -> None:
        """Add tokens.

        Args:
            args: what the metric takes before its labels (`log_p`, `log_q`).
            labels: [B, T], −100 where a token is not counted.
            kwargs: what the metric or `bucket` take besides.

        Raises:
            ValueError: what the metric raises.
        """
        for metric, part in self._parts(labels, kwargs):
            metric.update(*args, labels=part, **metric._filter_kwargs(**kwargs))

    def forward(self, *args: Tensor, labels: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        """Add tokens and give the metric of each bucket of them alone; arguments as in `update`."""
        parts = self._parts(labels, kwargs)
        found = [metric(*args, labels=part, **metric._filter_kwargs(**kwargs)) for metric, part in parts]
        return dict(zip(self.names, found, strict=True))

    def _parts(self, labels: Tensor, kwargs: dict[str, Any]) -> list[tuple[Metric, Tensor]]:
        """Each bucket's metric with the labels that count in it; what `bucket` takes leaves the keywords."""
        own = {name: kwargs.pop(name) for name in self.columns if name in kwargs}
        bucket = self.bucket(labels, **own)
        return [(metric, labels.masked_fill(bucket != i, IGNORE_INDEX)) for i, metric in enumerate(self.metrics)]

    def merge_state(self, incoming_state: Any) -> None:
        """Add what another one has seen, bucket by bucket.

        Raises:
            ValueError: it has other buckets.
        """
        names = getattr(incoming_state, "names", None)
        if not isinstance(incoming_state, Bucketed) or names != self.names:
            raise ValueError(f"merge_state needs a metric of the buckets {self.names}, got {incoming_state!r}")
        for metric, other in zip(self.metrics, incoming_state.metrics, strict=True):
            metric.merge_state(other)

    def compute(self) -> dict[str, Tensor]:
        """The metric of each bucket by name; NaN where a bucket had no token."""
        return {name: metric.compute() for name, metric in zip(self.names, self.metrics, strict=True)}

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw the buckets' values with matplotlib; arguments and result as in torchmetrics.

        Args:
            val: what `compute` gives, or a sequence of it, one a step; None: `compute()`.
            ax: axes to draw on; None: new ones.
        """
        return self._plot(val, ax)

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        for metric in self.metrics:
            metric.reset()


def response_positions(labels: Tensor) -> Tensor:
    """Position of every token in its response: n for the n-th labelled token of its row, from 0.

    Args:
        labels: [..., T], −100 for tokens without a label, whose position has no meaning.
    """
    return (labels != IGNORE_INDEX).cumsum(-1) - 1


class ByPosition(Bucketed):
    """A metric by a token's place in its response: the n-th counted token of its row, from 0.

    Args:
        metric: any metric whose `update` takes `labels`.
        edges: where buckets begin: (0, 4, 16) makes "position_0-3", "position_4-15" and "position_16-".
        kwargs: arguments of `torchmetrics.Metric`.

    Raises:
        ValueError: `edges` do not begin with 0 or do not rise.
    """

    def __init__(self, metric: Metric, edges: Sequence[int] = (0, 4, 16, 64), **kwargs: Any) -> None:
        edges = tuple(edges)
        if not edges or edges[0] != 0 or any(b <= a for a, b in pairwise(edges)):
            raise ValueError(f"edges must begin with 0 and rise, got {edges}")
        names = [f"position_{a}-{b - 1}" for a, b in pairwise(edges)] + [f"position_{edges[-1]}-"]
        super().__init__(metric, names, **kwargs)
        self.edges = edges

    def bucket(self, labels: Tensor, **kwargs: Tensor) -> Tensor:
        """Bucket of the position of every token."""
        position = response_positions(labels)
        inner = torch.tensor(self.edges[1:], device=labels.device, dtype=position.dtype)
        return torch.bucketize(position, inner, right=True)


class BySource(Bucketed):
    """A metric by who wrote the response: "source_dataset", "source_teacher" and "source_student".

    `update` takes `source` besides, [B] or [B, T]: an index into `objectives.SOURCES`.

    Args:
        metric: any metric whose `update` takes `labels`.
        kwargs: arguments of `torchmetrics.Metric`.
    """

    columns = ("source",)

    def __init__(self, metric: Metric, **kwargs: Any) -> None:
        super().__init__(metric, [f"source_{name}" for name in SOURCES], **kwargs)

    def bucket(self, labels: Tensor, **kwargs: Tensor) -> Tensor:
        """The column `source`.

        Raises:
            ValueError: it is missing, or holds what is no index into `objectives.SOURCES`.
        """
        if kwargs.get("source") is None:
            raise ValueError(f"update needs source=, [B]: an index into {SOURCES} for every row")
        source = kwargs["source"]
        if source.numel() and not 0 <= int(source.min()) <= int(source.max()) < len(SOURCES):
            raise ValueError(f"source must hold indices into {SOURCES}, got {int(source.min())} to {int(source.max())}")
        return source.unsqueeze(-1) if source.ndim < labels.ndim else source
