"""A step gives the numbers of one device, however models are sharded and rows are split."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import processes
from adapters import stirred
from architectures import VOCABULARY, tiny
from kd_lightning import TAID
from kd_lightning.distributed.dtensor import full_state_dict
from kd_lightning.engine.label_mask import next_token_mask
from kd_lightning.models.lora import LoRA, add_adapters
from kd_lightning.strategies import FSDP2Strategy
from kd_lightning.teachers.adapter_off import AdapterOffTeacher
from kd_lightning.teachers.cache_format import (
    CacheManifest,
    CacheReader,
    CacheWriter,
    row_keys,
    updated,
    write_head,
)
from kd_lightning.teachers.cached import CachedTeacher
from kd_lightning.teachers.hf import HFTeacher
from kd_lightning.teachers.offloaded import OffloadedTeacher
from tiny_fits import SGD, Batch, Run, fit, rows, split

FP32 = 2e-5  # of any weight
BF16 = 2  # times the error of one device in bf16-mixed, in the norm of the change of all weights


@dataclass(frozen=True)
class Placement:
    """How models are sharded, and on how many ranks."""

    name: str
    ranks: int
    sizes: dict[str, int] | None = None  # of FSDP2; None: DDP
    models: str = "plain"  # one of MODELS

    @property
    def readers(self) -> int:
        """How many ranks read rows of their own."""
        return self.ranks // (self.sizes or {}).get("tensor_parallel_size", 1)


@dataclass(frozen=True)
class Setting:
    """Settings of a step: micro-batches, precision, reduction."""

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
    *(
        Placement(f"{models}, {name}", ranks, sizes, models)
        for models in ("lora", "adapter off", "offloaded", "cached")
        for name, ranks, sizes in (("ddp", 2, None), ("fsdp2", 2, {}), ("hybrid 2 x 2", 4, {"shard_size": 2}))
    ),
    Placement("cached, head over 2", 2, {"tensor_parallel_size": 2}, "cached"),
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
    """Three of six rows, 1 to 9 tokens each; the last row of the second, and so the last reader, has none."""
    batches = split(rows(18, VOCABULARY), 6, 6, 6)
    batches[1]["labels"][-1] = -100
    return batches


def adapted(student: nn.Module) -> nn.Module:
    """The student with adapters that are not zero."""
    return stirred(add_adapters(student, LoRA(r=3)))


def cached(teacher: nn.Module) -> CachedTeacher:
    """A teacher whose outputs for every row are cached."""
    folder, live = Path(tempfile.mkdtemp()), HFTeacher(teacher)
    live.load()
    assert live.head is not None
    whose = CacheManifest("tiny", live.fingerprint(), "-", "-", 0, "hidden", "float32", None, live.head.vocabulary)
    write_head(folder, live.head.weight, live.head.bias)
    writer = CacheWriter(folder, whose.digest)
    for batch in micro_batches():
        counted = next_token_mask(batch["labels"])
        some = counted.any(1)
        hidden = live.hidden(batch)[:, :-1][counted]
        writer.add(row_keys(batch)[some], counted.sum(1)[some], {"hidden": hidden})
    writer.flush()
    updated(whose, {}, CacheReader(folder, whose.digest).tokens).write(folder)
    return CachedTeacher(str(folder))


MODELS: dict[str, Callable[[nn.Module, nn.Module], tuple[nn.Module, Any]]] = {
    "plain": lambda student, teacher: (student, teacher),
    "lora": lambda student, teacher: (adapted(student), teacher),
    "adapter off": lambda student, teacher: (adapted(student), AdapterOffTeacher()),
    "offloaded": lambda student, teacher: (student, OffloadedTeacher(teacher)),
    "cached": lambda student, teacher: (student, cached(teacher)),
}


def train(setting: Setting, batches: list[Batch], models: str = "plain", **kwargs: Any) -> dict[str, Any]:
    """Results of a run: the student, the logged loss, the schedule."""
    torch.manual_seed(0)
    teacher = tiny("llama", num_hidden_layers=3, hidden_size=48)
    student, teacher = MODELS[models](tiny("llama", tie_word_embeddings=True), teacher)
    module = Run(student, teacher, TAID(), ce_weight=0.5, optimizer=SGD, reduction=setting.reduction)
    start = {name: tensor.detach().clone() for name, tensor in student.state_dict().items()}
    fit(module, batches, precision=setting.precision, **kwargs)
    (schedule,) = module.schedules().values()
    state = full_state_dict(student)
    return {
        "student": state,
        "change": torch.cat([(state[name] - start[name]).flatten() for name in start]),
        "loss": module.logged[-1]["train/loss"],
        "schedule": float(schedule()),
    }


@functools.cache
def on_one_device(setting: Setting, models: str) -> dict[str, Any]:
    batches = micro_batches()
    steps = [[batches[i] for i in window] for window in WINDOWS[setting.accumulation]]
    complete = [{name: torch.cat([b[name] for b in step]) for name in step[0]} for step in steps]
    return train(setting, complete, models)


def on_a_rank(rank: int, ranks: int) -> dict[str, Any]:
    """Every combination on this number of ranks."""
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
            placement.models,
            accumulate_grad_batches=len(windows[0]),
            devices=ranks,
            strategy="ddp" if placement.sizes is None else FSDP2Strategy(**placement.sizes),
        )
    return found


@functools.cache
def on_ranks(ranks: int) -> list[dict[str, Any]]:
    return processes.run(on_a_rank, ranks, world_size=ranks)


def error(found: dict[str, Any], setting: Setting, models: str) -> float:
    """Relative error of a run's change, measured by one device in fp32."""
    exact = on_one_device(dataclasses.replace(setting, precision="32-true"), models)["change"]
    return float((found["change"] - exact).norm() / exact.norm())


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: f"{s.accumulation}-{s.precision}-{s.reduction}")
@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda p: p.name)
def test_the_same_step(placement: Placement, setting: Setting) -> None:
    expected = on_one_device(setting, placement.models)
    assert float(expected["change"].abs().max()) > 1000 * FP32  # adapters move 0.05 in a run of one step
    exact = setting.precision == "32-true"
    for ranks in on_ranks(placement.ranks):
        found = ranks[str((placement, setting))]
        if exact:
            assert difference(found["student"], expected["student"]) <= FP32
        else:
            models = placement.models
            assert error(found, setting, models) <= BF16 * error(expected, setting, models)
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5 if exact else 0.01)
        assert found["schedule"] == pytest.approx(expected["schedule"], abs=1e-6 if exact else 1e-4)


def table() -> None:
    """Print, for every placement and precision, the largest difference of a weight from one device and the error."""
    for placement, precision in itertools.product(PLACEMENTS, ("32-true", "bf16-mixed")):
        worst, errors, own = 0.0, 0.0, 0.0
        for setting in SETTINGS:
            if setting.precision == precision:
                expected, models = on_one_device(setting, placement.models), placement.models
                own = max(own, error(expected, setting, models))
                for ranks in on_ranks(placement.ranks):
                    found = ranks[str((placement, setting))]
                    worst = max(worst, difference(found["student"], expected["student"]))
                    errors = max(errors, error(found, setting, models))
        print(f"| {placement.name} | {placement.ranks} | {precision} | {worst:.1e} | {errors:.1e} | {own:.1e} |")


if __name__ == "__main__":
    sys.exit(table())
