"""Outputs that cannot be written, and a folder that is gone, are refused before a model is read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import runs
from kd_lightning.generation.response_file import check_output
from locations import ROOT
from refusals import refused


def words(data: Path, output: Path) -> list[str]:
    return ["generate", "--model", "no-such-model/at-all", "--data", str(data), "--output", str(output)]


def test_outputs_that_cannot_be_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = runs.little_data(tmp_path, 3)
    (tmp_path / "dangling.jsonl").symlink_to(tmp_path / "gone" / "target.jsonl")
    (tmp_path / "circle.jsonl").symlink_to(tmp_path / "circle.jsonl")
    (tmp_path / "link").symlink_to(tmp_path / "no-folder")
    (tmp_path / "folder.jsonl").mkdir()
    cases = {
        "dangling.jsonl": ["is a link to", "target.jsonl, which does not exist"],
        "circle.jsonl": ["is a link to"],
        "folder.jsonl": ["is a folder"],
        "train.jsonl/out.jsonl": ["train.jsonl is not a folder"],
        "link/out.jsonl": ["link is not a folder"],
    }
    for name, said in cases.items():
        refused(words(data, tmp_path / name), [f"output {tmp_path / name}", *said], capfd)
    refused(words(data, Path("/proc/none/out.jsonl")), ["output /proc/none/out.jsonl cannot be written to"], capfd)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["train.jsonl", "dangling.jsonl", "circle.jsonl", "link", "folder.jsonl"]
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_of_others(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot be written to: Permission denied"):
        check_output(tmp_path / "out.jsonl")
    tmp_path.chmod(0o700)


def test_outputs_that_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "there.jsonl").write_text("x", encoding="utf-8")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "there.jsonl")
    for name in ("new.jsonl", "there.jsonl", "link.jsonl", "new/folders/out.jsonl"):
        check_output(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.jsonl", "there.jsonl"]
    assert (tmp_path / "there.jsonl").read_text(encoding="utf-8") == "x"


def test_a_current_folder_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    code = "import os; os.rmdir(os.getcwd()); from kd_lightning.cli.program import main; "
    for args in (["--help"], ["compare", "x"], ["fit", "--config", "quickstart"]):
        (tmp_path / "gone").mkdir(exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-c", f"{code} raise SystemExit(main({args!r}))"],
            cwd=tmp_path / "gone",
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1 and done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert line.startswith("kd-lightning: error: the current folder cannot be read") and "deleted" in line
