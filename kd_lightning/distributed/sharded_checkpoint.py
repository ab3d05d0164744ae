"""Checkpoints as folders: each rank writes its rows of every tensor, and any number of ranks reads what it needs.

A folder holds `meta.pt`, the checkpoint with an empty (meta) tensor wherever one is sharded, and one safetensors file a
rank, which knows at what row its pieces start.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from kd_lightning.distributed.dtensor import is_first_replica, local_shard, row_range

META = "meta.pt"


def map_tensors(tree: Any, leaf: Callable[[str, Tensor], Any], path: str = "") -> Any:
    """A copy of nested dicts, lists and tuples with `leaf(path, tensor)` in the place of every tensor."""
    if isinstance(tree, Tensor):
        return leaf(path, tree)
    if isinstance(tree, dict):
        return {key: map_tensors(value, leaf, f"{path}/{key}") for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)([map_tensors(value, leaf, f"{path}/{i}") for i, value in enumerate(tree)])
    return tree


def write_rank_file(checkpoint: dict[str, Any], folder: Path, rank: int) -> None:
    """Write what this rank holds of a checkpoint; rank 0 also writes what is not sharded.

    Args:
        checkpoint: the same on every rank but for the shards.
        folder: there already, and empty.
        rank: of this process.
    """
    pieces: dict[str, Tensor] = {}
    places: dict[str, str] = {}
    names: dict[tuple[int, int], str] = {}  # tied tensors are one piece under two names

    def leaf(path: str, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        start, stop = row_range(tensor)
        if is_first_replica(tensor) and stop > start:
            piece = local_shard(tensor).detach().cpu().contiguous()
            name = names.setdefault((piece.data_ptr(), piece.numel()), path)
            pieces[name], places[path] = piece, f"{start} {name}"
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    rest = map_tensors(checkpoint, leaf)
    if pieces:  # a rank whose rows others write too has none
        save_file(pieces, folder / f"rank-{rank:05d}.safetensors", metadata=places)
    if rank == 0:
        torch.save(rest, folder / META)


class ShardReader:
    """Rows of the tensors in a folder that `write_part` has filled.

    Args:
        folder: the checkpoint.

    Raises:
        ValueError: a file in it is broken.
    """

    def __init__(self, folder: Path) -> None:
        self._found: dict[str, list[tuple[int, str, Any]]] = {}  # first row, name, file
        for part in sorted(folder.glob("rank-*.safetensors")):
            try:
                file = safe_open(part, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{part} is no part of a checkpoint: {error}") from error
            for path, place in (file.metadata() or {}).items():  # type: ignore[no-untyped-call]
                start, name = place.split(" ", 1)
                self._found.setdefault(path, []).append((int(start), name, file))

    def read(self, path: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the tensor at `path`.

        Raises:
            ValueError: some of them are in no file.
        """
        parts = []
        at = start
        for first, name, file in sorted(self._found.get(path, []), key=lambda found: found[0]):
            piece = file.get_slice(name)
            last = first + piece.get_shape()[0]
            if first <= at < min(last, stop):
                parts.append(piece[at - first : min(last, stop) - first])
                at = min(last, stop)
        if at < stop:
            raise ValueError(f"the checkpoint is not whole: rows {at} to {stop} of {path} are in none of its files")
        return torch.cat(parts)

    def whole(self, tree: Any) -> Any:
        """The tree with every tensor that was sharded whole."""
        return map_tensors(tree, lambda path, tensor: self.read(path, 0, len(tensor)) if tensor.is_meta else tensor)
