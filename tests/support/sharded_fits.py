"""Fits over gloo ranks, and what they leave joined into one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from kd_lightning.callbacks.export import HFExport
from tiny_fits import Batch


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
