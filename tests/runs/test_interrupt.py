"""Ctrl-C: the step is finished, the state is saved, and a resumed run ends with the same bits."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch

import runs
from kd_lightning.callbacks.checkpoint import RunCheckpoint
from kd_lightning.cli.program import main

STEPS = 12


class CtrlC(L.Callback):
    """Press Ctrl-C in the middle of a micro-batch."""

    def __init__(self, batch: int, number: int = int(signal.SIGINT)) -> None:
        self.batch, self.number = batch, number

    def on_before_zero_grad(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_interrupted_run_resumes_to_the_same_bits(
    accumulate: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    common = ["--data.train", str(runs.little_data(tmp_path, rows=29)), "--data.batch_size", "4"]
    common += ["--trainer.accumulate_grad_batches", str(accumulate)]
    handler = signal.getsignal(signal.SIGINT)
    assert main([*runs.little(tmp_path / "whole", "taid", steps=STEPS), *common]) == 0
    cut = [*runs.little(tmp_path / "cut", "taid", steps=STEPS), *common]
    press = ["--trainer.callbacks", "test_interrupt.CtrlC", "--trainer.callbacks.batch", "4"]
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main([*cut, *press])
    last = torch.load(tmp_path / "cut" / "checkpoints" / "last.ckpt", weights_only=True)
    assert 0 < last["global_step"] < STEPS
    assert "Interrupted: finishing this step and saving last.ckpt (press Ctrl-C again to abort)" in caplog.text
    assert "last.ckpt: resume with --ckpt_path last" in caplog.text
    assert not (tmp_path / "cut" / "student").exists()
    assert signal.getsignal(signal.SIGINT) is handler
    assert main([*cut, "--ckpt_path", "last"]) == 0
    whole, resumed = runs.student(tmp_path / "whole"), runs.student(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_sigterm_saves_the_step_and_ends_with_143(tmp_path: Path) -> None:
    words = [*runs.little(tmp_path / "cut", steps=STEPS), "--data.train", str(runs.little_data(tmp_path, rows=29))]
    press = ["--trainer.callbacks", "test_interrupt.CtrlC", "--trainer.callbacks.batch", "2"]
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        main([*words, *press, "--trainer.callbacks.number", "15"])
    assert end.value.code == 143
    last = torch.load(tmp_path / "cut" / "checkpoints" / "last.ckpt", weights_only=True)
    assert 0 < last["global_step"] < STEPS
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not (tmp_path / "cut" / "student").exists() and not (tmp_path / "cut" / ".lock").exists()


def test_another_thread_leaves_ctrl_c_alone(tmp_path: Path) -> None:
    handler, found = signal.getsignal(signal.SIGINT), []
    words = [*runs.little(tmp_path / "run", steps=1), "--data.train", str(runs.little_data(tmp_path))]
    thread = threading.Thread(target=lambda: found.append(main(words)))
    thread.start()
    thread.join()
    assert found == [0] and signal.getsignal(signal.SIGINT) is handler


def test_the_last_state_is_saved_by_default() -> None:
    assert RunCheckpoint().save_last is True
