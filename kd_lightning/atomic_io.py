"""Atomic writes: a file is complete or absent. New content gets a temporary name and is renamed when complete."""

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
    """The first of `named(1)`, `named(2)`, … that does not exist."""
    return next(path for path in map(named, itertools.count(1)) if not path.exists())


def disk_is_full(path: Path) -> bool:
    """Whether the disk of `path` is full. Some writers report other errors then."""
    return shutil.disk_usage(path.parent).free < 1 << 16


def _raise_if_disk_full(error: Exception, path: Path, part: Path) -> None:
    """Raise the system's error if the disk, a quota or the file-size limit is exhausted: writers report others instead.

    Whether one is, the system says when more is appended to the incomplete file.
    """
    if part.is_file():
        try:
            with part.open("ab") as file:
                file.write(bytes(1 << 16))
        except OSError as limit:
            raise OSError(limit.errno, limit.strerror, str(path)) from error
    if disk_is_full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to; it replaces `path` when the block succeeds, and is deleted otherwise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with open(part, "rb") as written:
            os.fsync(written.fileno())
        if path.is_dir():  # a sharded checkpoint
            os.replace(path, old := path.with_name(f".{path.name}.old"))
            os.replace(part, path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(part, path)
    except (RuntimeError, SafetensorError) as error:
        _raise_if_disk_full(error, path, part)
        raise
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder to write to; it replaces `path` when the block succeeds, and is deleted otherwise.

    A folder cannot be renamed onto one that is not empty. The old folder is renamed first and deleted last, so that a
    complete folder exists at any time: `path`, or `.NAME.old` next to it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part, old = partial_folder(path), path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        os.replace(old, path)  # the last run was killed between the two renames
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
        _raise_if_disk_full(error, path, part)
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def partial_folder(path: Path) -> Path:
    """The folder that `atomic_folder(path)` yields, for other processes that write to it as well."""
    return path.with_name(f".{path.name}.part")


def _remove(path: Path) -> None:
    if path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
