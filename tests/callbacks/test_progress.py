"""Progress of a run, in a terminal and in a log file."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterable, Iterator
from pathlib import Path

import lightning.pytorch as L
import pytest

import runs
from kd_lightning.callbacks.progress import PlainProgress, StepBar, progress
from kd_lightning.cli.preflight import CHECKS
from kd_lightning.cli.program import main
from kd_lightning.console import BAR_FORMAT, terminal_bar
from locations import ROOT


def words(tmp_path: Path) -> list[str]:
    quiet = set(runs.QUIET[:2])
    found = [word for word in runs.little(tmp_path / "run", steps=4) if word not in quiet]
    return [*found[: found.index("--trainer.enable_model_summary")], *found[found.index("--trainer.max_steps") :]]


def test_a_file_gets_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    often = ["--trainer.callbacks", "PlainProgress", "--trainer.callbacks.seconds", "0"]
    often[1] = "kd_lightning.callbacks.progress.PlainProgress"
    data = ["--data.train", str(runs.little_data(tmp_path)), "--trainer.log_every_n_steps", "1"]
    assert main([*words(tmp_path), *data, *often]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.split(",")[0] for line in lines] == [f"step {n}/4 ({25 * n}%)" for n in (1, 2, 3, 4)]
    assert ["min left" in line for line in lines] == [False, True, True, True]


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


@pytest.mark.slow
def test_in_a_terminal_every_bar_overwrites_itself_and_is_closed_before_the_table(tmp_path: Path) -> None:
    data = ["--data.train", str(runs.little_data(tmp_path)), "--data.batch_size", "8"]
    given = words(tmp_path)[:-2]  # with the closing table
    given += ["--trainer.val_check_interval", "2", "--results.max_new_tokens", "2"]
    given += ["--generation.every_n_validations", "1", "--generation.rows", "4", "--generation.max_new_tokens", "2"]
    text = in_a_terminal([sys.executable, "-m", "kd_lightning", *given, *data, "--trainer.limit_test_batches", "2"])
    lines = screen(text)
    table = next(number for number, line in enumerate(lines) if "exact match" in line)
    assert not any("%|" in line for line in lines[table:])
    (training,) = (line for line in lines if "%|" in line and "Tokenizing" not in line)
    assert training.startswith("Epoch 0: 100%|") and "step=4/4" in training and len(training) <= 100
    for title in ("Test batches", "Validation batches", "Validation", "Answers, val", "student before answers"):
        assert f"{title}" in text


def screen(text: str) -> list[str]:
    """The lines that a terminal shows after this text, from the first one on."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[\d;]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", text):
        if part == "\x1b[A":
            row = max(row - 1, 0)
        elif part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif part[0] != "\x1b":
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]


def in_a_terminal(command: list[str]) -> str:
    """What a command writes to a terminal with 100 columns."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    with subprocess.Popen(command, stdin=child, stdout=child, stderr=child, env=environment) as process:
        os.close(child)
        found = b""
        with contextlib.suppress(OSError):  # the terminal is closed when the process ends
            while part := os.read(parent, 1 << 16):
                found += part
    os.close(parent)
    assert process.returncode == 0, found.decode()
    return found.decode()


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_have_one_style_in_a_terminal_and_none_in_a_log(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream)
    assert terminal_bar().get("file") is (stream if terminal else None)
    bar = StepBar()
    bar.enable()
    bars = [bar.init_sanity_tqdm(), bar.init_train_tqdm(), bar.init_test_tqdm(), bar.init_predict_tqdm()]
    assert {one.bar_format == BAR_FORMAT for one in bars} == {terminal}
    for one in reversed(bars):
        one.close()


COUNTING = """
import time
from kd_lightning.console import use_plain_progress_bars
use_plain_progress_bars()
from kd_lightning.console import progress_bar
import datasets
rows = datasets.Dataset.from_dict({"x": list(range(40))})
rows.map(lambda row: time.sleep(0.03) or row, desc="Tokenizing long")
rows.select(range(3)).map(lambda row: row, desc="Tokenizing short")
for _ in progress_bar(range(40), "Teacher long"):
    time.sleep(0.03)
for _ in progress_bar(range(3), "Teacher short"):
    pass
"""


def test_what_takes_long_writes_lines_into_a_file_and_what_is_short_nothing(tmp_path: Path) -> None:
    sooner = {"TQDM_DELAY": "0.3", "TQDM_MININTERVAL": "0.2", "HF_DATASETS_CACHE": str(tmp_path)}
    path = {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", COUNTING]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ, **path, **sooner})
    lines = done.stderr.split("\n")
    for title in ("Tokenizing long", "Teacher long"):
        found = [line.strip() for line in lines if title in line]
        assert 2 <= len(found) <= 10
        assert all(line.startswith(f"{title}: ") and " of 40, " in line and line.endswith(" left") for line in found)
    assert "short" not in done.stderr and "%|" not in done.stderr


def test_the_program_sets_lines_before_anything_shows_a_bar() -> None:
    code = "import sys, kd_lightning.cli; print('tqdm' in sys.modules)"
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=path)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("command", "title", "total"),
    [("preflight", "Preflight", len(CHECKS)), ("plan", "Planning", 5), ("compare", "Runs", 2)],
)
def test_commands_say_how_far_they_are(
    command: str, title: str, total: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def recorded(items: Iterable[object], desc: str, total: int | None = None, **_: object) -> Iterator[object]:
        passed = 0
        for item in items:
            yield item
            passed += 1
        found.append((desc, passed))
        assert total is None or passed == total

    monkeypatch.setattr("tqdm.tqdm", recorded)
    given = [*words(tmp_path)[1:], *(["--world_size", "1"] if command == "plan" else [])]
    if command == "compare":
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.yaml").write_text("data: {}")
        given = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert main([command, *given]) == 0
    assert (title, total) in found
