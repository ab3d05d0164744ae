"""Runs with a teacher behind a server as a user starts them: outages, ends, kills, and the other commands."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch

import runs
from fake_server import stable_port
from kd_lightning import DistillationModule
from kd_lightning.cli.program import main
from kd_lightning.data import InstructionDataModule
from kd_lightning.teachers.served import ServerTeacher
from refusals import refused
from scoring_server import ScoringServer
from tiny_fits import SGD, assert_same_student, weights

OWN = ["--data.teacher_prompt", "{prompt}\n{task}"]


def words(root: Path, data: Path, url: str, *extra: str, steps: int = 8) -> list[str]:
    """A short fit with the bundled teacher behind a server."""
    few = ["--data.batch_size", "4", "--data.train", str(data), "--data.val", str(data), "--model.teacher"]
    served = ["ServerTeacher", "--model.teacher.url", url, "--model.teacher.patience", "2"]
    return [*runs.little(root, steps=steps), *few, *served, *extra]


def down_from(first: int) -> Any:
    """A server that fails for good from this request on."""
    return lambda number, path, body: (503, b"down") if number >= first else None


def same(one: Path, other: Path) -> None:
    first, second = runs.student(one), runs.student(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


class Restart(L.Callback):
    """Stops the server after two steps; another one answers at its port after some seconds."""

    def __init__(self, server: ScoringServer, seconds: float) -> None:
        self.server, self.seconds = server, seconds
        self.thread = threading.Thread(target=self.restart)
        self.other: ScoringServer | None = None

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 2:
            self.server.__exit__()
            self.thread.start()

    def restart(self) -> None:
        time.sleep(self.seconds)
        self.other = ScoringServer(port=self.server.port)
        self.other.__enter__()


@pytest.mark.parametrize("seconds", [1.0, pytest.param(10.0, marks=pytest.mark.slow)])
def test_an_outage_is_outlasted(seconds: float, tmp_path: Path) -> None:
    data = str(runs.little_data(tmp_path, rows=24))
    found = []
    for restart in (False, True):
        with ScoringServer(port=stable_port()) as server:
            callback = Restart(server, seconds)
            L.seed_everything(1, verbose=False)
            trainer = L.Trainer(
                accelerator="cpu", devices=1, max_steps=5, logger=False, enable_checkpointing=False,
                enable_progress_bar=False, limit_val_batches=0, callbacks=[callback] if restart else [],
            )  # fmt: skip
            module = DistillationModule("asset:student", teacher=ServerTeacher(server.url, top_k=8), optimizer=SGD)
            loader = InstructionDataModule(data, tokenizer="asset:student", batch_size=4, max_length=96)
            begin = time.monotonic()
            trainer.fit(module, datamodule=loader)
            found.append(weights(module))
            if restart:
                assert time.monotonic() - begin >= seconds
                callback.thread.join()
                assert callback.other is not None and callback.other.bodies
                callback.other.__exit__()
    assert_same_student(*found, atol=0.0)


@pytest.mark.parametrize(
    ("end", "extra"),
    [
        (45, []),
        (52, ["--trainer.accumulate_grad_batches", "3"]),
        (75, ["--trainer.val_check_interval", "6", "--trainer.limit_val_batches", "6"]),
    ],
    ids=["in a step", "in a window", "in validation"],
)
def test_a_server_that_dies_ends_the_run_which_resumes(
    end: int, extra: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = runs.little_data(tmp_path, rows=45)
    with ScoringServer() as server:
        assert main(words(tmp_path / "whole", data, server.url, *extra)) == 0
    with ScoringServer(fault=down_from(end), port=stable_port()) as server:
        cut = words(tmp_path / "cut", data, server.url, *extra)
        line = refused(cut, ["does not answer: row", "failed for 2 s", "--ckpt_path last"], capfd)
        assert "finished responses" not in line
        port = server.port
    last = torch.load(tmp_path / "cut" / "checkpoints" / "last.ckpt", weights_only=True)
    assert 1 <= last["global_step"] < 8
    with ScoringServer(port=port):
        assert main([*cut, "--ckpt_path", "last"]) == 0
    same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_killed_and_resumed_equals_untouched(tmp_path: Path) -> None:
    data = runs.little_data(tmp_path, rows=45)
    often = ["--checkpoint.every_n_train_steps", "5", *OWN]
    with ScoringServer() as server:
        assert main(words(tmp_path / "whole", data, server.url, *often, steps=40)) == 0
        cut = words(tmp_path / "cut", data, server.url, *often, steps=40)
        runs.kill_when(cut, tmp_path / "cut" / "checkpoints" / "last.ckpt")
        code, _, err = runs.finish([*cut, "--ckpt_path", "last"])
    assert code == 0, err
    same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("command", ["validate", "test"])
def test_it_is_measured_as_in_process(command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = runs.little_data(tmp_path, rows=4)
    found = []
    for served in (True, False):
        with ScoringServer() as server:
            given = words(tmp_path / str(served), data, server.url, "--model.teacher.top_k", "2048")
            if not served:
                at = given.index("ServerTeacher")
                given = [*given[:at], "asset:teacher", "--model.teacher_kwargs", "{dtype: float32}"]
            del given[given.index("--trainer.limit_test_batches") :][:2]
            given = [command, *given[1:], *OWN, "--data.test", str(data), "--trainer.limit_test_batches", "1.0"]
            assert main([word for word in given if word]) == 0
            assert not served or len(server.bodies) >= 8
        out = capfd.readouterr().out
        found.append({line.split()[1]: line.split()[3] for line in out.splitlines() if "│" in line and "kl" in line})
    assert found[0] and found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert float(value) == pytest.approx(float(found[1][name]), abs=1e-4), name


def test_preflight_asks_the_server(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data, other = runs.little_data(tmp_path, rows=24), tmp_path / "other.jsonl"
    lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
    other.write_text("".join(lines[16:]), encoding="utf-8")
    data.write_text("".join(lines[:16]), encoding="utf-8")
    output = tmp_path / "found.json"
    with ScoringServer(bound=20) as server:
        given = ["preflight", *words(tmp_path / "run", data, server.url)[1:], *OWN, "--json", str(output)]
        given += ["--data.val", str(other), "--data.test", "null"]
        main(given)
        sound = json.loads(output.read_text(encoding="utf-8"))
        assert server.bodies
        assert [one["check"] for one in sound if one["level"] == "error"] == []
        assert any(one["check"] == "teacher_input" for one in sound)
        assert main([*given, "--model.teacher.top_k", "64"]) == 1
    broken = json.loads(output.read_text(encoding="utf-8"))
    errors = [one["text"] for one in broken if one["level"] == "error"]
    assert len(errors) == 1
    assert "--max-logprobs 64" in errors[0]
