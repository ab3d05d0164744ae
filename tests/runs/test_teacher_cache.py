"""A run that writes down its teacher by itself: asked once, then read, and the run is the same."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import processes
import runs
from kd_lightning import DistillationModule
from kd_lightning.cli.program import main
from kd_lightning.data import InstructionDataModule
from kd_lightning.teachers.cache_format import CacheManifest, CacheReader
from kd_lightning.teachers.cached import CachedTeacher
from kd_lightning.teachers.hf import HFTeacher
from refusals import refused
from tiny_fits import assert_same_student, rows, split, weights

FP32 = ["--model.teacher_kwargs", '{"dtype": "float32"}']
SGD = functools.partial(torch.optim.SGD, lr=0.5)


def words(root: Path, data: Path, *extra: str, cached: bool = True, steps: int = 8) -> list[str]:
    few = ["--data.train", str(data), "--data.val", str(data), "--data.test", str(data), "--data.batch_size", "4"]
    return [*runs.little(root, steps=steps), *few, *FP32, "--model.teacher_cache", str(cached).lower(), *extra]


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """When a teacher was asked: −1 before the cache is begun, 0 while it is written, 2 after that."""
    asked: list[int] = []
    hidden = HFTeacher.hidden

    def counting(self: HFTeacher, batch: dict[str, Tensor]) -> Tensor:
        path = tmp_path / "root" / "teacher_cache"
        asked.append(2 * (CacheManifest.read(path).tokens is not None) if path.exists() else -1)
        return hidden(self, batch)

    monkeypatch.setattr(HFTeacher, "hidden", counting)
    return asked


def test_the_teacher_is_asked_once_about_every_row(tmp_path: Path, forwards: list[int]) -> None:
    data = runs.little_data(tmp_path, rows=20)
    assert main(words(tmp_path / "live", data, cached=False)) == 0
    assert len(forwards) > 8
    forwards.clear()
    assert main(words(tmp_path / "root", data)) == 0  # a pass and a half, with validation
    assert forwards.count(0) == 5 and 2 not in forwards
    kept = CacheManifest.read(tmp_path / "root" / "teacher_cache")
    assert list(kept.data) == ["train", "val"]
    assert kept.data["train"] == kept.data["val"]
    assert kept.dtype == "float32"
    live, away = runs.student(tmp_path / "live"), runs.student(tmp_path / "root")
    for name in live:
        torch.testing.assert_close(away[name], live[name], atol=1e-4, rtol=0, msg=name)


def test_the_closing_table_is_the_live_ones(tmp_path: Path, forwards: list[int]) -> None:
    data, found = runs.little_data(tmp_path, rows=12), {}
    for name in ("live", "root"):
        few = ["--trainer.limit_test_batches", "2", "--results.max_new_tokens", "3"]
        assert main(words(tmp_path / name, data, *few, cached=name == "root", steps=2)) == 0
        found[name] = runs.results(tmp_path / name)
    assert list(CacheManifest.read(tmp_path / "root" / "teacher_cache").data) == ["train", "val", "test"]
    for row in ("teacher", "student_before", "student_after"):
        for key, value in found["live"][row].items():
            assert found["root"][row][key] == pytest.approx(value, abs=1e-4)


def test_resumed_equals_untouched_and_asks_nobody(tmp_path: Path, forwards: list[int]) -> None:
    data = runs.little_data(tmp_path, rows=20)
    often = ["--checkpoint.every_n_train_steps", "3"]
    assert main(words(tmp_path / "whole", data, *often)) == 0
    cut = words(tmp_path / "cut", data, *often)
    assert main([*cut, "--checkpoint.save_top_k", "-1"]) == 0
    kept = next((tmp_path / "cut" / "checkpoints").glob("*step=3.ckpt")).rename(tmp_path / "kept.ckpt")
    before = {path: path.read_bytes() for path in (tmp_path / "cut" / "teacher_cache").iterdir()}
    forwards.clear()
    assert main([*cut, "--ckpt_path", str(kept)]) == 0
    assert not forwards
    assert before == {path: path.read_bytes() for path in (tmp_path / "cut" / "teacher_cache").iterdir()}
    whole, resumed = runs.student(tmp_path / "whole"), runs.student(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_folder_of_another_teacher_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = runs.little_data(tmp_path, rows=12)
    assert main(words(tmp_path / "root", data, steps=1)) == 0
    again = words(tmp_path / "root", data, "--export.overwrite", "true", "--model.teacher", "asset:student")
    refused(again, [str(tmp_path / "root" / "teacher_cache"), "another teacher", "asset:teacher"], capfd)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"teacher_cache must be false .* there is no teacher"):
        DistillationModule("asset:student", ce_weight=1.0, teacher_cache=True)
    module = DistillationModule("asset:student", "asset:teacher", teacher_cache=True)
    plain = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_steps": 1}
    trainer = L.Trainer(accelerator="cpu", devices=1, enable_model_summary=False, limit_val_batches=0, **plain)
    loader = DataLoader(split(rows(), 6, 6), batch_size=None)
    with pytest.raises(ValueError, match="teacher_cache needs a data module of this package, got a custom one or none"):
        trainer.fit(module, loader, loader)


# --------------------------------------------------------------------------------------------------------------- ranks
def train(root: str, data: str, **kwargs: Any) -> DistillationModule:
    """Two passes in file order, in batches of 4 rows over all ranks."""
    module = DistillationModule(
        "asset:student",
        "asset:teacher",
        optimizer=SGD,
        teacher_kwargs={"dtype": "float32"},
        teacher_cache=True,
    )
    datamodule = InstructionDataModule(data, batch_size=4 // kwargs.get("devices", 1), max_length=128, shuffle=False)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        max_epochs=2,
        default_root_dir=root,
        **{"devices": 1, **kwargs},
    )
    trainer.fit(module, datamodule=datamodule)
    assert isinstance(module.teacher, CachedTeacher)
    return module


def on_a_rank(rank: int, root: str, data: str) -> dict[str, Tensor]:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", GROUP_RANK="0")
    os.environ.update(TORCHELASTIC_RUN_ID="test", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    return weights(train(root, data, devices=2, strategy="ddp"))


@pytest.mark.slow
def test_two_ranks_share_the_writing_and_train_as_one(tmp_path: Path) -> None:
    data = runs.little_data(tmp_path, rows=20)
    alone = weights(train(str(tmp_path / "one"), str(data)))
    found = processes.run(on_a_rank, str(tmp_path / "two"), str(data))
    for student in found:
        assert_same_student(student, alone, atol=5e-5)
    one, two = (CacheManifest.read(tmp_path / name / "teacher_cache") for name in ("one", "two"))
    assert one.data == two.data and one.digest == two.digest
    shards = CacheReader(tmp_path / "two" / "teacher_cache", two.digest)
    assert len(shards.tables) == 2 and shards.tokens == two.tokens == one.tokens
