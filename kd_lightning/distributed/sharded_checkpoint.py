"""Checkpoints as folders: each rank writes its rows of every tensor; any number of ranks can read them.

A folder holds `meta.pt`, the checkpoint with an empty (meta) tensor for every sharded one, and one safetensors file per
rank. The metadata of each file gives the first row of its pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from kd_lightning.distributed.checksum import record, sha256
from kd_lightning.distributed.dtensor import is_first_replica, local_shard, row_range

META = "meta.pt"


def map_tensors(tree: Any, leaf: Callable[[str, Tensor], Any], path: str = "") -> Any:
    """A copy of nested dicts, lists and tuples with `leaf(path, tensor)` for every tensor."""
    if isinstance(tree, Tensor):
        return leaf(path, tree)
    if isinstance(tree, dict):
        return {key: map_tensors(value, leaf, f"{path}/{key}") for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)([map_tensors(value, leaf, f"{path}/{i}") for i, value in enumerate(tree)])
    return tree


def write_rank_file(checkpoint: dict[str, Any], folder: Path, rank: int) -> None:
    """Write the shards of this rank with a checksum; rank 0 also writes everything that is not sharded.

    Args:
        checkpoint: the same on every rank but for the shards.
        folder: exists and is empty.
        rank: of this process.
    """
    pieces: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    names: dict[tuple[int, int], str] = {}  # tied tensors are one piece under two names

    def leaf(path: str, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        start, stop = row_range(tensor)
        if is_first_replica(tensor) and stop > start:
            piece = local_shard(tensor).detach().cpu().contiguous()
            name = names.setdefault((piece.data_ptr(), piece.numel()), path)
            pieces[name], metadata[path] = piece, f"{start} {name}"
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    rest = map_tensors(checkpoint, leaf)
    if pieces:  # a rank that holds only replicas of other ranks' rows has none
        save_file(pieces, file := folder / f"rank-{rank:05d}.safetensors", metadata=metadata)
        record(file, sha256(file))
    if rank == 0:
        torch.save(rest, folder / META)
        record(folder / META, sha256(folder / META))


@dataclass(frozen=True)
class _Piece:
    """Rows of one tensor in one file."""

    start: int
    name: str
    file: safe_open

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop`, counted from the first row of the piece."""
        rows: Tensor = self.file.get_slice(self.name)[start:stop]  # type: ignore[no-untyped-call]
        return rows

    @property
    def stop(self) -> int:
        """The row after the last one."""
        return self.start + int(self.file.get_slice(self.name).get_shape()[0])  # type: ignore[no-untyped-call]


class ShardReader:
    """Reads rows of the tensors in the folder of a sharded checkpoint.

    Args:
        folder: the checkpoint.

    Raises:
        ValueError: a file of the folder is corrupt.
    """

    def __init__(self, folder: Path) -> None:
        self._pieces: dict[str, list[_Piece]] = {}
        for path in sorted(folder.glob("rank-*.safetensors")):
            try:
                file = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path} is corrupt, it is not a shard of a checkpoint: {error}") from error
            for tensor, location in (file.metadata() or {}).items():  # type: ignore[no-untyped-call]
                start, name = location.split(" ", 1)
                self._pieces.setdefault(tensor, []).append(_Piece(int(start), name, file))

    def read(self, path: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the tensor at `path`.

        Raises:
            ValueError: no file has some of them.
        """
        found = []
        at = start
        for piece in sorted(self._pieces.get(path, []), key=lambda piece: piece.start):
            last = piece.stop
            if piece.start <= at < min(last, stop):
                found.append(piece.rows(at - piece.start, min(last, stop) - piece.start))
                at = min(last, stop)
        if at < stop:
            raise ValueError(f"the checkpoint is incomplete: no file has rows {at} to {stop} of {path}")
        return torch.cat(found)

    def load_full(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """The checkpoint with every sharded tensor in full."""
        full: dict[str, Any] = map_tensors(
            checkpoint, lambda path, tensor: self.read(path, 0, len(tensor)) if tensor.is_meta else tensor
        )
        return full


def state_dict_mismatches(model: Mapping[str, Tensor], checkpoint: Mapping[str, Tensor]) -> list[str]:
    """Differences between two state dicts in names and shapes, each as the text of an error message."""
    mismatches = [f"missing {name!r}" for name in model if name not in checkpoint]
    mismatches += [f"unexpected {name!r}" for name in checkpoint if name not in model]
    mismatches += [
        f"{name!r} has shape {list(checkpoint[name].shape)} in the checkpoint and {list(tensor.shape)} in the model"
        for name, tensor in model.items()
        if name in checkpoint and checkpoint[name].shape != tensor.shape
    ]
    return mismatches
