"""Run a function in several processes joined by gloo, for the tests where a rank matters."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(minutes=3)  # a rank that waits for one that has died: an error, not a hang


def run(function: Callable[..., Any], *args: Any, world_size: int = 2) -> list[Any]:
    """What `function(rank, *args)` returns on each rank, in the order of ranks.

    Args:
        function: at the top level of its module; processes are spawned, and find it by name.
        args: the same on every rank.
        world_size: how many processes.

    Returns:
        What each rank returned: tensors, numbers, strings, and lists and dicts of them.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank failed; with that rank's traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (function, args, world_size, folder), nprocs=world_size)
        return [torch.load(_result(folder, rank), weights_only=True) for rank in range(world_size)]


def _result(folder: str, rank: int) -> Path:
    return Path(folder) / f"{rank}.pt"


def _rank(rank: int, function: Callable[..., Any], args: tuple[Any, ...], world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a machine without network may not know its own name
    # A file, not a port: two tests at once cannot meet in it.
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size, timeout=TIMEOUT
    )
    try:
        torch.save(function(rank, *args), _result(folder, rank))
    finally:
        dist.destroy_process_group()
