"""The optimizer steps of a run: gradients are accumulated as sums and divided once, schedules follow each step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.cli import ReduceLROnPlateau as MonitoredReduceLROnPlateau
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from kd_lightning.data.base import DistillationDataModule, datamodule_of
from kd_lightning.data.rows.documents import require_prompts
from kd_lightning.distributed.dtensor import is_sharded
from kd_lightning.distributed.grad_norm import gradient_norm
from kd_lightning.distributed.trainer import data_parallel_rank, forward_context, is_fast_dev_run, log_every_n_steps
from kd_lightning.divergences import WeightedTokens
from kd_lightning.engine.sequence_stats import Mean
from kd_lightning.losses import DistillationLoss, LossParts
from kd_lightning.losses.accumulation import AccumulationWindow
from kd_lightning.losses.schedule_updates import update_from_means
from kd_lightning.schedules import Schedule
from kd_lightning.training.arguments import check_optimizer
from kd_lightning.training.base import StudentTeacherModule
from kd_lightning.training.finite_check import NonFiniteLossCheck, non_finite_terms
from kd_lightning.training.gradients import (
    check_restored_optimizer,
    clip_sharded_gradients,
    learning_rate,
    parameters_of,
    scale_gradients,
)
from kd_lightning.training.learning_rate.monitors import check_callbacks, check_monitor, checkpoint_monitor
from kd_lightning.training.learning_rate.run_length import (
    has_validation,
    schedule_notes,
    steps_of_run,
    validation_note,
)
from kd_lightning.training.learning_rate.schedulers import steps_given

NEVER = 2**62  # epochs


class AccumulatingModule(StudentTeacherModule):
    """A module whose training step returns undivided losses.

    The gradients of a window of micro-batches are divided once, by the number of labeled tokens (or responses) of the
    whole window over all ranks.

    Args:
        reduction: `token_mean`, `sequence_mean` or `sum`, as in the loss.
        optimizer: builds the optimizer from the trainable parameters.
        lr_scheduler: builds a scheduler from the optimizer; it steps once per optimizer step.
    """

    def __init__(
        self, reduction: str, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None = None
    ) -> None:
        super().__init__()
        self.optimizer_callable, self.lr_scheduler_callable = optimizer, lr_scheduler
        self._configured_lr = 0.0
        self._plateau: torch.optim.lr_scheduler.ReduceLROnPlateau | None = None
        self.run_notes: list[str] = []  # what of the configuration does not fit the run's length
        self._window = AccumulationWindow(reduction)
        self._means: dict[str, Tensor] = {}
        self._finite_check = NonFiniteLossCheck()

    @property
    @abstractmethod
    def loss(self) -> DistillationLoss:
        """The training loss."""

    @abstractmethod
    def schedules(self) -> dict[str, Schedule]:
        """Every schedule of the run by its dotted path."""

    @abstractmethod
    def weighted(self) -> dict[str, WeightedTokens]:
        """Every divergence of the training objective that weights its tokens, by its dotted path."""

    @abstractmethod
    def row_locations(self, row_ids: list[int]) -> str:
        """Where training rows come from, for messages."""

    def configure_optimizers(self) -> Any:
        """The optimizer over the trainable parameters, and the scheduler, stepped once per optimizer step."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError(
                "none of the student's parameters requires a gradient: call requires_grad_() on those to train, or "
                "pass lora"
            )
        optimizer = self.optimizer_callable(parameters)
        data = datamodule_of(self._trainer)
        steps = None if self._trainer is None else steps_of_run(self._trainer, data)
        scheduler = self._scheduler(optimizer, steps)
        if self._trainer is not None:
            self.run_notes = self._checked(self._trainer, data, scheduler)
            for note in self.run_notes:
                rank_zero_info(note)
        self._configured_lr = learning_rate(optimizer)  # a scheduler may set another one than the optimizer's
        return optimizer if scheduler is None else {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _scheduler(self, optimizer: torch.optim.Optimizer, steps: int | None) -> dict[str, Any] | None:
        """The scheduler as Lightning takes it; None if there is none."""
        if self.lr_scheduler_callable is None:
            return None
        try:
            with steps_given(steps):
                scheduler = self.lr_scheduler_callable(optimizer)
        except ValueError as error:
            raise ValueError(f"model.lr_scheduler: {error}") from error
        if not isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            return {"scheduler": scheduler, "interval": "step"}
        self._plateau = scheduler
        # Lightning would call it after every step or epoch, validated or not: it only saves and restores it
        return {"scheduler": scheduler, "interval": "epoch", "frequency": NEVER, "monitor": "val/kd", "strict": False}

    def check_run(self, trainer: L.Trainer, datamodule: DistillationDataModule | None) -> list[str]:
        """Check scheduler and callbacks against the length of a run and the metrics it logs, before step 0.

        Args:
            trainer: of the run.
            datamodule: its data, if they are of this package.

        Returns:
            What does not fit, one line each.

        Raises:
            ValueError: the run would fail.
        """
        scheduler = None
        if self.lr_scheduler_callable is not None:
            optimizer = self.optimizer_callable([nn.Parameter(torch.zeros(2, 2))])
            scheduler = self._scheduler(optimizer, steps_of_run(trainer, datamodule))
        return self._checked(trainer, datamodule, scheduler)

    def _checked(
        self, trainer: L.Trainer, datamodule: DistillationDataModule | None, scheduler: Mapping[str, Any] | None
    ) -> list[str]:
        """What of a scheduler, of validation and of the callbacks does not fit the run."""
        if self.generates_responses:
            require_prompts(datamodule, "train", "model.responses must be null")
        steps = steps_of_run(trainer, datamodule)
        short = validation_note(trainer, datamodule, steps)
        validates = has_validation(trainer, datamodule)
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a helper of Lightning
        check_callbacks(callbacks, self, validates and not short)
        notes = [short] if validates and short else []
        if scheduler is not None and scheduler["interval"] == "epoch":
            monitor = self._plateau_monitor(callbacks)
            check_monitor("model.lr_scheduler.monitor", monitor, self, validates and not short)
        if scheduler is not None and steps and not is_fast_dev_run(trainer):
            notes += schedule_notes(scheduler["scheduler"], steps)
        return notes

    def _plateau_monitor(self, callbacks: Iterable[L.Callback]) -> str:
        """The metric that `ReduceLROnPlateau` watches."""
        given = self._plateau.monitor if isinstance(self._plateau, MonitoredReduceLROnPlateau) else None
        return given or checkpoint_monitor(callbacks, self)

    def on_train_start(self) -> None:
        """Check what was restored from a checkpoint."""
        check_restored_optimizer(self.trainer.optimizers[0], self._configured_lr)
        if self.trainer.ckpt_path is None or self.trainer.max_steps < 1:
            return
        for config in self.trainer.lr_scheduler_configs:
            for note in schedule_notes(config.scheduler, steps_of_run(self.trainer, datamodule_of(self.trainer)) or 0):
                if note not in self.run_notes:
                    self.run_notes.append(note)
                    rank_zero_info(note)

    def on_validation_epoch_end(self) -> None:
        """Give the monitored metric to `ReduceLROnPlateau`, before checkpoints are saved."""
        if self._plateau is None or self.trainer.sanity_checking or self.trainer.state.fn != "fit":
            return
        monitor = self._plateau_monitor(self.trainer.callbacks)  # type: ignore[attr-defined]
        if (value := self.trainer.callback_metrics.get(monitor)) is not None:
            self._plateau.step(float(value))

    def check_optimizer(self) -> None:
        """Check the arguments of optimizer and scheduler, before the student is loaded.

        Raises:
            ValueError: they refuse an argument, or a learning rate would not be a finite number of at least 0.
        """
        check_optimizer(self.optimizer_callable, self.lr_scheduler_callable)

    # ---------------------------------------------------------------------------------------------------- the window
    def accumulate(self, batch: dict[str, Tensor], parts: LossParts, notes: Mapping[str, Mean]) -> None:
        """Add one micro-batch to the window.

        Args:
            batch: the batch that was trained on.
            parts: its loss.
            notes: other values to log, each as a sum and a count.
        """
        self._window.add(parts, batch, notes)
        self._finite_check.remember(self.trainer.global_step, batch, parts)

    def take_means(self) -> dict[str, Tensor]:
        """The means of the window that has just stepped, once; empty within a window."""
        means, self._means = self._means, {}
        return means

    def is_logged_step(self) -> bool:
        """Whether a logger will record the present step."""
        every = log_every_n_steps(self.trainer)
        return bool(self.trainer.loggers) and every > 0 and (self.trainer.global_step + 1) % every == 0

    # ------------------------------------------------------------------------------------------------------ the step
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the divisor of the whole window over all ranks; before clipping.

        Lightning has divided every loss by `accumulate_grad_batches`, and the strategy averages over ranks: both are
        undone here. The divisor is what was really accumulated, also in a shorter last window.
        """
        divisor, self._means = self._window.close(self._sum_over_ranks)
        undo = self.trainer.accumulate_grad_batches * data_parallel_rank(self.trainer)[1]
        scale_gradients(optimizer, undo / divisor)
        if self.is_logged_step():
            self._means["grad_norm"] = gradient_norm(parameters_of(optimizer), self.device)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does; the norm of parameters that are sharded in several ways is computed here."""
        if not clip_sharded_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm, self.device):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def _sum_over_ranks(self, totals: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return totals
        summed: Tensor = self.trainer.strategy.reduce(totals, reduce_op="sum")
        # several ranks may read the same rows
        return summed * data_parallel_rank(self.trainer)[1] / self.trainer.world_size

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then let the teacher follow and update the schedules; at the end of the batch would be after saving."""
        super().optimizer_step(*args, **kwargs)
        if self.teacher is not None:
            self.teacher.after_step()
        total = self.trainer.estimated_stepping_batches
        progress = (self.trainer.global_step + 1) / total if total and total != float("inf") else 0.0
        # Lightning's epoch skips a number at a resume; num_training_batches is infinite for endless data
        passes = (self.trainer.fit_loop.epoch_loop.total_batch_idx + 1) / self.trainer.num_training_batches
        stats = {**self._means, "epoch": torch.tensor(passes)}
        update_from_means(self.schedules(), self.weighted(), min(progress, 1.0), stats)

    # ----------------------------------------------------------------------------------- checks of states and losses
    def check_finite(self) -> None:
        """Check the last loss of the training steps.

        Raises:
            ValueError: it is NaN or infinite.
        """
        self._finite_check.check(self.row_locations, self.non_finite_terms)

    def non_finite_terms(self, batch: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> str:
        """Which of teacher logits, student logits, divergence and label loss are not finite.

        Args:
            batch: that was trained on.
            values: the two terms of the loss, per token with a label.
        """
        teacher = None if self.labels_only else self.teacher
        sharded = any(is_sharded(parameter) for parameter in self.parameters())
        with forward_context(self._trainer):
            return non_finite_terms(self.loss, teacher, batch, values, run_teacher=not sharded)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Check the loss of the previous step."""
        self.check_finite()

    def on_train_end(self) -> None:
        """Check the loss of the last step."""
        self.check_finite()

    def on_validation_epoch_start(self) -> None:
        """Check the loss of the last step before its student is evaluated."""
        self.check_finite()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights and schedules.

        Raises:
            ValueError: the state was saved with another model or objective.
        """
        try:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        except RuntimeError as error:
            first = str(error).splitlines()[1].strip()
            first = first if len(first) < 200 else f"{first[:200].rpartition(', ')[0]} …"
            raise ValueError(f"the checkpoint belongs to another model or objective: {first}") from error

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save no step whose loss was not finite."""
        self.check_finite()
