"""The same step everywhere: whatever holds the models and however the rows are split, one device's numbers come out."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import processes
from architectures import VOCABULARY, tiny
from kd_lightning import TAID
from kd_lightning.sharding import whole_state
from kd_lightning.strategies import FSDP2Strategy
from test_module import SGD, Batch, Run, fit, rows, split

FP32 = 2e-5  # of any weight
BF16 = 2  # times the error that one device makes in bf16-mixed, in the norm of the whole change


@dataclass(frozen=True)
class Placement:
    """Who holds what, on how many ranks."""

    name: str
    ranks: int
    sizes: dict[str, int] | None = None  # of FSDP2; None: DDP

    @property
    def readers(self) -> int:
        """How many ranks read rows of their own."""
        return self.ranks // (self.sizes or {}).get("tensor_parallel_size", 1)


@dataclass(frozen=True)
class Setting:
    """What a step is made of: sums of how many micro-batches, in which precision, how reduced."""

    accumulation: str
    precision: str
    reduction: str


PLACEMENTS = [
    Placement("ddp", 2),
    Placement("fsdp2", 2, {}),
    Placement("head over 2", 2, {"tensor_parallel_size": 2}),
    Placement("fsdp2 over 4", 4, {}),
    Placement("hybrid 2 x 2", 4, {"shard_size": 2}),
    Placement("fsdp2 2 x head 2", 4, {"tensor_parallel_size": 2}),
    Placement("hybrid 2 x 1 x head 2", 4, {"shard_size": 1, "tensor_parallel_size": 2}),
]
SETTINGS = [
    Setting(*values)
    for values in itertools.product(
        ("1", "2", "2, the last one 1"), ("32-true", "bf16-mixed"), ("token_mean", "sequence_mean")
    )
]
WINDOWS = {"1": [[0], [1]], "2": [[0, 1]], "2, the last one 1": [[0, 1], [2]]}  # the micro-batches of every step
SHARES = {1: [6], 2: [5, 1], 4: [2, 2, 1, 1]}  # rows of each reader


def micro_batches() -> list[Batch]:
    """Three of six rows, 1 to 9 tokens each; of the second, the last row and so the last reader has none."""
    batches = split(rows(18, VOCABULARY), 6, 6, 6)
    batches[1]["labels"][-1] = -100
    return batches


def train(setting: Setting, batches: list[Batch], **kwargs: Any) -> dict[str, Any]:
    """What a run leaves: the student, the logged loss, the schedule."""
    torch.manual_seed(0)
    student, teacher = tiny("llama", tie_word_embeddings=True), tiny("llama", num_hidden_layers=3, hidden_size=48)
    module = Run(student, teacher, TAID(), ce_weight=0.5, optimizer=SGD, reduction=setting.reduction)
    start = {name: tensor.detach().clone() for name, tensor in student.state_dict().items()}
    fit(module, batches, precision=setting.precision, **kwargs)
    (schedule,) = module.schedules().values()
    state = whole_state(student)
    return {
        "student": state,
        "change": torch.cat([(state[name] - start[name]).flatten() for name in start]),
        "loss": module.logged[-1]["train/loss"],
        "schedule": float(schedule()),
    }


@functools.cache
def on_one_device(setting: Setting) -> dict[str, Any]:
    batches = micro_batches()
    steps = [[batches[i] for i in window] for window in WINDOWS[setting.accumulation]]
    return train(setting, [{name: torch.cat([b[name] for b in step]) for name in step[0]} for step in steps])


def on_a_rank(rank: int, ranks: int) -> dict[str, Any]:
    """Every combination on so many ranks."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    os.environ.update(GROUP_RANK="0", TORCHELASTIC_RUN_ID="test", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    found = {}
    for placement, setting in itertools.product(PLACEMENTS, SETTINGS):
        if placement.ranks != ranks:
            continue
        number = rank * placement.readers // ranks
        mine = [split(batch, *SHARES[placement.readers])[number] for batch in micro_batches()]
        windows = WINDOWS[setting.accumulation]
        found[str((placement, setting))] = train(
            setting,
            [mine[i] for window in windows for i in window],
            accumulate_grad_batches=len(windows[0]),
            devices=ranks,
            strategy="ddp" if placement.sizes is None else FSDP2Strategy(**placement.sizes),
        )
    return found


@functools.cache
def on_ranks(ranks: int) -> list[dict[str, Any]]:
    return processes.run(on_a_rank, ranks, world_size=ranks)


def error(found: dict[str, Any], setting: Setting) -> float:
    """Relative error of a run's change, measured by one device in fp32."""
    exact = on_one_device(dataclasses.replace(setting, precision="32-true"))["change"]
    return float((found["change"] - exact).norm() / exact.norm())


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: f"{s.accumulation}-{s.precision}-{s.reduction}")
@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda p: p.name)
def test_the_same_step(placement: Placement, setting: Setting) -> None:
    expected = on_one_device(setting)
    assert float(expected["change"].abs().max()) > 0.05
    exact = setting.precision == "32-true"
    for ranks in on_ranks(placement.ranks):
        found = ranks[str((placement, setting))]
        if exact:
            assert difference(found["student"], expected["student"]) <= FP32
        else:
            assert error(found, setting) <= BF16 * error(expected, setting)
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5 if exact else 0.01)
        assert found["schedule"] == pytest.approx(expected["schedule"], abs=1e-6 if exact else 1e-4)


def table() -> None:
    """Print, for every placement and precision, the largest difference of a weight from one device and the error."""
    for placement, precision in itertools.product(PLACEMENTS, ("32-true", "bf16-mixed")):
        worst, errors, own = 0.0, 0.0, 0.0
        for setting in SETTINGS:
            if setting.precision == precision:
                own = max(own, error(on_one_device(setting), setting))
                for ranks in on_ranks(placement.ranks):
                    found = ranks[str((placement, setting))]
                    worst = max(worst, difference(found["student"], on_one_device(setting)["student"]))
                    errors = max(errors, error(found, setting))
        print(f"| {placement.name} | {placement.ranks} | {precision} | {worst:.1e} | {errors:.1e} | {own:.1e} |")


if __name__ == "__main__":
    sys.exit(table())
