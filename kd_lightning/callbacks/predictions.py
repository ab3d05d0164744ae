"""Responses of `predict`, saved in the run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from kd_lightning.atomic_io import atomic_file
from kd_lightning.callbacks.run_config import _datamodule
from kd_lightning.distributed.collectives import all_gather_objects


class Predictions(L.Callback):
    """Write `ROOT/predictions.jsonl` after `predict`: each test row with its `response`, in file order."""

    def __init__(self) -> None:
        self.responses: dict[int, str] = {}

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Keep this batch's responses as text."""
        texts = _datamodule(trainer).tokenizer.batch_decode(outputs["responses"], skip_special_tokens=True)
        self.responses |= dict(zip(outputs["row_ids"].tolist(), texts, strict=True))

    def on_predict_end(self, trainer: Trainer, pl_module: L.LightningModule) -> None:
        """Gather the ranks' responses and write them."""
        found = all_gather_objects(self.responses, trainer.world_size)
        if not trainer.is_global_zero:
            return
        responses = {row_id: text for part in found for row_id, text in part.items()}
        path = Path(trainer.default_root_dir) / "predictions.jsonl"
        with atomic_file(path) as part, part.open("w", encoding="utf-8") as lines:
            for row in _datamodule(trainer).generation_rows("test"):
                if row["index"] in responses:
                    fields = {**row["row"], "response": responses[row["index"]].strip()}
                    lines.write(json.dumps(fields, ensure_ascii=False) + "\n")
        rank_zero_info(f"responses written to {path}")
