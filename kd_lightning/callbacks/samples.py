"""Generated responses that a run trains on, as text in TensorBoard."""

from __future__ import annotations

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kd_lightning.callbacks.tensorboard import summary_writers
from kd_lightning.constants import IGNORE_INDEX, SOURCES
from kd_lightning.data.base import tokenizer_of
from kd_lightning.reporting.markdown import markdown_table
from kd_lightning.training.base import StudentTeacherModule

Batch = dict[str, Tensor]


class Samples(L.Callback):
    """Show prompts and generated responses of a training batch as text in TensorBoard, every N steps.

    Generated responses are those of a response source, both of a contrastive pair, and the teacher's in SeqKD. With
    responses from the data alone, or with another logger, the callback does nothing.

    Args:
        every_n_steps: optimizer steps between two tables; 0: never.
        rows: largest number of rows in a table, at least 1.

    Raises:
        ValueError: an argument is out of range.

    Examples:
        >>> from kd_lightning.callbacks import Samples
        >>> samples = Samples(every_n_steps=100, rows=2)  # for Trainer(callbacks=[...])
        >>> samples.every_n_steps
        100
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
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        """Show what was trained on, once per period: as soon as there is a generated batch."""
        period = trainer.global_step // self.every_n_steps if self.every_n_steps else self._shown
        if period == self._shown:
            return
        shown: Batch | None = batch
        if isinstance(pl_module, StudentTeacherModule) and pl_module.generates_responses:
            shown = pl_module.take_generated_batch()
        if shown is None:
            return
        self._shown = period
        writers, tokenizer = summary_writers(trainer), tokenizer_of(trainer)
        if not writers or tokenizer is None or "source" not in shown:
            return
        if cells := generated_rows(shown, tokenizer, self.rows):
            table = markdown_table(["prompt", "who", "response", "tokens"], cells)
            for writer in writers:
                writer.add_text("trained on", table, trainer.global_step)


def generated_rows(batch: Batch, tokenizer: PreTrainedTokenizerBase, count: int) -> list[list[str]]:
    """Prompt, source, response and its number of tokens, of the first rows whose response a model generated.

    Args:
        batch: a training batch with the column `source`.
        tokenizer: the tokenizer of the batch.
        count: largest number of rows.
    """
    labels = batch["labels"]
    labeled = labels != IGNORE_INDEX
    chosen = torch.nonzero((batch["source"] > 0) & labeled.any(1)).flatten()[:count].tolist()
    rows = []
    for row in chosen:
        first = int(labeled[row].int().argmax())
        prompt = batch["input_ids"][row, :first][batch["attention_mask"][row, :first].bool()]
        response = labels[row][labeled[row]]
        texts = [
            " ".join(str(tokenizer.decode(ids.tolist(), skip_special_tokens=True)).split())
            for ids in (prompt, response)
        ]
        rows.append([texts[0], SOURCES[int(batch["source"][row])], texts[1], str(len(response))])
    return rows
