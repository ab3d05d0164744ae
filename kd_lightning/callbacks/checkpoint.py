"""Lightning's ModelCheckpoint with this package's folder and interrupt handling."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from kd_lightning.distributed.trainer import is_fast_dev_run


class RunCheckpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint` with its folder at `ROOT/checkpoints`, and `last` always written, also at the end.

    At Ctrl-C (in one process) the step under way is finished and `last` written; the second one waits for nothing.

    Args:
        save_last: also keep the newest state as `last.ckpt`.
        kwargs: `ModelCheckpoint`'s other arguments.
    """

    def __init__(self, save_last: bool | None = True, **kwargs: Any) -> None:
        super().__init__(save_last=save_last, **kwargs)
        self._handler: Any = None
        self._interrupted = False
        self._stepped = 0
        self._open = self._late = False

    def setup(self, trainer: Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Settle the folder, then Lightning's own set-up."""
        if self.dirpath is None:
            self.dirpath = str(checkpoint_folder(trainer))
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: L.LightningModule) -> None:
        """Listen for Ctrl-C; ranks that stop at different steps would wait for each other."""
        super().on_train_start(trainer, pl_module)
        self._interrupted, self._stepped = False, trainer.global_step
        if self.save_last and trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, *_: Any) -> None:
        self._unlisten()  # the next one stops at once
        self._interrupted = True
        rank_zero_info("Ctrl-C: this step is finished and last.ckpt written; once more stops at once")

    def _unlisten(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        """Write what is due; after Ctrl-C write `last` once the optimizer has stepped, and stop."""
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)
        stepped, self._stepped = trainer.global_step > self._stepped, trainer.global_step
        self._open = not stepped
        if stepped and self._late:
            self._late = False
            super().on_validation_end(trainer, pl_module)
        if self._interrupted and stepped:
            if not is_fast_dev_run(trainer):
                self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
                rank_zero_info(f"{self.last_model_path} is step {trainer.global_step}: go on with --ckpt_path last")
            raise KeyboardInterrupt

    def on_validation_end(self, trainer: Trainer, pl_module: L.LightningModule) -> None:
        """Write what is due; within an accumulation window only once it has stepped: no file holds its gradients."""
        self._late = self._open and trainer.state.fn == "fit" and not trainer.sanity_checking
        if not self._late:
            super().on_validation_end(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Listen no more."""
        self._unlisten()
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Listen no more."""
        self._unlisten()
        super().on_exception(trainer, pl_module, exception)

    def on_train_end(self, trainer: Trainer, pl_module: L.LightningModule) -> None:
        """Write `last` for the final step where no trigger has."""
        if self.save_last and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


def checkpoint_folder(trainer: Trainer) -> Path:
    """`ROOT/checkpoints`."""
    return Path(trainer.default_root_dir).absolute() / "checkpoints"
