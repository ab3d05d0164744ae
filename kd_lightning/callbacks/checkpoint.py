"""Lightning's ModelCheckpoint with this package's folder and interrupt handling."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from kd_lightning.distributed.signals import SignalHandlers, stop
from kd_lightning.distributed.trainer import (
    is_fast_dev_run,
    is_launched_child,
    position_of,
    replace_original_handlers,
    without_own_sigterm,
)
from kd_lightning.models.openai_client import ServerError


class RunCheckpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint` with its folder at `ROOT/checkpoints`; `last` is also saved at the end of training.

    Ctrl-C and SIGTERM finish the current step, log it, and save `last`. After SIGTERM, which schedulers send, the exit
    status is 143. With several processes it does not matter which of them receive the signal: all stop after the same
    step. A second Ctrl-C aborts at once, and so does a second SIGTERM with one process.

    If a server fails that a run with one process depends on, `last` is saved as it was after the last complete step.

    Args:
        save_last: also keep the newest state as `last.ckpt`.
        kwargs: the other arguments of `ModelCheckpoint`.

    Examples:
        >>> from kd_lightning.callbacks import RunCheckpoint
        >>> checkpoint = RunCheckpoint(monitor="val/ce", save_top_k=2)  # for Trainer(callbacks=[...])
        >>> checkpoint.monitor, checkpoint.save_last
        ('val/ce', True)
    """

    def __init__(self, save_last: bool | None = True, **kwargs: Any) -> None:
        super().__init__(save_last=save_last, **kwargs)
        self._handlers = SignalHandlers(self._interrupt)
        self._ranks = 1
        self._training = False  # the first step has begun
        self._received = 0  # the signal that this process has received; 0: none
        self._stopping = 0  # the signal that ends the run as soon as this step is logged
        self._last_step = 0
        self._window_open = False  # the last micro-batch did not end its accumulation window
        self._position: dict[str, Any] | None = None  # which batch comes after the last complete step
        self._failed = False  # in the steps after that one
        self._save_due = False  # a validation inside of a window: its checkpoint is saved after the step

    def setup(self, trainer: Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Set the folder, then call Lightning's own `setup`."""
        if self.dirpath is None:
            self.dirpath = str(checkpoint_folder(trainer))
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.save_last:
            self._ranks, self._training, self._received, self._stopping = trainer.world_size, False, 0, 0
            without_own_sigterm(trainer)
            self._handlers.install()

    def on_train_start(self, trainer: Trainer, pl_module: L.LightningModule) -> None:
        """Remember the first step."""
        super().on_train_start(trainer, pl_module)
        self._last_step, self._position, self._failed = trainer.global_step, None, False

    def _remember_position(self, trainer: Trainer) -> None:
        """Keep what a checkpoint of this moment would hold besides weights, unless gradients are accumulated."""
        if trainer.world_size == 1 and self.save_last and not self._window_open:
            self._position = position_of(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """After a failure, save the position of the last complete step."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._failed and self._position is not None:
            checkpoint.update(self._position)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        alone = self._ranks == 1
        if alone and not self._training:  # ranks that stopped here would leave the others in a collective
            self._handlers.restore()
            rank_zero_info("Interrupted before the first step: nothing is lost, run the same command again")
            raise stop(number)
        if not self._received:
            rank_zero_info("Interrupted: finishing this step and saving last.ckpt (press Ctrl-C again to abort)")
        self._received = max(number, self._received)
        if alone or number == signal.SIGINT:  # a launcher and the scheduler may both send SIGTERM to a rank
            self._handlers.restore()  # so that a second one aborts

    def _restore_handlers(self, trainer: Trainer) -> None:
        self._handlers.restore()
        replace_original_handlers(trainer, self._handlers.previous)

    def on_train_batch_start(self, trainer: Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        """End a run that is to stop: the step before is logged now."""
        super().on_train_batch_start(trainer, pl_module, *args, **kwargs)
        self._end_if_stopping(trainer)
        self._training = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        """Save what is due; after Ctrl-C save `last` once the optimizer has stepped."""
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)
        stepped, self._last_step = trainer.global_step > self._last_step, trainer.global_step
        self._window_open = not stepped
        self._remember_position(trainer)
        if stepped and self._save_due:
            self._save_due = False
            super().on_validation_end(trainer, pl_module)
        if stepped and self.save_last:
            self._stopping = self._agreed_signal(trainer)
            if self._stopping and not is_fast_dev_run(trainer):
                self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
                rank_zero_info(
                    f"Saved step {trainer.global_step} to {self.last_model_path}: resume with --ckpt_path last"
                )

    def _agreed_signal(self, trainer: Trainer) -> int:
        """The signal that any rank has received; 0: none."""
        if trainer.world_size == 1:
            return self._received
        received = torch.tensor(self._received, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(received, reduce_op="max"))

    def _end_if_stopping(self, trainer: Trainer) -> None:
        """Raise what ends the run, once the values of its last step are logged: after all hooks of that step."""
        number, self._stopping = self._stopping, 0
        if number and is_launched_child(trainer):
            raise SystemExit(0)  # Lightning kills the main process if one of its children fails
        if number:
            raise stop(number)

    def on_validation_start(self, trainer: Trainer, pl_module: L.LightningModule) -> None:
        """End a run that is to stop."""
        super().on_validation_start(trainer, pl_module)
        self._end_if_stopping(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: L.LightningModule) -> None:
        """End a run that is to stop; else save what is due."""
        self._end_if_stopping(trainer)
        super().on_train_epoch_end(trainer, pl_module)
        self._remember_position(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: L.LightningModule) -> None:
        """Save what is due; inside of an accumulation window after its step, as checkpoints hold no gradients."""
        self._save_due = self._window_open and trainer.state.fn == "fit" and not trainer.sanity_checking
        if not self._save_due:
            super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._remember_position(trainer)

    def teardown(self, trainer: Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the previous handlers of the signals."""
        self._restore_handlers(trainer)
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restore the previous handlers of the signals; if a server has failed, save the last complete step."""
        self._restore_handlers(trainer)
        if isinstance(exception, ServerError) and self._position is not None and not is_fast_dev_run(trainer):
            self._failed = True
            if not self._should_skip_saving_checkpoint(trainer):
                self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            rank_zero_info(f"Saved step {trainer.global_step} to {checkpoint_folder(trainer)}")
        super().on_exception(trainer, pl_module, exception)

    def on_train_end(self, trainer: Trainer, pl_module: L.LightningModule) -> None:
        """Save `last` for the final step if no trigger has. From here on, a signal ends the run at once."""
        if self.save_last and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        self._restore_handlers(trainer)


def checkpoint_folder(trainer: Trainer) -> Path:
    """`ROOT/checkpoints`."""
    return Path(trainer.default_root_dir).absolute() / "checkpoints"
