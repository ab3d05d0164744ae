"""Reading and writing of checkpoints, as files and as folders."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from kd_lightning.atomic_io import atomic_file
from kd_lightning.distributed.checksum import announce, check_checksums, checksum_path, record, sha256
from kd_lightning.distributed.sharded_checkpoint import META, ShardReader

REQUIRED_KEYS = ("state_dict", "loops", "global_step", "pytorch-lightning_version")
KINDS: dict[str, type] = {"state_dict": Mapping, "loops": Mapping, "global_step": int, "pytorch-lightning_version": str}
FOREIGN_OBJECT = re.compile(r"GLOBAL ([A-Za-z_][\w.]{0,199})")


class ResizableState(ABC):
    """An `nn.Module` whose state changes its shapes during training; a strategy resizes it before it loads a state."""

    @abstractmethod
    def resize_to(self, state: Mapping[str, Tensor]) -> None:
        """Allocate buffers with the names and shapes of a state.

        Args:
            state: tensors by their names in this module.
        """


def open_checkpoint(path: str | Path, check: bool = True) -> dict[str, Any]:
    """A checkpoint with its tensors memory-mapped. Objects other than tensors and plain values are refused.

    In the checkpoint of a folder, sharded tensors are empty (meta) tensors: read them with a `ShardReader`.

    Args:
        path: a file, or the folder of a sharded checkpoint.
        check: compare the content with its checksum; that reads all of it.

    Raises:
        ValueError: it is not a checkpoint of a training run, or it is damaged.
    """
    file = Path(path) / META if Path(path).is_dir() else Path(path)
    return _checked(path, lambda: torch.load(file, map_location="cpu", weights_only=True, mmap=True), check)


def _checked(path: str | Path, load: Callable[[], dict[str, Any]], check: bool = True) -> dict[str, Any]:
    """The result of `load`, if it is a checkpoint of a training run with the content that was saved."""
    if check and Path(path).exists():  # Lightning also reads addresses such as s3://, which have no checksum file
        check_checksums(Path(path))
    try:
        checkpoint = load()
    except (MemoryError, torch.OutOfMemoryError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # damaged bytes raise whatever the pickle machine meets first
        raise ValueError(f"{path} is not a checkpoint that can be read safely: {_reason(error, Path(path))}") from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(
            f"{path} is not a checkpoint of a training run: it holds a {type(checkpoint).__name__} instead of a dict"
        )
    if missing := [key for key in REQUIRED_KEYS if key not in checkpoint]:
        raise ValueError(f"{path} is not a checkpoint of a training run: the key {missing[0]!r} is missing")
    return checkpoint


def _reason(error: Exception, path: Path) -> str:
    """Why a file cannot be read, without torch's advice to load it unsafely."""
    if path.is_file() and path.stat().st_size == 0:
        return "the file is empty"
    if found := FOREIGN_OBJECT.search(str(error)):
        return f"it holds objects other than tensors and plain values ({found[1]}), which can run code"
    return "it is damaged, incomplete, or of another format"


def check_resumable(path: Path) -> None:
    """Check that training can be resumed from a checkpoint, by its keys; the tensors are not read.

    A folder without the metadata of a sharded checkpoint belongs to another strategy and is not checked.

    Raises:
        ValueError: it is not the checkpoint of a training run, or it holds weights only.
    """
    if path.is_dir() and not (path / META).exists():
        return
    checkpoint = open_checkpoint(path, check=False)
    for key, kind in KINDS.items():
        if not isinstance(checkpoint[key], kind):
            raise ValueError(
                f"{path} is not a checkpoint of a training run: {key!r} is a {type(checkpoint[key]).__name__}"
            )
    if "optimizer_states" not in checkpoint:
        raise ValueError(f"{path} holds weights only: pass a checkpoint that was saved with the optimizer's state")


def newest_checkpoint(folder: Path, resume: bool) -> Path | None:
    """The newest checkpoint of a run that was written completely; None if there is none.

    Files are written under a temporary name and renamed when complete, so what has the suffix `.ckpt` is complete.
    `best.ckpt`, which the export writes, holds weights only and is left out.

    Args:
        folder: `ROOT/checkpoints`.
        resume: leave out other checkpoints that hold weights only, too.

    Raises:
        ValueError: the newest one is damaged.
    """
    found = [path for path in folder.glob("*.ckpt") if not path.name.startswith(".") and path.name != "best.ckpt"]
    newest = sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name.startswith("last")), reverse=True)
    for number, path in enumerate(newest):
        try:
            if resume:
                check_resumable(path)
        except ValueError as error:
            older = f" (the one before it is {newest[number + 1]})" if number + 1 < len(newest) else ""
            if "holds weights only" in str(error) and older:
                continue
            raise ValueError(f"{error}{older}") from error
        return path
    return None


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written atomically with a checksum; also reads the folders of sharded checkpoints.

    The new file is written next to the old one and renamed. (Lightning goes through the system's temporary folder: on
    another disk, a move from there is a copy.)

    Args:
        weights_only: load tensors and plain values only, also where `weights_only=False` is asked for: other objects
            can run code.
    """

    def __init__(self, weights_only: bool = True) -> None:
        super().__init__()
        self.weights_only = weights_only

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write `checkpoint` to `path`, and its checksum; an existing file is replaced when the new one is complete."""
        path = Path(path)
        with atomic_file(path) as part:
            torch.save(checkpoint, part)
            digest = sha256(part)
            announce(path, digest)
        record(path, digest)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint and its checksum."""
        super().remove_checkpoint(path)
        if not Path(path).is_symlink():
            checksum_path(Path(path)).unlink(missing_ok=True)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = None,
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """Read a file or a folder.

        Raises:
            ValueError: it is not a checkpoint of a training run, or it is damaged.
        """
        if Path(path).is_dir():
            return ShardReader(Path(path)).load_full(open_checkpoint(path))
        load, safe = super().load_checkpoint, self.weights_only or weights_only is not False
        return _checked(path, lambda: load(path, map_location=map_location, weights_only=safe))


def install_checkpoint_io(strategy: Strategy) -> None:
    """Let a strategy with Lightning's default checkpoint IO also read sharded checkpoints and write atomically.

    Call it before the checkpoint is read, such as in `setup`. A checkpoint IO that the user has chosen is kept, and so
    is an explicit `weights_only=False`.
    """
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicCheckpointIO(weights_only=False)
