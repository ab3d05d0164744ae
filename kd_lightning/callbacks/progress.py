"""Progress of a run: a bar in a terminal, plain lines in a log file."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from tqdm.contrib.logging import logging_redirect_tqdm  # type: ignore[import-untyped]

from kd_lightning.console import terminal_bar


def progress() -> ProgressBar:
    """A bar if stdout is a terminal, else plain lines."""
    return StepBar() if sys.stdout.isatty() else PlainProgress()


class StepBar(TQDMProgressBar):
    """Lightning's bars with the step among all steps, in the style of `console.progress_bar` and in the same terminal.

    Log messages are printed above the bars. A bar of validation disappears when it is done; that of training is closed
    before the results table.
    """

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._messages = ExitStack()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Print log messages above the bars."""
        super().setup(trainer, pl_module, stage)
        self._messages.close()
        loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "kd_lightning")]
        self._messages.enter_context(logging_redirect_tqdm([logger for logger in loggers if logger.handlers]))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Print log messages as before."""
        self._messages.close()
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close the bars, so that what is printed next stands below them."""
        for bar in (self._train_progress_bar, self._val_progress_bar):
            if bar is not None:
                bar.close()
        self._messages.close()
        super().on_exception(trainer, pl_module, exception)

    def init_sanity_tqdm(self) -> Tqdm:
        """The bar of the validation before training."""
        return self._bar(self.sanity_check_description, leave=False)

    def init_train_tqdm(self) -> Tqdm:
        """The bar of training."""
        return self._bar(self.train_description, leave=True)

    def init_validation_tqdm(self) -> Tqdm:
        """The bar of a validation."""
        return self._bar(self.validation_description, leave=self.trainer.state.fn == "validate")

    def init_test_tqdm(self) -> Tqdm:
        """The bar of `test`."""
        return self._bar(self.test_description, leave=True)

    def init_predict_tqdm(self) -> Tqdm:
        """The bar of `predict`."""
        return self._bar(self.predict_description, leave=True)

    def _bar(self, description: str, leave: bool) -> Tqdm:
        return Tqdm(desc=description, leave=leave, disable=self.is_disabled, **terminal_bar())

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The values shown after the bar."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {"step": f"{trainer.global_step}/{trainer.max_steps}", **metrics} if trainer.max_steps > 0 else metrics


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
