"""Answers that are asked for ahead, and how they become a top k."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from kd_lightning.engine.top_k import top_k
from kd_lightning.models.scoring.scorer import PromptScores
from kd_lightning.teachers import server_answers
from kd_lightning.teachers.server_answers import AnswersAhead, as_top_k, read_ahead


def scores_of(entries: list[dict[int, float]]) -> PromptScores:
    width = max(map(len, entries))
    ids = torch.tensor([[*entry, *[-1] * (width - len(entry))] for entry in entries])
    values = [[*entry.values(), *[-torch.inf] * (width - len(entry))] for entry in entries]
    return PromptScores(ids, torch.tensor(values, dtype=torch.float64))


def test_entries_become_the_top_k() -> None:
    entries = [{0: -1.0, 5: -0.7, 3: -9.0}, {1: -0.1}, {2: -0.5, 9: -2.0}, {7: -2.0, 4: -1.0, 6: -1.0, 5: -1.5}]
    found = as_top_k(scores_of(entries), torch.tensor([3, 1, 2, 6]), k=2, vocabulary=8)
    assert found.ids[0].tolist() == [5, 3]  # the label replaces the last
    torch.testing.assert_close(found.log_probs[0], torch.tensor([-0.7, -9.0]))
    assert found.ids[1].tolist() == [1, 0]  # filled up with another token, which shares the rest
    torch.testing.assert_close(found.log_probs[1, 1].exp(), torch.tensor((1 - 0.904837) / 7), atol=1e-6, rtol=0)
    assert found.ids[3].tolist() == [4, 6]  # of equal ones, the smaller id is first
    total = found.log_probs.exp().sum(-1) + found.log_tail.exp()
    torch.testing.assert_close(total, torch.ones(4))
    torch.testing.assert_close(found.log_probs[2, 0].exp(), torch.tensor(0.6065 / (1 - 0.1353)), atol=1e-3, rtol=0)
    everything = {n: float(v) for n, v in enumerate(torch.randn(8).log_softmax(0))}
    whole = as_top_k(scores_of([everything]), torch.tensor([0]), k=8, vocabulary=8)
    assert whole.log_tail.item() == -torch.inf
    best = {n: v for n, v in enumerate(torch.randn(8, generator=torch.Generator().manual_seed(0)).log_softmax(0))}
    mine = as_top_k(scores_of([best]), torch.tensor([3]), k=5, vocabulary=8)  # type: ignore[list-item]
    theirs = top_k(torch.tensor([list(best.values())]), torch.tensor([3]), 5)
    assert mine.ids.tolist() == theirs.ids.tolist()
    torch.testing.assert_close(mine.log_probs, theirs.log_probs)
    torch.testing.assert_close(mine.log_tail, theirs.log_tail)


class Asked:
    """Answers a row with itself; counts, and waits for permission if there is a gate."""

    def __init__(self, gate: threading.Event | None = None) -> None:
        self.rows: list[int] = []
        self.gate = gate

    def __call__(self, row: int) -> int:
        self.rows.append(row)
        if self.gate is not None:
            self.gate.wait(20)
        if row < 0:
            raise ValueError(f"no answer to {row}")
        return row

    def wait_for(self, count: int) -> None:
        deadline = time.monotonic() + 20
        while len(self.rows) < count:
            assert time.monotonic() < deadline
            time.sleep(0.005)


def batch(*rows: int) -> dict[bytes, int]:
    return {str(row).encode(): row for row in rows}


def test_rows_ahead_are_asked_once_and_in_order() -> None:
    ask = Asked()
    answers = AnswersAhead(ask, 1)
    answers.announce(batch(1, 2))
    ask.wait_for(2)
    answers.announce(batch(2, 3))
    assert answers.take(batch(1, 2)) == batch(1, 2)
    assert answers.take(batch(2, 3)) == batch(2, 3)  # answers are not kept
    assert sorted(ask.rows) == [1, 2, 2, 3]


def test_unread_answers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Asked()
    answers = AnswersAhead(ask, 2)
    answers.announce(batch(*range(100)))
    answers.announce(batch(*range(100, 300)))  # a large batch: two of its size may wait
    ask.wait_for(300)
    answers.announce(batch(*range(300, 900)))
    ask.wait_for(900)
    answers.announce(batch(*range(900, 2000)))
    time.sleep(0.05)
    assert len(ask.rows) <= 2 * 1100
    assert answers.take(batch(5)) == batch(5)
    monkeypatch.setattr(server_answers, "STALE", 3)
    small = Asked()
    answers = AnswersAhead(small, 1)
    for number in range(1, 12):  # announced and never read
        answers.announce(batch(number))
    assert len(answers._answers) == 4
    for _ in range(5):
        answers.take({})
    answers.announce(batch(50))
    assert b"50" in answers._announced or b"50" in answers._answers
    assert answers.take(batch(50)) == batch(50)


def test_an_error_is_raised_where_the_row_is_read() -> None:
    ask = Asked()
    answers = AnswersAhead(ask, 2)
    answers.announce(batch(-1))
    assert answers.take(batch(1)) == batch(1)
    with pytest.raises(ValueError, match="no answer to -1"):
        answers.take(batch(-1, 2))


def test_no_more_calls_at_a_time_than_allowed() -> None:
    gate = threading.Event()
    ask = Asked(gate)
    answers = AnswersAhead(ask, 3)
    answers.announce(batch(*range(9)))
    ask.wait_for(3)
    time.sleep(0.05)
    assert len(ask.rows) == 3
    gate.set()
    assert answers.take(batch(*range(9))) == batch(*range(9))


def test_batches_are_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_answers, "AHEAD", 2)
    seen: list[int] = []
    read = read_ahead(range(5), seen.append)
    assert next(read) == 0
    assert seen == [0, 1, 2]
    assert list(read) == [1, 2, 3, 4]
    assert seen == list(range(5))
