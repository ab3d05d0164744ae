"""How far a run is, in a terminal and in a file."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as L
import pytest

import runs
from kd_lightning.cli import main
from kd_lightning.progress import PlainProgress, StepBar, progress


def words(tmp_path: Path) -> list[str]:
    quiet = set(runs.QUIET[:2])
    found = [word for word in runs.little(tmp_path / "run", steps=4) if word not in quiet]
    return [*found[: found.index("--trainer.enable_model_summary")], *found[found.index("--trainer.max_steps") :]]


def test_a_file_gets_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    often = ["--trainer.callbacks", "PlainProgress", "--trainer.callbacks.seconds", "0"]
    often[1] = "kd_lightning.progress.PlainProgress"
    data = ["--data.train", str(runs.little_data(tmp_path)), "--trainer.log_every_n_steps", "1"]
    assert main([*words(tmp_path), *data, *often]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.split(",")[0] for line in lines] == [f"step {n}/4 ({25 * n}%)" for n in (1, 2, 3, 4)]
    assert all("min left" in line for line in lines)


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert isinstance(progress(), StepBar)
    monkeypatch.setattr("sys.stdout.isatty", lambda: False, raising=False)
    assert isinstance(progress(), PlainProgress)


def test_the_bar_shows_the_step_among_all_steps() -> None:
    bar = StepBar()
    trainer = L.Trainer(
        accelerator="cpu", max_steps=7, logger=False, enable_checkpointing=False, callbacks=[bar], max_epochs=-1
    )
    found = bar.get_metrics(trainer, L.LightningModule())
    assert found == {"step": "0/7"}
    bar._trainer = trainer
    assert bar._get_train_description(3).strip() == "Epoch 3"
