"""A teacher behind a server over two gloo ranks: each asks for its own rows, and a step is that of one process."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import processes
import runs
from kd_lightning import DistillationModule
from kd_lightning.data import InstructionDataModule
from kd_lightning.distributed.dtensor import full_state_dict
from kd_lightning.teachers.served import ServerTeacher
from scoring_server import ScoringServer
from sharded_fits import assert_ranks_are_one_process, joined, strategies
from tiny_fits import fit_data

SGD = functools.partial(torch.optim.SGD, lr=0.1)


def trained(folder: Path, url: str, data: str, strategy: Any, ranks: int = 1) -> dict[str, Tensor]:
    """Weights after the 24 rows, three steps of eight."""
    module = DistillationModule("asset:student", ServerTeacher(url, top_k=8), ce_weight=0.2, optimizer=SGD)
    rows = InstructionDataModule(
        data, tokenizer="asset:student", batch_size=8 // ranks, max_length=96, shuffle=False, group_by_length=False
    )
    settings = {"devices": ranks, "strategy": strategy, "default_root_dir": folder, "use_distributed_sampler": False}
    fit_data(module, rows, steps=3, seed=0, **settings)
    return full_state_dict(module.student)


def on_two_ranks(rank: int, folder: str, url: str, data: str) -> dict[str, dict[str, Tensor]]:
    joined(rank, 2)
    return {kind: trained(Path(folder) / kind, url, data, strategy, 2) for kind, strategy in strategies().items()}


@pytest.mark.slow
def test_two_ranks_are_one_process(tmp_path: Path) -> None:
    data = str(runs.little_data(tmp_path, rows=24))
    with ScoringServer() as server:
        found = processes.run(on_two_ranks, str(tmp_path / "two"), server.url, data)
        prompts = [tuple(body["prompt"]) for body in server.bodies]
        one = trained(tmp_path / "one", server.url, data, "auto")
        rows = {tuple(body["prompt"]) for body in server.bodies[-16:]}  # those of the last two steps
    counts = [prompts.count(row) for row in rows]
    assert len(rows) == 16
    assert counts.count(2) >= 8  # once in each run; the others are also in the tests at the start
    assert min(counts) == 2
    assert_ranks_are_one_process(found, one)
