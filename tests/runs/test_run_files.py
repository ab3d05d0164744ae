"""The files of a run: checkpoints that were damaged, leftovers of killed runs, a second run in the same folder."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as L
import pytest

import runs
from kd_lightning.cli.program import main
from kd_lightning.folder_lock import folder_lock, lock_problem
from locations import ROOT, SUPPORT


@pytest.mark.slow
def test_paths_are_expanded_alike_by_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WORK", str(tmp_path / "work"))
    monkeypatch.chdir(tmp_path)
    runs.little_data(tmp_path)
    words = [*runs.little(Path("$WORK/root"), steps=2), "--data.train", "~/train.jsonl"]
    assert main([*words, "--trainer.max_steps", "1"]) == 0
    assert main([*words, "--ckpt_path", "last"]) == 0
    capfd.readouterr()
    assert main([*words, "--ckpt_path", "~/work/root/checkpoints/last.ckpt", "--baseline", "${WORK}/root"]) == 1
    assert f"--baseline {tmp_path}/work/root has no validation yet" in capfd.readouterr().err
    assert main(["compare", "~/work/root", "--output", "$WORK/page.md"]) == 0
    root = tmp_path / "work" / "root"
    assert (root / "student").is_dir() and (tmp_path / "work" / "page.md").is_file()
    for logger in ("CSVLogger", "TensorBoardLogger"):
        assert (
            main(
                [
                    *runs.little(tmp_path / logger, steps=1),
                    "--data.train",
                    "$HOME/train.jsonl",
                    "--trainer.logger",
                    logger,
                    "--trainer.logger.save_dir",
                    f"~/{logger}/logs",
                ]
            )
            == 0
        )
        assert (tmp_path / logger / "logs").is_dir()
    words = ["generate", "--model", "$WORK/root/student", "--data", "~/train.jsonl", "--output", "~/out.jsonl"]
    assert main([*words, "--max_new_tokens", "1"]) == 0
    assert (tmp_path / "out.jsonl").is_file()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] in "~$") == []
    capfd.readouterr()
    assert main([*runs.little(Path("$NOWHERE/root")), "--data.train", "~/train.jsonl"]) == 1
    assert (
        "--trainer.default_root_dir $NOWHERE/root: the environment variable NOWHERE is not set"
        in capfd.readouterr().err
    )


def test_a_resume_from_a_damaged_checkpoint_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "root"
    words = [*runs.little(root, steps=2), "--data.train", str(runs.little_data(tmp_path))]
    assert main([*words, "--trainer.max_steps", "1"]) == 0
    last = root / "checkpoints" / "last.ckpt"
    assert last.with_name("last.ckpt.sha256").read_text().endswith("  last.ckpt\n")
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes(data)
    capfd.readouterr()
    for command in ([*words, "--ckpt_path", "last"], ["preflight", *words[1:], "--ckpt_path", str(last)]):
        assert main(command) == 1
        out, err = capfd.readouterr()
        lines = [line for line in (out + err).splitlines() if "last.ckpt is damaged: it is not what was saved" in line]
        assert len(lines) == 1 and "Traceback" not in out + err
    last.with_name("last.ckpt.sha256").unlink()
    data[len(data) // 2] ^= 1
    last.write_bytes(data)
    assert main([*words, "--ckpt_path", "last"]) == 0


def test_a_second_run_is_refused_and_leftovers_of_killed_runs_are_removed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    words = [*runs.little(root, steps=1), "--data.train", str(runs.little_data(tmp_path))]
    leftovers = [root / "checkpoints" / ".epoch=0-step=3.ckpt.20541.part", root / ".config.yaml.99.part"]
    with folder_lock(root):
        before = sorted(root.rglob("*"))
        for command in (words, ["preflight", *words[1:]]):
            assert main(command) == 1
            assert f"{root} is in use by process" in "".join(capfd.readouterr())
        assert sorted(root.rglob("*")) == before
    with folder_lock(tmp_path / "cached"):
        assert main(["cache", *words[1:], "--output", str(tmp_path / "cached")]) == 1
        assert f"{tmp_path / 'cached'} is in use by process" in capfd.readouterr().err
        assert [path.name for path in (tmp_path / "cached").iterdir()] == [".lock"]
    for path in leftovers:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(100))
    assert main(words) == 0
    assert not any(path.exists() for path in leftovers) and lock_problem(root) is None
    assert not (root / ".lock").exists()


def test_a_folder_for_checkpoints_elsewhere_is_resumed_from_locked_and_cleaned(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    words = [*runs.little(root, steps=3), "--data.train", str(runs.little_data(tmp_path))]
    words += ["--checkpoint.dirpath", str(elsewhere), "--checkpoint.every_n_train_steps", "1"]
    assert main([*words, "--trainer.max_steps", "2"]) == 0
    assert (elsewhere / "last.ckpt.sha256").is_file() and not list((root / "checkpoints").glob("*.ckpt"))
    (elsewhere / "last.ckpt").unlink()  # as a kill between two files leaves it
    leftovers = [elsewhere / ".last.ckpt.17.part", elsewhere / ".last.ckpt.part", root / ".student.part"]
    leftovers[0].touch()
    for path in leftovers[1:]:
        path.mkdir()
    with folder_lock(elsewhere):
        for command in (words, ["preflight", *words[1:]]):
            assert main([*command, "--ckpt_path", "last"]) == 1
            assert f"{elsewhere} is in use by process" in "".join(capfd.readouterr())
    assert main([*words, "--ckpt_path", "last"]) == 0
    assert not any(path.exists() for path in leftovers) and not (elsewhere / ".lock").exists()
    last = elsewhere / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-9] + bytes(9))
    capfd.readouterr()
    assert main([*words, "--trainer.max_steps", "4", "--ckpt_path", "last"]) == 1
    assert "last.ckpt is" in capfd.readouterr().err


class SmallFiles(L.Callback):
    """A file-size limit that the events exceed, from the first step on."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (events,) = Path(trainer.default_root_dir).glob("tensorboard/events*")
        resource.setrlimit(resource.RLIMIT_FSIZE, (events.stat().st_size + 300,) * 2)


@pytest.mark.slow
def test_a_limit_that_the_curves_reach_is_one_line(tmp_path: Path) -> None:
    words = [*runs.little(tmp_path / "root", steps=30), "--data.train", str(runs.little_data(tmp_path))]
    words += ["--trainer.log_every_n_steps", "1", "--trainer.callbacks", "test_run_files.SmallFiles"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "runs"), str(SUPPORT)])
    command = [sys.executable, "-m", "kd_lightning", *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 1 and "Traceback" not in done.stderr and "Exception" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "File too large" in line)
    assert str(tmp_path / "root") in line


def test_a_folder_that_is_given_twice_in_another_spelling_is_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUNS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("alpha", "beta"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"data: {{}}\nseed_everything: {name}\nmodel: {{x: {name}}}\n")
    (tmp_path / "link").symlink_to("alpha")
    assert main(["compare", "~/alpha", str(tmp_path / "alpha"), "$RUNS/alpha", "link", "./alpha/", "beta"]) == 0
    out = capsys.readouterr().out
    assert "Left out" not in out and out.count("alpha") == 1
