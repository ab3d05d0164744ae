"""The one adapter to Lightning's Trainer: attributes that its class does not declare, defaults without a Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy, Strategy

from kd_lightning.distributed.signals import Handler


def data_parallel_rank(trainer: Trainer | None) -> tuple[int, int]:
    """Rank and number of ranks among those that read different rows; (0, 1) without a Trainer.

    A strategy that is not distributed has no `distributed_sampler_kwargs`. With tensor parallelism several processes
    read the same rows, so these numbers can be smaller than `global_rank` and `world_size`.
    """
    kwargs = None if trainer is None else trainer.distributed_sampler_kwargs
    return (0, 1) if kwargs is None else (int(kwargs["rank"]), int(kwargs["num_replicas"]))


def forward_context(trainer: Trainer | None) -> AbstractContextManager[None]:
    """The precision in which the run's validation computes; that of the tensors without a Trainer.

    Lightning enters it around its own steps only. Whatever runs a model in other hooks enters it here: baselines, the
    results table, generation. Sharded layers that are gathered in bfloat16 cannot be run outside of it.
    """
    return nullcontext() if trainer is None else trainer.precision_plugin.forward_context()


def is_fast_dev_run(trainer: Trainer) -> bool:
    """Whether this is a `fast_dev_run`, which writes no files.

    Lightning sets the attribute in a helper function, so its class does not declare it.
    """
    return bool(getattr(trainer, "fast_dev_run", False))


def is_overfitting(trainer: Trainer | None) -> bool:
    """Whether `overfit_batches` is set: Lightning then expects a plain loader in file order.

    Lightning sets the attribute in a helper function, so its class does not declare it.
    """
    return bool(getattr(trainer, "overfit_batches", 0))


def limit_batches(trainer: Trainer | None, split: str) -> int | float:
    """`limit_SPLIT_batches`: a number of batches (int) or a share of them (float); 1.0 without a Trainer.

    Args:
        trainer: the Trainer that the data module is attached to.
        split: `train`, `val`, `test` or `predict`.
    """
    limit: int | float = 1.0 if trainer is None else getattr(trainer, f"limit_{split}_batches")
    return limit


def log_every_n_steps(trainer: Trainer) -> int:
    """Steps between two logged steps; 0: nothing is logged.

    Lightning sets the attribute in its logger connector, so its class does not declare it.
    """
    return int(getattr(trainer, "log_every_n_steps", 0))


def stage_of(trainer: Trainer | None) -> str:
    """`fit`, `validate`, `test` or `predict`; `fit` without a Trainer or before it has started."""
    return "fit" if trainer is None or trainer.state.fn is None else trainer.state.fn.value


def completed_epochs(trainer: Trainer | None) -> int:
    """Completed passes over the training data; 0 without a Trainer.

    `current_epoch` of a checkpoint that was saved at the end of an epoch does not include that epoch yet.
    """
    if trainer is None:
        return 0
    progress: Any = trainer.fit_loop.epoch_progress.current  # Lightning declares a type without `processed`
    return int(progress.processed)


def gradients_are_bucket_views(strategy: Strategy) -> bool:
    """Whether DDP keeps gradients only in its buckets; Lightning has this argument in a private dict."""
    return isinstance(strategy, DDPStrategy) and bool(strategy._ddp_kwargs.get("gradient_as_bucket_view"))


def validation_is_due(trainer: Trainer) -> bool:
    """Whether Lightning validates after the present training batch; it has no public method that says so."""
    return bool(trainer.fit_loop.epoch_loop._should_check_val_fx(None))  # type: ignore[arg-type]


def without_own_sigterm(trainer: Trainer) -> None:
    """Let SIGTERM reach the handler that is installed already; call it before the Trainer registers its own.

    Lightning's own handler broadcasts in the middle of whatever collective is running, and ends `fit` with status 0;
    it has no switch.
    """

    def ignore(number: int, frame: FrameType | None) -> None:
        pass

    trainer._signal_connector._sigterm_notifier_fn = ignore  # type: ignore[method-assign, assignment]


def replace_original_handlers(trainer: Trainer, handlers: Mapping[int, Handler]) -> None:
    """Let the Trainer restore these handlers at its end instead of those that it found at its start."""
    originals: Any = trainer._signal_connector._original_handlers  # no public access
    originals.update({number: handler for number, handler in handlers.items() if number in originals})


def is_launched_child(trainer: Trainer) -> bool:
    """Whether the Trainer of another process has started this one."""
    strategy = trainer.strategy
    environment = strategy.cluster_environment if isinstance(strategy, ParallelStrategy) else None
    return isinstance(environment, LightningEnvironment) and trainer.local_rank != 0


def position_of(trainer: Trainer) -> dict[str, Any]:
    """The part of a checkpoint that says which batch comes next; the Trainer has no public method for it."""
    loops = trainer._checkpoint_connector._get_loops_state_dict()
    return {"epoch": trainer.current_epoch, "loops": loops}
