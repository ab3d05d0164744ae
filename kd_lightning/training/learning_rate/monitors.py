"""The metrics that callbacks and schedulers watch: which there are, and which one is watched by default."""

from __future__ import annotations

from collections.abc import Iterable

import lightning.pytorch as L
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, EarlyStopping, LearningRateFinder, ModelCheckpoint

from kd_lightning.training.base import StudentTeacherModule

TRAINING = tuple(f"train/{name}" for name in ("loss", "kd", "ce", "student_share", "grad_norm", "regenerate_share"))
OURS = ("kd_lightning", "lightning")  # packages whose classes log no metric of an unknown name


def default_monitor(module: L.LightningModule) -> str:
    """The metric that says in validation how good the student is."""
    if not isinstance(module, StudentTeacherModule):
        return "val/kd"
    if module.objective_moves and "forward_kl" in module.monitors:
        return "val/forward_kl"
    return "val/ce" if module.labels_only else "val/kd"


def checkpoint_monitor(callbacks: Iterable[Callback], module: L.LightningModule) -> str:
    """The metric that the checkpoint callback watches, or else the default one."""
    found = (one.monitor for one in callbacks if isinstance(one, ModelCheckpoint) and one.monitor)
    return next(found, default_monitor(module))


def check_callbacks(callbacks: Iterable[Callback], module: StudentTeacherModule, validates: bool) -> None:
    """Refuse callbacks that would end the run: tuners, and those that watch a metric that is not logged.

    Args:
        callbacks: of the Trainer.
        module: of the run.
        validates: whether validation runs.

    Raises:
        ValueError: it names the callback and what to change.
    """
    callbacks = list(callbacks)
    for one in callbacks:
        if isinstance(one, LearningRateFinder):
            raise ValueError(
                f"{type(one).__name__} is not supported: its trial steps would change the run that follows: remove it, "
                "and set model.optimizer.lr; `kd-lightning preflight` tries the learning rate on a batch"
            )
        if isinstance(one, BatchSizeFinder):
            raise ValueError(
                f"{type(one).__name__} is not supported: its trial steps would change the run that follows: remove it, "
                "and set data.batch_size; `kd-lightning plan` estimates the memory of a batch size"
            )
    known = all(type(part).__module__.split(".")[0] in OURS for part in (module, *callbacks))
    for one in callbacks:
        if isinstance(one, (EarlyStopping, ModelCheckpoint)) and one.monitor:
            strict = not isinstance(one, EarlyStopping) or one.strict
            if strict and known:
                check_monitor(f"{type(one).__name__}: monitor", one.monitor, module, validates)


def check_monitor(what: str, monitor: str, module: StudentTeacherModule, validates: bool) -> None:
    """Check that a run logs a metric; the names of training metrics are only known once they are logged.

    Args:
        what: the argument, for messages.
        monitor: name of the metric.
        module: of the run.
        validates: whether validation runs.

    Raises:
        ValueError: the metric is not logged.
    """
    if monitor in TRAINING or monitor.startswith(("schedule/", "component/")):
        return
    if monitor.startswith("train/") and module.generates_responses:
        return  # a response source logs metrics of its own
    names = [f"val/{name}" for name in module.measured]
    if monitor not in names:
        there = f"{', '.join(names)} or train/loss" if validates else "train/loss, as there is no validation"
        raise ValueError(f"{what} must be one of {there}, got {monitor!r}")
    if not validates:
        raise ValueError(
            f"{what} {monitor} needs validation, and there is none: set data.val and a val_check_interval within the "
            "run, or remove it"
        )
