"""A folder is written by one process at a time; the lock of a process that has ended is taken over."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kd_lightning.folder_lock import LOCK, folder_lock, lock_problem, remove_leftovers
from locations import ROOT

HOLD = """
import sys, time
from pathlib import Path
from kd_lightning.folder_lock import folder_lock
with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_another_process_is_kept_out_until_it_ends(tmp_path: Path) -> None:
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "held\n"
            with pytest.raises(ValueError, match=rf"is in use by process {process.pid} on host .* delete .*/\.lock"):
                folder_lock(tmp_path).__enter__()
            assert str(process.pid) in (lock_problem(tmp_path) or "")
        finally:
            process.kill()
    messages: list[str] = []
    assert lock_problem(tmp_path) is None
    with folder_lock(tmp_path, messages.append):
        assert messages == [f"{tmp_path}: taking over the lock of process {process.pid}, which has ended"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ValueError])
def test_it_is_released_however_the_block_ends(error: type[BaseException] | None, tmp_path: Path) -> None:
    for _ in range(2):
        try:
            with folder_lock(tmp_path / "new"):
                with pytest.raises(ValueError, match="is in use by process"):
                    folder_lock(tmp_path / "new").__enter__()
                if error is not None:
                    raise error
        except (KeyboardInterrupt, ValueError):
            pass
        assert not (tmp_path / "new" / LOCK).exists()


def test_the_lock_of_another_host_is_refused_until_it_is_deleted(tmp_path: Path) -> None:
    path = tmp_path / LOCK
    path.write_text(json.dumps({"pid": 7, "host": "elsewhere"}))
    for _ in range(2):
        with pytest.raises(ValueError, match="is in use by process 7 on host elsewhere"):
            folder_lock(tmp_path).__enter__()
    path.unlink()
    with folder_lock(tmp_path):
        assert path.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_a_broken_lock_file_that_no_process_holds_is_taken_over(text: str, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(text)
    with folder_lock(tmp_path):
        pass


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def unsupported(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with folder_lock(tmp_path), pytest.raises(ValueError, match=f"is in use by process {os.getpid()} on host"):
        folder_lock(tmp_path).__enter__()
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    (tmp_path / LOCK).write_text(json.dumps({"pid": ended.pid, "host": socket.gethostname()}))
    with folder_lock(tmp_path):
        pass


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = ["last.ckpt", ".hidden", "x.12.part", ".x.part", ".x.12.partial", ".last.old"]
    for name in [*kept, ".epoch=0-step=3.ckpt.20541.part", ".config.yaml.7.part"]:
        (tmp_path / name).touch()
    folders = ["student", ".adapter.old", "sharded.part"]  # the only version of `adapter`
    for name in [*folders, ".student.part", ".student.old", ".sharded.ckpt.part"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").touch()
    kept += folders
    assert len(remove_leftovers([tmp_path, tmp_path / "none"])) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
