"""What a run trains on, to be read, where a model wrote it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from kd_lightning.callbacks.tensorboard import summary_writers
from kd_lightning.constants import IGNORE_INDEX, SOURCES
from kd_lightning.data.base import tokenizer_of
from kd_lightning.reporting.figures import markdown_table
from kd_lightning.training.base import StudentTeacherModule


class Samples(L.Callback):
    """Show prompts and responses of a batch in TensorBoard's text, every so many steps, where a model wrote them.

    These are the student's own of a source of responses, both of a pair, or the teacher's words in SeqKD. Where people
    wrote all that is trained on, or with another logger, nothing happens.

    Args:
        every_n_steps: optimizer steps between two tables; 0: never.
        rows: of a table, at most.

    Raises:
        ValueError: a number is out of its range.
    """

    def __init__(self, every_n_steps: int = 200, rows: int = 4) -> None:
        if every_n_steps < 0:
            raise ValueError(f"samples.every_n_steps must be at least 0, got {every_n_steps}")
        if rows < 1:
            raise ValueError(f"samples.rows must be at least 1, got {rows}")
        self.every_n_steps = every_n_steps
        self.rows = rows
        self._shown = -1  # the last period of steps that has its table

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show what was trained on, once a period; what a source writes may come later than the period begins."""
        period = trainer.global_step // self.every_n_steps if self.every_n_steps else self._shown
        if period == self._shown:
            return
        if isinstance(pl_module, StudentTeacherModule) and pl_module.generates_responses:
            batch = pl_module.take_generated_batch()
            if batch is None:
                return
        self._shown = period
        boards = summary_writers(trainer)
        tokenizer = tokenizer_of(trainer)
        if not boards or tokenizer is None or "source" not in batch:
            return
        if cells := written_rows(batch, tokenizer, self.rows):
            table = markdown_table(["prompt", "who", "response", "tokens"], cells)
            for writer in boards:
                writer.add_text("trained on", table, trainer.global_step)


def written_rows(batch: dict[str, Tensor], tokenizer: Any, count: int) -> list[list[str]]:
    """Prompt, author, response and its number of tokens, of the first rows that a model wrote.

    Args:
        batch: with `source`.
        tokenizer: of its tokens.
        count: rows at most.
    """
    labels = batch["labels"]
    counted = labels != IGNORE_INDEX
    chosen = torch.nonzero((batch["source"] > 0) & counted.any(1)).flatten()[:count].tolist()
    found = []
    for row in chosen:
        first = int(counted[row].int().argmax())
        prompt = batch["input_ids"][row, :first][batch["attention_mask"][row, :first].bool()]
        response = labels[row][counted[row]]
        texts = [
            " ".join(tokenizer.decode(ids.tolist(), skip_special_tokens=True).split()) for ids in (prompt, response)
        ]
        found.append([texts[0], SOURCES[int(batch["source"][row])], texts[1], str(len(response))])
    return found
