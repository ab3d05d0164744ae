"""Answers of a server to rows: asked for ahead of their use, in the background, and as a teacher's top k."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import Generic, TypeVar

import torch
from torch import Tensor

from kd_lightning.engine.top_k import TopK
from kd_lightning.models.background_calls import BackgroundCalls
from kd_lightning.models.scoring.scorer import PromptScores

Row = TypeVar("Row")
T = TypeVar("T")

AHEAD = 16
"""Number of batches that `read_ahead` reads ahead."""
STALE = 64
"""A row is dropped if so many batches were read since it was asked for, and others wait."""


class AnswersAhead(Generic[Row, T]):
    """Answers by row, of which those of later batches are asked for ahead; each row is asked for once.

    Args:
        ask: gives the answer of a row; it is called in threads.
        requests: largest number of calls at a time.
    """

    def __init__(self, ask: Callable[[Row], T], requests: int) -> None:
        self._ask = ask
        self._requests = requests
        self._calls = BackgroundCalls(requests)
        self._answers: OrderedDict[bytes, tuple[Future[T], int]] = OrderedDict()  # asked for; by key, with the batch
        self._announced: OrderedDict[bytes, Row] = OrderedDict()  # not yet asked for
        self._largest = 1
        self._batch = 0

    def announce(self, rows: Mapping[bytes, Row]) -> None:
        """Ask for the rows of a batch that is read later, as far as the limit of unread answers allows.

        Args:
            rows: by key.
        """
        self._largest = max(self._largest, len(rows))
        for key, row in rows.items():
            if key not in self._answers and key not in self._announced:
                self._announced[key] = row
        while len(self._announced) > STALE * self._largest:
            self._announced.popitem(last=False)
        self._ask_ahead()

    def take(self, rows: Mapping[bytes, Row]) -> dict[bytes, T]:
        """The answers of the rows of a batch; they are not kept.

        Raises:
            BaseException: what `ask` has raised; or an interrupt. All other calls are cancelled.
        """
        self._batch += 1
        for key, row in rows.items():
            self._announced.pop(key, None)
            if key not in self._answers:
                self._answers[key] = self._calls.submit(lambda row=row: self._ask(row)), self._batch  # type: ignore[misc]
        try:
            found = {key: self._answers[key][0].result() for key in rows}
        except BaseException:
            self._calls.cancel()
            self._announced.clear()
            raise
        for key in rows:
            del self._answers[key]
        self._ask_ahead()
        return found

    def _ask_ahead(self) -> None:
        """Ask for announced rows while there are few unread answers; unread answers that are too old are dropped."""
        limit = max(4 * self._requests, 2 * self._largest)
        while self._announced:
            if len(self._answers) >= limit:
                oldest, (future, batch) = next(iter(self._answers.items()))
                if self._batch - batch <= STALE:
                    return
                future.cancel()
                del self._answers[oldest]
            key, row = self._announced.popitem(last=False)
            self._answers[key] = self._calls.submit(lambda row=row: self._ask(row)), self._batch  # type: ignore[misc]


def read_ahead(batches: Iterable[T], prefetch: Callable[[T], None]) -> Iterator[T]:
    """The batches; each is given to `prefetch` when the batch `AHEAD` before it is read."""
    window: deque[T] = deque()
    for batch in batches:
        prefetch(batch)
        window.append(batch)
        if len(window) > AHEAD:
            yield window.popleft()
    yield from window


def as_top_k(scores: PromptScores, labels: Tensor, k: int, vocabulary: int) -> TopK:
    """The k most probable tokens of each entry; the label replaces the last one where it is not among them.

    Tokens outside of the vocabulary are removed and the rest is normalized again. Missing tokens of an entry that has
    fewer than k are filled up with tokens that share its tail.

    Args:
        scores: N entries.
        labels: the label of each, [N]; it is named.
        k: number of tokens.
        vocabulary: number of tokens that are known to the student.
    """
    width, ids = min(k, vocabulary), scores.ids
    inside = (ids >= 0) & (ids < vocabulary)
    outside = scores.log_probs.exp().masked_fill(inside | (ids < 0), 0.0).sum(1, keepdim=True)
    values = scores.log_probs - torch.log1p(-outside.clamp_max(1 - 1e-6))
    values = values.masked_fill(~inside, -math.inf)
    order = ids.masked_fill(~inside, vocabulary).argsort(stable=True, dim=1)  # equal ones in the order of their ids
    order = order.gather(1, values.gather(1, order).argsort(stable=True, dim=1, descending=True))
    if order.shape[1] < width:
        order = torch.nn.functional.pad(order, (0, width - order.shape[1]), value=-1)
    best = order[:, :width]
    known = (best >= 0) & inside.gather(1, best.clamp_min(0))
    best_ids = torch.where(known, ids.gather(1, best.clamp_min(0)), -1)
    log_probs = torch.where(known, values.gather(1, best.clamp_min(0)), -math.inf)
    absent = (best_ids != labels.unsqueeze(1)).all(1)
    own = values[ids == labels.unsqueeze(1)]
    best_ids[:, -1] = torch.where(absent, labels, best_ids[:, -1])
    log_probs[:, -1] = torch.where(absent, own, log_probs[:, -1])
    rest = (1 - log_probs.exp().sum(1)).clamp_min(0.0)
    tail = rest.clone()
    for row in (best_ids < 0).any(1).nonzero().flatten().tolist():
        missing = best_ids[row] < 0
        share = float(rest[row]) / (vocabulary - int((~missing).sum()))
        unnamed = torch.ones(vocabulary, dtype=torch.bool).index_fill_(0, best_ids[row][~missing], False)
        best_ids[row, missing] = unnamed.nonzero().flatten()[: int(missing.sum())]
        log_probs[row, missing] = math.log(share) if share else -math.inf
        tail[row] -= share * int(missing.sum())
    log_tail = tail.clamp_min(0.0).log() if vocabulary > width else torch.full_like(tail, -math.inf)
    return TopK(best_ids, log_probs.float(), log_tail.float(), vocabulary)
