"""Ctrl-C and SIGTERM: the work at hand is finished and saved, and the resumed run ends with the same bits."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch

import runs
from fake_server import FakeServer
from kd_lightning.callbacks.checkpoint import RunCheckpoint
from kd_lightning.cli.program import main
from kd_lightning.data.conversation import Conversation
from kd_lightning.distributed.signals import StopRequest
from kd_lightning.folder_lock import folder_lock
from kd_lightning.generation import batch_generator
from kd_lightning.generation.response_file import Response
from kd_lightning.generation.server_generator import ServerGenerator
from kd_lightning.models.generate import Sampling
from kd_lightning.models.openai_client import OpenAIClient
from kd_lightning.reporting.run_dir import curves
from kd_lightning.teachers.cache_format import CacheManifest
from kd_lightning.teachers.cache_writer import fill_cache
from kd_lightning.teachers.hf import HFTeacher
from locations import ROOT, SUPPORT

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


def losses(root: Path) -> list[int]:
    """The steps whose loss was logged."""
    return [step for step, _ in curves(root)["train/loss"]]


@pytest.mark.parametrize("end", ["next batch", "validation", "epoch"])
def test_the_step_that_a_signal_ends_is_logged(end: str, tmp_path: Path) -> None:
    rows = {"epoch": 24}.get(end, 48)  # 3 batches of 8 rows
    words = [*runs.little(tmp_path / "cut", steps=STEPS), "--data.train", str(runs.little_data(tmp_path, rows))]
    words += ["--trainer.max_epochs", "9", "--trainer.log_every_n_steps", "1"]
    words += ["--trainer.val_check_interval", "3" if end == "validation" else "100"]
    press = ["--trainer.callbacks", "test_interrupt.CtrlC", "--trainer.callbacks.batch", "2"]
    with pytest.raises(SystemExit):
        main([*words, *press, "--trainer.callbacks.number", "15"])
    assert losses(tmp_path / "cut") == [0, 1, 2]
    assert main([*words, "--trainer.max_steps", "5", "--ckpt_path", "last"]) == 0
    assert losses(tmp_path / "cut") == [0, 1, 2, 3, 4]


class Early(L.Callback):
    """A signal before the first step."""

    def __init__(self, hook: str) -> None:
        self.hook = hook

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._send("setup")

    def on_fit_start(self, *args: Any) -> None:
        self._send("on_fit_start")

    def on_train_start(self, *args: Any) -> None:
        self._send("on_train_start")

    def _send(self, hook: str) -> None:
        if hook == self.hook:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("hook", ["setup", "on_fit_start", "on_train_start"])
def test_a_signal_before_the_first_step_ends_the_run_at_once(
    hook: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    words = [*runs.little(tmp_path / "run", steps=2), "--data.train", str(runs.little_data(tmp_path, rows=16))]
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        main([*words, "--trainer.callbacks", "test_interrupt.Early", "--trainer.callbacks.hook", hook])
    assert end.value.code == 143 and signal.getsignal(signal.SIGTERM) is handler
    assert "SIGTERM" in capsys.readouterr().err or "Interrupted before the first step" in caplog.text
    assert not (tmp_path / "run" / ".lock").exists() and not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


class OnRanks(CtrlC):
    """A signal to some of the ranks; the first step waits for the second rank to be signalled."""

    def __init__(self, batch: int, ranks: list[int], number: int = int(signal.SIGTERM)) -> None:
        super().__init__(batch, number)
        self.ranks = ranks

    def on_before_zero_grad(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_rank in self.ranks:
            super().on_before_zero_grad(trainer)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "number", "status"), [([1], 15, 143), ([0], 15, 143), ([0, 1], 15, 143), ([1], 2, 1)]
)
def test_a_signal_to_any_rank_ends_all_after_the_same_step(
    ranks: list[int], number: int, status: int, tmp_path: Path
) -> None:
    common = ["--data.train", str(runs.little_data(tmp_path, rows=40)), "--trainer.accumulate_grad_batches", "2"]
    common += ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.limit_val_batches", "0"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "runs"), str(SUPPORT)])

    def run(root: str, *more: str) -> tuple[int, str]:
        words = [*runs.little(tmp_path / root, steps=5), *common, "--data.batch_size", "2", *more]
        environment = {**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}
        done = subprocess.run(
            [sys.executable, "-m", "kd_lightning", *words], capture_output=True, text=True, env=environment, timeout=500
        )
        return done.returncode, done.stderr

    press = ["--trainer.callbacks", "test_interrupt.OnRanks", "--trainer.callbacks.batch", "2"]
    press += ["--trainer.callbacks.ranks", str(ranks), "--trainer.callbacks.number", str(number)]
    code, err = run("cut", *press)
    assert code == status, err
    assert "Traceback" not in err and "terminated with code" not in err
    assert err.count("resume with --ckpt_path last") == 1
    last = torch.load(tmp_path / "cut" / "checkpoints" / "last.ckpt", weights_only=True)
    assert 0 < last["global_step"] < 5
    assert not (tmp_path / "cut" / ".lock").exists()
    if ranks == [1] and number == 15:
        assert run("cut", "--ckpt_path", "last")[0] == 0
        assert run("whole")[0] == 0
        whole, resumed = runs.student(tmp_path / "whole"), runs.student(tmp_path / "cut")
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def kill_at(call: int, function: Callable[..., Any], number: int) -> Callable[..., Any]:
    """The function; at a call of it, this process receives a signal."""
    calls = itertools.count(1)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    return replaced


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_generate_finishes_the_batch_and_resumes(
    number: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = runs.little_data(tmp_path, rows=70), tmp_path / "out.jsonl"
    words = ["generate", "--model", "asset:student", "--data", str(data), "--batch_size", "2", "--max_new_tokens", "3"]
    assert main([*words, "--output", str(tmp_path / "whole.jsonl")]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(batch_generator, "generate", kill_at(20, batch_generator.generate, number))
        assert main([*words, "--output", str(output)]) == status
    err = capsys.readouterr().err
    assert f"run the same command again to resume {output}" in err and "Traceback" not in err
    written = output.read_text().splitlines()
    assert 32 <= len(written) < 70  # a window of 16 batches, sorted by length, is complete
    assert main([*words, "--output", str(output)]) == 0
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_generate_with_a_server_finishes_the_requests_that_are_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversations = [Conversation(prompt=str(number)) for number in range(40)]
    asked: list[int] = []
    with FakeServer() as server:
        generator = ServerGenerator(OpenAIClient(server.url), "m", Sampling(4))
        respond = generator.respond

        def counted(conversation: Conversation, number: int) -> Response:
            asked.append(number)
            return respond(conversation, number)

        monkeypatch.setattr(generator, "respond", counted)
        request, found = StopRequest(), []
        for number, _ in generator.generate(conversations, requests=2, request=request):
            found.append(number)
            request.signal = int(signal.SIGTERM)
    assert sorted(found) == sorted(asked) and 1 <= len(found) < 10


def test_cache_writes_the_batch_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = runs.little(tmp_path / "root")[1:]
    words = ["cache", *fit, "--data.train", str(runs.little_data(tmp_path, rows=40)), "--data.val", "null"]
    words += ["--data.test", "null"]
    assert main([*words, "--output", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(HFTeacher, "hidden", kill_at(2, HFTeacher.hidden, signal.SIGTERM))
        assert main([*words, "--output", str(tmp_path / "cut")]) == 143
    assert f"run the same command again to resume {tmp_path / 'cut'}" in capsys.readouterr().err
    shards = sorted((tmp_path / "cut").glob("shard-*"))
    assert len(shards) == 1 and not (tmp_path / "cut" / ".lock").exists()
    before = shards[0].read_bytes()
    assert main([*words, "--output", str(tmp_path / "cut")]) == 0
    assert shards[0].read_bytes() == before
    whole, resumed = (CacheManifest.read(tmp_path / name) for name in ("whole", "cut"))
    assert whole == resumed


def test_fill_cache_in_python_takes_the_lock(tmp_path: Path) -> None:
    with folder_lock(tmp_path / "cache"), pytest.raises(ValueError, match="is in use by process"):
        fill_cache(tmp_path / "cache", HFTeacher("asset:teacher"), None, 2048)  # type: ignore[arg-type]


def test_another_thread_leaves_ctrl_c_alone(tmp_path: Path) -> None:
    handler, found = signal.getsignal(signal.SIGINT), []
    words = [*runs.little(tmp_path / "run", steps=1), "--data.train", str(runs.little_data(tmp_path))]
    thread = threading.Thread(target=lambda: found.append(main(words)))
    thread.start()
    thread.join()
    assert found == [0] and signal.getsignal(signal.SIGINT) is handler


def test_the_last_state_is_saved_by_default() -> None:
    assert RunCheckpoint().save_last is True
