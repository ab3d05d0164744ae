"""Reading and writing of checkpoints, as files and as folders."""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from kd_lightning.atomic_io import atomic_file
from kd_lightning.distributed.sharded_checkpoint import META, ShardReader

REQUIRED_KEYS = ("state_dict", "loops", "global_step", "pytorch-lightning_version")


class ResizableState(ABC):
    """An `nn.Module` whose state changes its shapes during training; a strategy resizes it before it loads a state."""

    @abstractmethod
    def resize_to(self, state: Mapping[str, Tensor]) -> None:
        """Allocate buffers with the names and shapes of a state.

        Args:
            state: tensors by their names in this module.
        """


def open_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint with its tensors memory-mapped. Objects other than tensors and plain values are refused.

    In the checkpoint of a folder, sharded tensors are empty (meta) tensors: read them with a `ShardReader`.

    Raises:
        ValueError: it is not a checkpoint of a training run.
    """
    file = Path(path) / META if Path(path).is_dir() else Path(path)
    return _checked(path, lambda: torch.load(file, map_location="cpu", weights_only=True, mmap=True))


def _checked(path: str | Path, load: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of `load`, if it is a checkpoint of a training run."""
    try:
        checkpoint = load()
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not a checkpoint that can be read safely: {reason}") from error
    if missing := [key for key in REQUIRED_KEYS if key not in checkpoint]:
        raise ValueError(f"{path} is not a checkpoint of a training run: the key {missing[0]!r} is missing")
    return checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written atomically; also reads the folders of sharded checkpoints.

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
        """Write `checkpoint` to `path`; an existing file is replaced when the new one is complete."""
        with atomic_file(path) as part:
            torch.save(checkpoint, part)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = None,
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """Read a file or a folder.

        Raises:
            ValueError: it is not a checkpoint of a training run.
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
