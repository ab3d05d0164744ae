"""SHA-256 checksums next to checkpoints: `NAME.sha256` of a file, and one per file of a folder.

A checksum file has the format of `sha256sum`. While a checkpoint is replaced it lists the old and the new content, so
that whichever is there after an interruption is accepted.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from kd_lightning.atomic_io import atomic_file

SUFFIX = ".sha256"


def sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum_path(path: Path) -> Path:
    """The checksum file of a checkpoint file; a symbolic link has that of its target."""
    path = path.resolve()
    return path.with_name(path.name + SUFFIX)


def recorded(path: Path) -> list[str]:
    """The checksums that a file may have; empty if none is recorded."""
    try:
        lines = checksum_path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [line.split()[0] for line in lines if line.split()] or [""]


def announce(path: Path, digest: str) -> None:
    """Accept the content that is about to replace a file as well as the present one.

    A file without a checksum keeps having none until it is replaced.
    """
    if path.is_file() and (accepted := recorded(path)):
        _write(path, [*accepted, digest])


def record(path: Path, digest: str) -> None:
    """Accept this content of a file only."""
    _write(path, [digest])


def _write(path: Path, digests: list[str]) -> None:
    with atomic_file(checksum_path(path)) as part:
        part.write_text("".join(f"{digest}  {path.name}\n" for digest in digests), encoding="utf-8")


def checkpoint_files(path: Path) -> list[Path]:
    """The files of a checkpoint, in the order of their names; of a file, itself."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.iterdir() if file.is_file() and file.suffix != SUFFIX)


def check_checksums(path: Path) -> None:
    """Compare a checkpoint with its checksums; report a checkpoint that has none.

    Args:
        path: a file, or the folder of a sharded checkpoint.

    Raises:
        ValueError: a file does not have the content that was saved.
    """
    files = checkpoint_files(path)
    unchecked = [file for file in files if not recorded(file)]
    for file in files:
        accepted = recorded(file)
        if accepted and sha256(file) not in accepted:
            raise ValueError(
                f"{file} is damaged: it is not what was saved (its SHA-256 differs from {checksum_path(file).name}): "
                "resume from another checkpoint"
            )
    if unchecked:
        rank_zero_info(f"{path} has no checksum ({checksum_path(unchecked[0]).name}): loaded without checking it")
