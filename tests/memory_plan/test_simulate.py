"""A plan is what real ranks hold, and at its peak what they are seen to hold; what cannot be planned says so."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import processes
from architectures import tiny
from kd_lightning import DistillationModule
from kd_lightning.cli.plan import size
from kd_lightning.cli.program import main as program
from kd_lightning.distributed.dtensor import local_shard
from kd_lightning.strategies import FSDP2Strategy
from plans import Watch, moments, planned, shapes
from sharded_fits import joined

ROWS, LENGTH, VOCABULARY = 4, 64, 2048
WIDE: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
TWO: dict[str, dict[str, Any]] = {
    "full": {},
    "spared": {"activation_checkpointing": True, "precision": "bf16-mixed", "accumulate_grad_batches": 2},
    "copies": {"strategy": "ddp"},
}
FOUR: dict[str, dict[str, Any]] = {"hybrid": {"shard_size": 2}, "head": {"tensor_parallel_size": 2}}
SIZES = ("shard_size", "tensor_parallel_size", "activation_checkpointing")


def models(folder: Path) -> tuple[str, str]:
    """A student, and a teacher twice as wide."""
    torch.manual_seed(0)
    tiny("llama", **WIDE, tie_word_embeddings=True).save_pretrained(folder / "student")
    tiny("llama", **WIDE | {"hidden_size": 128}).save_pretrained(folder / "teacher")
    return str(folder / "student"), str(folder / "teacher")


def held(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the numbers on this rank."""
    return sum(local_shard(tensor).numel() * tensor.element_size() for tensor in tensors if tensor is not None)


class KeepsGradients(DistillationModule):
    """Counts them where they are still there."""

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.gradients = held(parameter.grad for parameter in self.model.parameters())


def seen(rank: int, ranks: int, setups: dict[str, dict[str, Any]], student: str, teacher: str) -> dict[str, Any]:
    """What one of real ranks holds, and its peak."""
    joined(rank, ranks)
    found = {}
    for name, setup in setups.items():
        sizes = {key: value for key, value in setup.items() if key in SIZES}
        settings = {"strategy": FSDP2Strategy(**sizes)} | {k: value for k, value in setup.items() if k not in SIZES}
        module = KeepsGradients(student, teacher, reduction="sequence_mean")
        window = settings.get("accumulate_grad_batches", 1)
        watch = Watch(window, [VOCABULARY])
        trainer = L.Trainer(
            accelerator="cpu",
            devices=ranks,
            max_epochs=1,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            callbacks=[watch],
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            **settings,
        )
        ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        trainer.fit(module, DataLoader([batch] * (2 * window), batch_size=None))
        found[name] = {
            "student": [held(module.student.parameters()), module.gradients, held(moments(trainer))],
            "teacher": held(module.teacher.model.parameters()),
            "peak": watch.tracker.peak,
            "tiles": watch.tracker.most["tiles"],
            "collectives": {
                key: {"count": count, "bytes": watch.tracker.collective_bytes[key]}
                for key, count in sorted(watch.tracker.collectives.items())
                if key != "broadcast"  # Lightning's, of a name
            },
        }
    return found


def words_of(setup: dict[str, Any]) -> list[str]:
    settings = {"strategy": "FSDP2Strategy" if setup.keys() & set(SIZES) else "fsdp2"} | setup
    words = []
    for name, value in settings.items():
        words += [f"--trainer.strategy.{name}" if name in SIZES else f"--trainer.{name}", str(value)]
    return words


def compare(folder: Path, ranks: int, setups: dict[str, dict[str, Any]]) -> None:
    """Plan each of the set-ups from configurations alone, and let real ranks do it."""
    student, teacher = models(folder / "whole")
    paths = {"student": student, "teacher": teacher}
    configs = {role: json.loads((Path(path) / "config.json").read_text()) for role, path in paths.items()}
    words = [*shapes(folder / "shapes", **configs), "--data.batch_size", str(ROWS), "--data.max_length", str(LENGTH)]
    words += ["--world_size", str(ranks)]
    real = processes.run(seen, ranks, setups, student, teacher, world_size=ranks)
    for name, setup in setups.items():
        plan = planned(folder, *words, *words_of(setup))
        first = real[0][name]
        assert [plan["student"][key] for key in ("parameters", "gradients", "optimizer")] == first["student"]
        assert plan["teacher"]["parameters"] == first["teacher"]
        assert plan["teacher"]["gradients"] == plan["teacher"]["optimizer"] == 0
        assert plan["peak"] == pytest.approx(first["peak"], rel=0.1)
        assert plan["tiles"] == first["tiles"]
        assert plan["collectives"] == first["collectives"]
        assert all(max(found[name]["student"]) <= max(first["student"]) for found in real)


def test_two_ranks_hold_what_was_planned(tmp_path: Path) -> None:
    compare(tmp_path, 2, TWO)


@pytest.mark.slow
def test_four_ranks_hold_what_was_planned(tmp_path: Path) -> None:
    compare(tmp_path, 4, FOUR)


