"""Lightning's ModelCheckpoint with this package's folder and interrupt handling."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as L
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from kd_lightning.distributed.trainer import is_fast_dev_run

Handler = Callable[[int, FrameType | None], object] | int | None


class RunCheckpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint` with its folder at `ROOT/checkpoints`; `last` is also saved at the end of training.

    Ctrl-C and SIGTERM (in a run with one process) finish the current step and save `last`; a second one aborts at once.
    After SIGTERM, which schedulers send, the exit status is 143.

    Args:
        save_last: also keep the newest state as `last.ckpt`.
        kwargs: the other arguments of `ModelCheckpoint`.
    """

    def __init__(self, save_last: bool | None = True, **kwargs: Any) -> None:
        super().__init__(save_last=save_last, **kwargs)
        self._previous_handlers: dict[int, Handler] = {}
        self._interrupted: int | None = None  # the signal
        self._last_step = 0
        self._window_open = False  # the last micro-batch did not end its accumulation window
        self._save_due = False  # a validation inside of a window: its checkpoint is saved after the step

    def setup(self, trainer: Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Set the folder, then call Lightning's own `setup`."""
        if self.dirpath is None:
            self.dirpath = str(checkpoint_folder(trainer))
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: L.LightningModule) -> None:
        """Handle signals, with one process only: ranks that stop at different steps would wait for each other."""
        super().on_train_start(trainer, pl_module)
        self._interrupted, self._last_step = None, trainer.global_step
        if self.save_last and trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous_handlers[number] = signal.signal(number, self._interrupt)

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        self._restore_handlers()  # so that a second Ctrl-C aborts
        self._interrupted = signum
        rank_zero_info("Interrupted: finishing this step and saving last.ckpt (press Ctrl-C again to abort)")

    def _restore_handlers(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        """Save what is due; after Ctrl-C save `last` once the optimizer has stepped, and stop."""
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)
        stepped, self._last_step = trainer.global_step > self._last_step, trainer.global_step
        self._window_open = not stepped
        if stepped and self._save_due:
            self._save_due = False
            super().on_validation_end(trainer, pl_module)
        if self._interrupted is not None and stepped:
            if not is_fast_dev_run(trainer):
                self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
                rank_zero_info(
                    f"Saved step {trainer.global_step} to {self.last_model_path}: resume with --ckpt_path last"
                )
            raise SystemExit(128 + signal.SIGTERM) if self._interrupted == signal.SIGTERM else KeyboardInterrupt

    def on_validation_end(self, trainer: Trainer, pl_module: L.LightningModule) -> None:
        """Save what is due; inside of an accumulation window after its step, as checkpoints hold no gradients."""
        self._save_due = self._window_open and trainer.state.fn == "fit" and not trainer.sanity_checking
        if not self._save_due:
            super().on_validation_end(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the previous handlers of the signals."""
        self._restore_handlers()
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restore the previous handlers of the signals."""
        self._restore_handlers()
        super().on_exception(trainer, pl_module, exception)

    def on_train_end(self, trainer: Trainer, pl_module: L.LightningModule) -> None:
        """Save `last` for the final step if no trigger has."""
        if self.save_last and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


def checkpoint_folder(trainer: Trainer) -> Path:
    """`ROOT/checkpoints`."""
    return Path(trainer.default_root_dir).absolute() / "checkpoints"
