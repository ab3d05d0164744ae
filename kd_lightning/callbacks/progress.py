"""How far a run is: a bar in a terminal, plain lines in a file; and what it has to say meanwhile."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar


def progress() -> ProgressBar:
    """What suits where the output goes."""
    return StepBar() if sys.stdout.isatty() else PlainProgress()


class StepBar(RichProgressBar):
    """Lightning's bar, with the step among all steps in the place of the logger's version."""

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """What stands behind the bar."""
        found = super().get_metrics(trainer, pl_module)
        found.pop("v_num", None)
        return {"step": f"{trainer.global_step}/{trainer.max_steps}", **found} if trainer.max_steps > 0 else found

    def _get_train_description(self, current_epoch: int) -> str:
        if self.trainer.max_epochs is not None and self.trainer.max_epochs > 0:
            return str(super()._get_train_description(current_epoch))
        return f"{f'Epoch {current_epoch}':{len(self.validation_description)}}"


class PlainProgress(ProgressBar):
    """A line on stderr every so many seconds: step, loss, time left.

    Args:
        seconds: between two lines.
    """

    def __init__(self, seconds: float = 10.0) -> None:
        super().__init__()
        self.seconds = seconds
        self._enabled = True
        self._began = self._said = self._validating = 0.0
        self._first = 0

    @property
    def is_enabled(self) -> bool:
        """Whether lines are written."""
        return self._enabled

    def disable(self) -> None:
        """Write no more."""
        self._enabled = False

    def enable(self) -> None:
        """Write again."""
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the time; what is left is told from the second step on, as the first loads, compiles and measures."""
        self._began, self._said = 0.0, time.monotonic()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the time of a validation."""
        self._validating = time.monotonic()
        self._said = self._said or self._validating

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Say how far the validation is."""
        now, total = time.monotonic(), sum(map(float, trainer.num_val_batches))
        if not self._enabled or not trainer.is_global_zero or now - self._said < self.seconds:
            return
        self._said, done = now, batch_idx + 1
        left = (now - self._validating) / done * (total - done)
        print(f"validation {done}/{total:.0f}, {left / 60:.1f} min left", file=sys.stderr, flush=True)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Say how far it is, where the time has come."""
        now = time.monotonic()
        if not self._began:
            self._began, self._first = now, trainer.global_step
        if not self._enabled or not trainer.is_global_zero or now - self._said < self.seconds:
            return
        self._said = now
        total = trainer.estimated_stepping_batches
        done, steps = trainer.global_step - self._first, trainer.global_step
        parts = [f"step {steps}"]
        if total and total != float("inf"):
            parts = [f"step {steps}/{int(total)} ({steps / total:.0%})"]
            if done:
                parts.append(f"{(now - self._began) / done * (total - steps) / 60:.1f} min left")
        for name in ("train/loss", "val/kd"):
            if name in trainer.callback_metrics:
                parts.append(f"{name} {float(trainer.callback_metrics[name]):.3f}")
        print(", ".join(parts), file=sys.stderr, flush=True)
