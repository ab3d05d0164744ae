"""The optimizer steps of a run: gradients are accumulated as sums and divided once, schedules follow each step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from kd_lightning.distributed.dtensor import is_sharded
from kd_lightning.distributed.grad_norm import gradient_norm
from kd_lightning.distributed.trainer import data_parallel_rank, forward_context, log_every_n_steps
from kd_lightning.divergences import WeightedTokens
from kd_lightning.engine.sequence_stats import Mean
from kd_lightning.losses import DistillationLoss, LossParts
from kd_lightning.schedules import Schedule
from kd_lightning.training.accumulation import AccumulationWindow
from kd_lightning.training.arguments import check_optimizer
from kd_lightning.training.base import StudentTeacherModule
from kd_lightning.training.finite_check import NonFiniteLossCheck, non_finite_terms
from kd_lightning.training.gradients import clip_sharded_gradients, parameters_of, scale_gradients


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
        self._configured_lr = float(optimizer.param_groups[0]["lr"])
        if self.lr_scheduler_callable is None:
            return optimizer
        scheduler = {"scheduler": self.lr_scheduler_callable(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

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
        self._window.add(batch, parts, notes)
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
        """Step, then update the schedules: at the end of the batch, checkpoints are already written."""
        super().optimizer_step(*args, **kwargs)
        total = self.trainer.estimated_stepping_batches
        progress = (self.trainer.global_step + 1) / total if total and total != float("inf") else 0.0
        # Lightning's epoch skips a number at a resume; num_training_batches is infinite for endless data
        passes = (self.trainer.fit_loop.epoch_loop.total_batch_idx + 1) / self.trainer.num_training_batches
        stats = {**self._means, "epoch": torch.tensor(passes)}
        for schedule in self.schedules().values():
            schedule.update(min(progress, 1.0), stats)
        for path, part in self.weighted().items():
            if (sums := self._means.get(f"weight_sums/{path}")) is not None:  # None: the teacher was not run
                part.update(sums)

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
