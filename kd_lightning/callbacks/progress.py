"""Progress of a run: a bar in a terminal, plain lines in a log file."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar


def progress() -> ProgressBar:
    """A bar if stdout is a terminal, else plain lines."""
    return StepBar() if sys.stdout.isatty() else PlainProgress()


class StepBar(RichProgressBar):
    """Lightning's bar, with the step and the number of steps instead of the logger's version."""

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The values shown after the bar."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {"step": f"{trainer.global_step}/{trainer.max_steps}", **metrics} if trainer.max_steps > 0 else metrics

    def _get_train_description(self, current_epoch: int) -> str:
        if self.trainer.max_epochs is not None and self.trainer.max_epochs > 0:
            return str(super()._get_train_description(current_epoch))
        return f"{f'Epoch {current_epoch}':{len(self.validation_description)}}"


class PlainProgress(ProgressBar):
    """A line on stderr every N seconds: step, loss, time left.

    Args:
        seconds: shortest time between two lines.
    """

    def __init__(self, seconds: float = 10.0) -> None:
        super().__init__()
        self.seconds = seconds
        self._enabled = True
        self._start = self._last_line = self._validation_start = 0.0
        self._first = 0

    @property
    def is_enabled(self) -> bool:
        """Whether lines are written."""
        return self._enabled

    def disable(self) -> None:
        """Stop writing lines."""
        self._enabled = False

    def enable(self) -> None:
        """Write lines again."""
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock; the time left is shown from the second step on, as the first one loads and compiles."""
        self._start, self._last_line = 0.0, time.monotonic()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock of a validation."""
        self._validation_start = time.monotonic()
        self._last_line = self._last_line or self._validation_start

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
        *args: object,
    ) -> None:
        """Write the progress of the validation."""
        now, total = time.monotonic(), sum(map(float, trainer.num_val_batches))
        if not self._enabled or not trainer.is_global_zero or now - self._last_line < self.seconds:
            return
        self._last_line, done = now, batch_idx + 1
        left = (now - self._validation_start) / done * (total - done)
        print(f"validation {done}/{total:.0f}, {left / 60:.1f} min left", file=sys.stderr, flush=True)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object) -> None:
        """Write the progress of the run if the last line is old enough."""
        now = time.monotonic()
        if not self._start:
            self._start, self._first = now, trainer.global_step
        if not self._enabled or not trainer.is_global_zero or now - self._last_line < self.seconds:
            return
        self._last_line = now
        total = trainer.estimated_stepping_batches
        done, steps = trainer.global_step - self._first, trainer.global_step
        parts = [f"step {steps}"]
        if total and total != float("inf"):
            parts = [f"step {steps}/{int(total)} ({steps / total:.0%})"]
            if done:
                parts.append(f"{(now - self._start) / done * (total - steps) / 60:.1f} min left")
        for name in ("train/loss", "val/kd"):
            if name in trainer.callback_metrics:
                parts.append(f"{name} {float(trainer.callback_metrics[name]):.3f}")
        print(", ".join(parts), file=sys.stderr, flush=True)
