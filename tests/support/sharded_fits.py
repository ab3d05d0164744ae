"""Fits over gloo ranks, and what they leave joined into one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from kd_lightning.callbacks.export import HFExport
from kd_lightning.distributed.dtensor import full_state_dict
from kd_lightning.strategies import FSDP2Strategy
from tiny_fits import Batch, split


def joined(rank: int, ranks: int) -> None:
    """Tell Lightning which of the processes this is."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    os.environ.update(GROUP_RANK="0", TORCHELASTIC_RUN_ID="test", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


def train(module: Any, batch: Batch, folder: Path, start: Path | None, **settings: Any) -> None:
    """Train on one batch an epoch, from a checkpoint or from nothing, with a checkpoint of each and the export."""
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1), HFExport()],
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
        **settings,
    )
    loader = DataLoader([batch], batch_size=None)
    trainer.fit(module, loader, loader, ckpt_path=start, weights_only=True)


def two_passes(module: Any, batch: Batch, folder: Path, strategy: Any, rank: int, ranks: int) -> dict[str, Tensor]:
    """The whole student after two steps on eight rows, of which the first of two ranks has five."""
    part = split(batch, *{1: [8], 2: [5, 3]}[ranks])[rank]
    train(module, part, folder, None, devices=ranks, strategy=strategy, max_epochs=2)
    return full_state_dict(module.student)


def strategies() -> dict[str, Any]:
    """How Lightning spreads a run over ranks, by name."""
    return {"ddp": "ddp", "fsdp2": FSDP2Strategy()}


def assert_ranks_are_one_process(found: list[dict[str, dict[str, Tensor]]], one: dict[str, Tensor]) -> None:
    """The students of every rank and strategy are that of one process.

    Args:
        found: of each rank, the whole student by the name of the strategy.
        one: of one process.
    """
    for states in found:
        for kind, state in states.items():
            for name, x in one.items():
                torch.testing.assert_close(state[name], x, atol=2e-5, rtol=0, msg=f"{kind} {name}")
