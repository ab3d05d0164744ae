"""Atomic writes: a file is complete or absent. New content gets a temporary name and is renamed when complete."""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

LIMITS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OS_ERROR = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")  # of Rust and of Python


def first_unused_path(named: Callable[[int], Path]) -> Path:
    """The first of `named(1)`, `named(2)`, … that does not exist."""
    return next(path for path in map(named, itertools.count(1)) if not path.exists())


def disk_is_full(path: Path) -> bool:
    """Whether the disk of `path` is full. Some writers report other errors then."""
    return shutil.disk_usage(path.parent).free < 1 << 16


def exhausted(error: Exception, part: Path) -> int | None:
    """The system's error number if the disk, a quota or the file-size limit is exhausted, else None.

    Some writers report other errors then. The number is in their text, or the system gives it again when more is
    appended to what they have written.

    Args:
        error: what the writer raised.
        part: the incomplete file, or the folder with it, which is deleted later.
    """
    if isinstance(error, OSError):
        return error.errno if error.errno in LIMITS else None
    if (found := OS_ERROR.search(str(error))) and (number := int(found[1] or found[2])) in LIMITS:
        return number
    files = [part] if part.is_file() else [path for path in part.rglob("*") if path.is_file()]
    for path in files:
        try:
            with path.open("ab") as file:
                file.write(bytes(1 << 16))
        except OSError as limit:
            if limit.errno in LIMITS:
                return limit.errno
    return errno.ENOSPC if disk_is_full(part) else None


def _raise_with_path(error: Exception, path: Path, part: Path) -> None:
    """Raise the system's error with the path, if there is one: writers report others, or leave the path out."""
    number = exhausted(error, part)
    if number is None and isinstance(error, OSError) and error.filename is None:
        number = error.errno
    if number is not None:
        raise OSError(number, os.strerror(number), str(path)) from error


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
    except (OSError, RuntimeError, SafetensorError) as error:
        _raise_with_path(error, path, part)
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
    except (OSError, RuntimeError, SafetensorError) as error:
        _raise_with_path(error, path, part)
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
