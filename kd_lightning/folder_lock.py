"""One process at a time writes into a folder: a lock file, `FOLDER/.lock`, that names the process which holds it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

LOCK = ".lock"
# the temporary names of `atomic_file` and `atomic_folder`
PART = re.compile(r"\..+\.\d+\.part")
PART_FOLDER = re.compile(r"\..+\.part")
OLD = re.compile(r"\.(.+)\.old")


@contextmanager
def folder_lock(folder: Path, report: Callable[[str], object] = print) -> Iterator[None]:
    """Hold the lock of a folder, which is created if needed, and deleted again if nothing was written into it.

    The lock of a process that has ended is taken over, with a report. Whether a process on another host still runs
    cannot be seen from here: its lock is refused until the user deletes the file.

    Args:
        folder: the folder.
        report: is called with a message if a stale lock was taken over.

    Raises:
        ValueError: another process holds the lock.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    file = _locked_file(path)
    try:
        if file is None:
            raise ValueError(_refusal(path))
        owner = _owner(path)
        if owner and owner.get("host") != socket.gethostname():
            raise ValueError(_refusal(path))
        if owner:
            report(f"{folder}: taking over the lock of process {owner.get('pid')}, which has ended")
        file.seek(0)
        file.truncate()
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n")
        file.flush()
        try:
            yield
        finally:
            if _is_same_file(path, file):  # a user may have deleted it, and another process locked a new one
                path.unlink()
            _remove_empty(created)
    finally:
        if file is not None:
            file.close()


def lock_problem(folder: Path) -> str | None:
    """Why a run cannot write into a folder now; None if it can. Changes nothing."""
    path = folder / LOCK
    if not path.exists():
        return None
    file = _locked_file(path)
    if file is None:
        return _refusal(path)
    file.close()
    owner = _owner(path)
    return _refusal(path) if owner and owner.get("host") != socket.gethostname() else None


def remove_leftovers(folders: Iterable[Path]) -> list[Path]:
    """Delete what killed runs have left half-written in folders whose lock is held.

    Args:
        folders: each is searched without its subfolders.

    Returns:
        The deleted files and folders.
    """
    found = [path for folder in folders if folder.is_dir() for path in folder.iterdir() if _is_leftover(path)]
    for path in found:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return found


def _is_leftover(path: Path) -> bool:
    """Whether a file or folder is half-written; the old version of a folder is one as soon as the new one exists."""
    if PART.fullmatch(path.name):
        return True
    if not path.is_dir():
        return False
    old = OLD.fullmatch(path.name)
    return PART_FOLDER.fullmatch(path.name) is not None or (old is not None and path.with_name(old[1]).exists())


def _remove_empty(folders: Iterable[Path]) -> None:
    """Delete folders, the innermost first, up to the first one that is not empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _locked_file(path: Path) -> TextIO | None:
    """The lock file, opened and locked against other processes; None if another process has locked it."""
    while True:
        file = path.open("a+", encoding="utf-8")
        if importlib.util.find_spec("fcntl") is None:  # not available on Windows
            return file
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError:  # a file system without locks: the process that the file names decides
            if _runs(_owner(path).get("pid")):
                file.close()
                return None
        if _is_same_file(path, file):
            return file
        file.close()  # the process that held it has just ended and deleted the file


def _runs(pid: object) -> bool:
    """Whether a process of this host runs."""
    try:
        os.kill(int(str(pid)), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:  # of another user
        return True
    return True


def _is_same_file(path: Path, file: TextIO) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _owner(path: Path) -> dict[str, Any]:
    """The process that a lock file names; empty for an unreadable one."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _refusal(path: Path) -> str:
    owner = _owner(path)
    pid, host = (owner.get(name, "unknown") for name in ("pid", "host"))
    return (
        f"{path.parent} is in use by process {pid} on host {host}: wait for it or choose another folder; if that "
        f"process has ended, delete {path}"
    )
