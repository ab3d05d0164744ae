"""Writing that a kill or a full disk cannot half do: into a new name beside the old one, then one rename."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


def first_unused_path(named: Callable[[int], Path]) -> Path:
    """The first of the paths that `named` gives to 1, 2 … on which nothing lies."""
    return next(path for path in map(named, itertools.count(1)) if not path.exists())


def disk_is_full(path: Path) -> bool:
    """Whether the disk is full on which `path` lies: a writer may say something else then."""
    return shutil.disk_usage(path.parent).free < 1 << 16


def _say_if_full(error: Exception, path: Path) -> None:
    """Turn what a writer says on a full disk (an unexpected position, an iostream error) into the reason."""
    if disk_is_full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to; it takes the place of `path` when the block ends well, and vanishes otherwise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with open(part, "rb") as written:
            os.fsync(written.fileno())
        if path.is_dir():  # a checkpoint that was written by many
            os.replace(path, old := path.with_name(f".{path.name}.old"))
            os.replace(part, path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(part, path)
    except (RuntimeError, SafetensorError) as error:
        _say_if_full(error, path)
        raise
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder to write to; it takes the place of `path` when the block ends well.

    A folder cannot be renamed over one that is not empty: the old one steps aside for the moment between two renames
    and is deleted last, so that at every moment one whole folder is on the disk (`path`, or `.name.old` beside it).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part, old = partial_folder(path), path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        os.replace(old, path)  # killed between the two renames last time
    for leftover in (part, old):
        _remove(leftover)
    part.mkdir()
    try:
        yield part
        if path.exists():
            os.replace(path, old)
        os.replace(part, path)
        _remove(old)
    except (RuntimeError, SafetensorError) as error:
        _say_if_full(error, path)
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def partial_folder(path: Path) -> Path:
    """The folder that `whole_folder(path)` yields, for those who write into it beside the one that opened it."""
    return path.with_name(f".{path.name}.part")


def _remove(path: Path) -> None:
    if path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
