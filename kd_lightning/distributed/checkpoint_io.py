"""Reading and writing checkpoint files and folders."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from kd_lightning.atomic_io import atomic_file
from kd_lightning.distributed.sharded_checkpoint import META, ShardReader

NEEDED = ("state_dict", "loops", "global_step", "pytorch-lightning_version")


def open_checkpoint(path: str | Path) -> dict[str, Any]:
    """Tensors and plain values of a checkpoint, mapped rather than read; anything else in it is refused.

    In a folder, the tensors that were sharded are empty (meta) ones: `Pieces` reads them.

    Raises:
        ValueError: it is no checkpoint of a run.
    """
    place = Path(path) / META if Path(path).is_dir() else Path(path)
    return _checked(path, lambda: torch.load(place, map_location="cpu", weights_only=True, mmap=True))


def _checked(path: str | Path, load: Callable[[], Any]) -> dict[str, Any]:
    """What `load` gives, where that is a checkpoint of a run."""
    try:
        checkpoint: dict[str, Any] = load()
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is no checkpoint that can be read safely: {reason}") from error
    if missing := [key for key in NEEDED if key not in checkpoint]:
        raise ValueError(f"{path} is no checkpoint of a run: it has no {missing[0]!r}")
    return checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written beside their place and renamed; read with `weights_only=True` alone.

    Lightning goes through the system's temporary folder, which may lie on another disk, where a rename is a copy.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write `checkpoint` to `path`; a file already there stays whole until the new one is."""
        with atomic_file(path) as part:
            torch.save(checkpoint, part)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Read a file or a folder; anything but tensors and plain values is refused, whatever `weights_only` says.

        Raises:
            ValueError: it is no checkpoint of a run.
        """
        if Path(path).is_dir():
            whole: dict[str, Any] = ShardReader(Path(path)).whole(open_checkpoint(path))
            return whole
        load = super().load_checkpoint
        return _checked(path, lambda: load(path, map_location=map_location, weights_only=True))
