"""Responses of `predict`, saved in the run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as L
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from kd_lightning.atomic_io import atomic_file
from kd_lightning.callbacks.base import required_datamodule
from kd_lightning.distributed.collectives import all_gather_objects


@runtime_checkable
class GeneratesResponses(Protocol):
    """A module whose `predict_step` generates responses of at most so many tokens."""

    def set_max_new_tokens(self, max_new_tokens: int) -> None:
        """Set the longest response, in tokens."""


class Predictions(L.Callback):
    """Write `ROOT/predictions.jsonl` after `predict`: each test row with its `response`, in file order.

    Args:
        max_new_tokens: longest response of `predict`, at least 1; a log line counts the responses that were cut.

    Raises:
        ValueError: `max_new_tokens` is below 1.

    Examples:
        >>> from kd_lightning.callbacks import Predictions
        >>> predictions = Predictions(max_new_tokens=64)  # for Trainer(callbacks=[...]); `Trainer.predict` fills it
        >>> predictions.responses
        {}
    """

    def __init__(self, max_new_tokens: int = 32) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"predictions.max_new_tokens must be at least 1, got {max_new_tokens}")
        self.max_new_tokens = max_new_tokens
        self.responses: dict[int, str] = {}
        self.unfinished: set[int] = set()

    def on_predict_start(self, trainer: Trainer, pl_module: L.LightningModule) -> None:
        """Set the longest response; a custom module decides itself."""
        if isinstance(pl_module, GeneratesResponses):
            pl_module.set_max_new_tokens(self.max_new_tokens)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: L.LightningModule, outputs: Any, batch: object, batch_idx: int, *args: object
    ) -> None:
        """Keep this batch's responses as text."""
        texts = required_datamodule(trainer, "Predictions").tokenizer.batch_decode(
            outputs["responses"], skip_special_tokens=True
        )
        row_ids = outputs["row_ids"].tolist()
        self.responses |= dict(zip(row_ids, texts, strict=True))
        finished = outputs["finished"].tolist()
        self.unfinished |= {row_id for row_id, ended in zip(row_ids, finished, strict=True) if not ended}

    def on_predict_end(self, trainer: Trainer, pl_module: L.LightningModule) -> None:
        """Gather the ranks' responses and write them."""
        gathered = all_gather_objects((self.responses, self.unfinished), trainer.world_size)
        if not trainer.is_global_zero:
            return
        responses = {row_id: text for texts, _ in gathered for row_id, text in texts.items()}
        unfinished = set().union(*(row_ids for _, row_ids in gathered))
        path = Path(trainer.default_root_dir) / "predictions.jsonl"
        with atomic_file(path) as part, part.open("w", encoding="utf-8") as lines:
            for row in required_datamodule(trainer, "Predictions").generation_rows("test"):
                if row["index"] in responses:
                    fields = {**row["row"], "response": responses[row["index"]].strip()}
                    lines.write(json.dumps(fields, ensure_ascii=False) + "\n")
        rank_zero_info(f"responses written to {path}")
        if unfinished:
            rank_zero_info(
                f"{len(unfinished)} of {len(responses)} responses were cut at {self.max_new_tokens} tokens: raise "
                "--predictions.max_new_tokens for complete ones"
            )
