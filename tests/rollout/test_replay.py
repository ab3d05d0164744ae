"""DistiLLM's schedule against the authors' own decisions, and a memory that is tensors and bounded."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kd_lightning.rollout.replay import AdaptiveReplay, ReplayBuffer
from kd_lightning.schedules import Linear
from locations import GOLDEN
from rollouts import Script, assert_same, author, batch

with np.load(GOLDEN / "official_schedules.npz", allow_pickle=False) as file:
    GOLDEN = {name: torch.from_numpy(file[name]) for name in file.files if name.startswith("sgo_")}
CHOICES = ["data", "write", "replay"]


# -------------------------------------------------------------------------------------------------------------- golden
@pytest.mark.parametrize(("tolerance", "threshold"), [(0.1, 0.0), (0.0, 0.0), (0.1, 0.2)])
def test_the_threshold_is_the_official_one(tolerance: float, threshold: float) -> None:
    key = f"sgo_threshold_eps{tolerance}_init{threshold}"
    source, found = AdaptiveReplay(threshold, tolerance=tolerance), []
    for loss in GOLDEN[f"{key}/eval_losses"].tolist():
        source.validated(loss)
        found.append(float(source.threshold))
    assert found == pytest.approx(GOLDEN[f"{key}/threshold"].tolist(), abs=1e-6)
    assert max(found) > threshold


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("ratio", ["decreasing", "increasing", "constant"])
def test_the_decisions_are_the_official_ones(ratio: str, full: bool) -> None:
    fresh = {"decreasing": None, "increasing": Linear(0.0, 1.0), "constant": 0.5}[ratio]
    source = AdaptiveReplay(0.6, capacity=4, fresh_share=fresh)
    if full:
        source.memory.push(batch(*[([5], [2])] * 4))
    wanted = GOLDEN[f"sgo_decision_{ratio}_full{full}/decision"]
    for column, step in enumerate(GOLDEN["sgo_decision/global_step"].tolist()):
        if not isinstance(source.fresh_share, float):
            source.fresh_share.update(step / 100, {})
        for row, coin in enumerate(GOLDEN["sgo_decision/r"].tolist()):
            assert source.decide(coin) == CHOICES[int(wanted[row, column])], (step, coin)


# -------------------------------------------------------------------------------------------------------------- memory
def rows(*tokens: int, length: int = 1) -> dict[str, Tensor]:
    return batch(*[([5], [token] * length) for token in tokens])


def kept(memory: ReplayBuffer) -> list[int]:
    return memory.rows(torch.arange(memory.filled))["input_ids"][:, 1].tolist()


def test_first_in_first_out() -> None:
    memory = ReplayBuffer(3)
    assert memory.filled == 0
    for token in (10, 11, 12):
        memory.push(rows(token))
    assert kept(memory) == [10, 11, 12]
    memory.push(rows(13, 14))
    assert sorted(kept(memory)) == [12, 13, 14] and memory.filled == 3
    memory.push(rows(20, 21, 22, 23, 24))
    assert sorted(kept(memory)) == [22, 23, 24]


def test_rows_come_back_as_they_were() -> None:
    memory, given = ReplayBuffer(8), batch(([5, 6, 7], [9, 2]), ([8], [9, 9, 2]), ([4], [2]))
    given["advantage"] = torch.randn(given["labels"].shape)
    memory.push(given)
    wide = {**rows(30, length=9), "advantage": torch.ones(1, 10)}
    memory.push(wide)
    assert_same(memory.rows(torch.tensor([0, 1, 2])), given)
    assert_same(memory.rows(torch.tensor([3])), wide)
    short = memory.rows(torch.tensor([2]))
    assert short["labels"].tolist() == [[-100, 2]]  # as wide as the longest that is asked for


def test_rows_without_a_label_are_not_kept() -> None:
    given = rows(10, 11)
    given["labels"][0] = -100
    memory = ReplayBuffer(4)
    memory.push(given)
    assert kept(memory) == [11]
    memory.push({**given, "labels": torch.full_like(given["labels"], -100)})
    assert kept(memory) == [11]


@pytest.mark.parametrize("capacity", [3, None])
def test_its_state_is_plain_tensors(capacity: int | None, tmp_path: Path) -> None:
    memory = ReplayBuffer(capacity)
    memory.push(rows(10, 11, length=3))
    memory.push(rows(12, 13, length=5))
    torch.save(memory.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = ReplayBuffer(capacity)
    other.push(rows(1))
    other.load_state_dict(state)
    for one in (memory, other):
        one.push(rows(14))
    assert_same(other.columns, memory.columns)
    assert kept(memory) == kept(other)
    assert all(len(column) <= (capacity or 5) for column in memory.columns.values())
    memory.clear()
    assert memory.filled == 0 and not memory.columns
    memory.load_state_dict(ReplayBuffer(capacity).state_dict())


# ----------------------------------------------------------------------------------------------------------- the source
def test_what_it_writes_comes_back() -> None:
    source = AdaptiveReplay(1.0, capacity=4, fresh_share=0.0, max_new_tokens=2)
    given = rows(30, 31)
    for step, token in ((0, 10), (1, 11)):  # the memory fills
        found = source(given, author(Script([[token, 2]] * 2), step=step))
        assert found["labels"][:, 1].tolist() == [token, token] and found["source"].tolist() == [2, 2]
    seen = set()
    for step in range(2, 30):  # it is full, and nothing fresh is wanted
        writer = author(Script([[40, 2]] * 2), step=step, batch=step)
        found = source(given, writer)
        assert found["source"].tolist() == [2, 2] and not writer.model.student.asked
        seen |= set(found["labels"][:, 1].tolist())
        assert float(writer.notes["replay_fill"][0]) == 1
    assert seen == {10, 11}


def test_ranks_draw_other_rows_and_keep_the_same() -> None:
    source = AdaptiveReplay(1.0, capacity=6, fresh_share=0.0)
    source.memory.push(rows(10, 11, 12, 13, 14, 15))
    draws = []
    for batch_number in range(6):
        places = [{"step": batch_number, "batch": batch_number, "rank": rank, "ranks": 3} for rank in range(3)]
        parts = [source(rows(1, 2), author(None, **place))["labels"][:, 1].tolist() for place in places]
        assert sorted(chain.from_iterable(parts)) == [10, 11, 12, 13, 14, 15]
        draws.append(parts)
    assert len({str(draw) for draw in draws}) > 1
    few = AdaptiveReplay(1.0, capacity=2, fresh_share=0.0)
    few.memory.push(rows(10, 11))
    assert sorted(few(rows(1, 2, 3, 4), author(None))["labels"][:, 1].tolist()) == [10, 10, 11, 11]


def test_a_step_is_one_decision() -> None:
    source = AdaptiveReplay(1.0, capacity=2, fresh_share=0.0, max_new_tokens=2)
    for micro in range(3):  # full after the first, yet it writes on until the step is done
        writer = author(Script([[10 + micro, 2]] * 2), step=5, micro=micro, batch=micro)
        assert source(rows(30, 31), writer)["labels"][0, 1] == 10 + micro
    writer = author(Script([[40, 2]] * 2), step=6, batch=4)
    assert source(rows(30, 31), writer)["labels"][0, 1] == 12


def test_below_the_threshold_only() -> None:
    given = rows(30)
    assert AdaptiveReplay()(given, author(None)) is given  # nothing is written until validation gets worse
    source = AdaptiveReplay(0.3, max_new_tokens=2)
    written = [source(given, author(Script([[10, 2]]), step=step)) is not given for step in range(1000)]
    assert sum(written) / 1000 == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"capacity": 0}, ["capacity", "at least 1", "0"]),
        ({"threshold": 1.2}, ["threshold", "1.2", "[0, 1]"]),
        ({"rise": 0}, ["rise", "0"]),
        ({"tolerance": -1}, ["tolerance", "-1"]),
        ({"fresh_share": 2.0}, ["fresh_share", "2.0"]),
        ({"top_p": 0.0}, ["top_p"]),
        ({"max_new_tokens": 0}, ["max_new_tokens"]),
    ],
)
def test_arguments(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        AdaptiveReplay(**settings)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
