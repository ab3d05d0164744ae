"""Export, closing table and report are plain callbacks: Lightning keeps its checkpoints, and they act after them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import runs
import tiny_fits
from kd_lightning.callbacks import HFExport, Report, ResultsTable
from kd_lightning.callbacks.base import on_training_device
from kd_lightning.cli.program import main

QUIET: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, "num_sanity_val_steps": 0}
QUIET |= {"enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False}


def late_callbacks() -> list[L.Callback]:
    return [HFExport(), ResultsTable(), Report()]


def loader(*sizes: int) -> DataLoader[Any]:
    return DataLoader(tiny_fits.split(tiny_fits.rows(), *sizes), batch_size=None)


def test_lightning_keeps_its_default_checkpoint(tmp_path: Path) -> None:
    trainer = L.Trainer(default_root_dir=tmp_path, callbacks=late_callbacks(), **QUIET)
    assert [type(callback) for callback in trainer.checkpoint_callbacks] == [ModelCheckpoint]


def test_checkpoints_can_be_switched_off(tmp_path: Path) -> None:
    settings = {**QUIET, "enable_checkpointing": False, "max_epochs": 1, "limit_val_batches": 0}
    trainer = L.Trainer(default_root_dir=tmp_path, callbacks=late_callbacks(), **settings)
    assert not trainer.checkpoint_callbacks
    module = tiny_fits.bundled()
    trainer.fit(module, loader(6, 6), loader(6, 6))
    exported = load_file(tmp_path / "student" / "model.safetensors")
    held = module.student.state_dict()
    assert all(torch.equal(held[name], tensor) for name, tensor in exported.items())
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("export_first", [True, False])
def test_best_of_a_test_is_the_checkpoint_callbacks_own(export_first: bool, tmp_path: Path) -> None:
    kept = ModelCheckpoint(tmp_path / "kept", monitor="val/kd", mode="max")  # the opposite of what the export keeps
    export = HFExport(which="best")
    callbacks: list[L.Callback] = [export, kept] if export_first else [kept, export]
    trainer = L.Trainer(default_root_dir=tmp_path, callbacks=callbacks, max_epochs=3, **QUIET)
    trainer.fit(tiny_fits.bundled(), loader(12), loader(12))
    assert export.best is not None and kept.best_model_score is not None
    assert export.best < float(kept.best_model_score)
    trainer.test(dataloaders=loader(12), ckpt_path="best", weights_only=True, verbose=False)
    assert trainer.ckpt_path == kept.best_model_path and Path(kept.best_model_path).parent == tmp_path / "kept"
    assert float(trainer.callback_metrics["test/kd"]) == pytest.approx(float(kept.best_model_score))


class Order(L.Callback):
    """Records which files exist at the end of a run; the program adds it before its own callbacks."""

    found: dict[str, list[str]]

    def __init__(self) -> None:
        type(self).found = {}

    def _look(self, trainer: L.Trainer, moment: str) -> None:
        root = Path(trainer.default_root_dir)
        names = ("checkpoints/last.ckpt", "student", "results.json", "report.md")
        self.found[moment] = [name for name in names if (root / name).exists()]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._look(trainer, "on_train_end")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._look(trainer, "on_fit_end")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._look(trainer, "teardown")


def test_checkpoint_then_export_then_table_then_report(tmp_path: Path) -> None:
    data = str(runs.little_data(tmp_path, rows=8))
    words = [*runs.little(tmp_path / "root", steps=1, test=True), "--data.train", data, "--data.test", data]
    words += ["--results.max_new_tokens", "2", "--trainer.callbacks", "test_export.Order"]
    assert main(words) == 0
    assert Order.found["on_train_end"] == []
    assert Order.found["on_fit_end"] == ["checkpoints/last.ckpt"]
    assert Order.found["teardown"] == ["checkpoints/last.ckpt", "student", "results.json"]
    assert (tmp_path / "root" / "report.md").exists()


def test_the_program_has_one_checkpoint_callback(tmp_path: Path) -> None:
    from kd_lightning.cli.program import run

    words = [*runs.little(tmp_path / "root"), "--data.train", str(runs.little_data(tmp_path))]
    callbacks = run(words, start=False).trainer.callbacks
    assert [type(callback).__name__ for callback in callbacks if isinstance(callback, Checkpoint)] == ["RunCheckpoint"]
    names = [type(callback).__name__ for callback in callbacks]
    assert names.index("HFExport") < names.index("ResultsTable")


def test_work_after_a_fit_runs_on_the_device_of_the_fit() -> None:
    module = L.LightningModule()
    moved: list[torch.device] = []

    def model_to_device() -> None:
        moved.append(torch.device("meta"))
        module.to("meta")

    strategy = SimpleNamespace(root_device=torch.device("meta"), model_to_device=model_to_device)
    trainer: Any = SimpleNamespace(strategy=strategy)
    with pytest.raises(KeyError), on_training_device(trainer, module):
        assert module.device.type == "meta"
        raise KeyError
    assert module.device.type == "cpu" and len(moved) == 1
    module.to("meta")  # as a strategy that leaves the module on its device
    with on_training_device(trainer, module):
        assert module.device.type == "meta"
    assert module.device.type == "meta" and len(moved) == 1