# ---------------------------------------------------------------------------------------------------- without any ranks
def test_sums_over_ranks_are_the_whole(tmp_path: Path) -> None:
    words = ["--data.batch_size", "2", "--data.max_length", "16", "--model.optimizer", "torch.optim.SGD"]
    one, four = (
        planned(tmp_path, *words, "--world_size", str(n), *more)
        for n, more in ((1, []), (4, ["--trainer.strategy", "fsdp2"]))
    )
    for role in ("student", "teacher"):
        assert 4 * four[role]["parameters"] == one[role]["parameters"]
    assert one["student"]["gradients"] == one["student"]["parameters"]
    assert one["student"]["optimizer"] == 0
    assert one["collectives"] == {}
    assert four["collectives"]["reduce_scatter"]["bytes"] == one["student"]["gradients"]


def test_copies_on_every_rank(tmp_path: Path) -> None:
    words = ["--data.batch_size", "2", "--data.max_length", "16", "--world_size"]
    one, two = planned(tmp_path, *words, "1"), planned(tmp_path, *words, "2", "--trainer.strategy", "ddp")
    assert two["student"] == one["student"]
    assert two["teacher"] == one["teacher"]
    assert two["buckets"] == two["student"]["gradients"]
    assert two["peak"] == one["peak"] + two["buckets"]


def test_adapters_alone_learn(tmp_path: Path) -> None:
    words = ["--data.batch_size", "2", "--data.max_length", "16", "--world_size", "1"]
    whole = planned(tmp_path, *words)
    some = planned(tmp_path, *words, "--model.lora.r", "2", "--model.teacher", "AdapterOffTeacher")
    adapters = some["student"]["parameters"] - whole["student"]["parameters"]
    assert some["student"]["gradients"] == adapters > 0
    assert some["teacher"]["parameters"] == 0


def test_what_is_offloaded_is_not_on_the_card(tmp_path: Path) -> None:
    words = ["--data.batch_size", "2", "--data.max_length", "16", "--world_size", "1", "--trainer.accelerator", "auto"]
    there = planned(tmp_path, *words)
    away = planned(tmp_path, *words, "--model.teacher", "OffloadedTeacher", "--model.teacher.path", "asset:teacher")
    assert away["teacher"] == there["teacher"]
    assert 0 < away["host"] < away["teacher"]["parameters"]
    assert away["peak"] < there["peak"]


@pytest.mark.parametrize("config", ["sft", "distillm2", "minillm"])
def test_other_losses(config: str, tmp_path: Path) -> None:
    words = ["--config", config, "--data.batch_size", "2", "--data.max_length", "16", "--world_size", "1"]
    plan = planned(tmp_path, *words)
    assert plan["batch"] == [4 if config == "distillm2" else 2, 16]
    assert plan["tiles"] > 0


def test_it_says_whether_it_fits_and_what_to_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data.batch_size", "2", "--data.max_length", "16", "--world_size", "2", "--trainer.strategy", "fsdp2"]
    assert planned(tmp_path, *words, "--memory", "80GiB")["fits"] is True
    assert "fits: " in capsys.readouterr().out
    plan = planned(tmp_path, *words, "--memory", "1MB")
    assert (plan["fits"], plan["memory"]) == (False, 1_000_000)
    out = capsys.readouterr().out
    assert "does not fit: " in out
    assert "--trainer.strategy.activation_checkpointing true" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--world_size", "0"], r"--world_size must be at least 1, got 0"),
        (["--world_size", "many"], r"--world_size: invalid int value: 'many'"),
        ([], r"required: --world_size"),
        (["--world_size", "1", "--memory", "8x"], r"--memory must be a number and a unit, such as 80GiB .* got '8x'"),
        (["--world_size", "1", "--memory", "0GiB"], r"--memory must be .* got '0GiB'"),
        (["--world_size", "4", "--trainer.strategy.shard_size", "3"], r"strategy\.shard_size must divide .* 4, got 3"),
        (
            ["--world_size", "2", "--model.teacher", "EMPTY"],
            r"teacher '.*' is not the folder of .*: it has no config\.json",
        ),
        (
            ["--world_size", "2", "--model.student", "EMPTY"],
            r"student '.*' is not the folder of .*: it has no config\.json",
        ),
        (["--world_size", "2", "--model.student", "BROKEN"], r"student '.*': cannot read config\.json"),
        (
            ["--world_size", "1", "--model.teacher", "CachedTeacher", "--model.teacher.path", "X"],
            r"CachedTeacher has no",
        ),
        (["--world_size", "2", "--trainer.strategy", "fsdp"], r"trainer\.strategy fsdp .* use fsdp2"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "BROKEN").mkdir()
    (tmp_path / "BROKEN" / "config.json").write_text("{")
    (tmp_path / "EMPTY").mkdir()
    words = [str(tmp_path / word) if word in ("EMPTY", "BROKEN") else word for word in words]
    if "--trainer.strategy.shard_size" in words:
        words = ["--trainer.strategy", "FSDP2Strategy", *words]
    assert program(["plan", "--config", "quickstart", "--trainer.default_root_dir", str(tmp_path), *words]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert re.search(message, line)


@pytest.mark.parametrize(
    ("text", "expected"), [("80GiB", 80 << 30), ("24 GB", 24 * 10**9), ("1.5TiB", 3 << 39), ("7", 7), ("512B", 512)]
)
def test_sizes(text: str, expected: int) -> None:
    assert size(text) == expected
