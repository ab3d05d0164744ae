"""How long a run is, and which learning-rate schedules and validations do not fit it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import lightning.pytorch as L
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from kd_lightning.data.base import DistillationDataModule, datamodule_of
from kd_lightning.distributed.trainer import limit_batches
from kd_lightning.training.learning_rate.schedulers import WarmupLR

LENGTHS: dict[type[LRScheduler], str] = {
    lr_scheduler.PolynomialLR: "total_iters",
    lr_scheduler.LinearLR: "total_iters",
    lr_scheduler.ConstantLR: "total_iters",
    lr_scheduler.CosineAnnealingLR: "T_max",
    lr_scheduler.OneCycleLR: "total_steps",
    WarmupLR: "num_training_steps",
}
LATEST: dict[type[LRScheduler], str] = {  # what must lie before the end of the run to have an effect
    lr_scheduler.StepLR: "step_size",
    lr_scheduler.CosineAnnealingWarmRestarts: "T_0",
}


def batches_per_epoch(trainer: L.Trainer, datamodule: DistillationDataModule | None) -> int | None:
    """Training batches of an epoch on one rank; None if they are not known before the data are read."""
    return None if datamodule is None else datamodule.batches_per_pass(trainer)


def steps_of_run(trainer: L.Trainer, datamodule: DistillationDataModule | None) -> int | None:
    """Optimizer steps of a run: the smaller of `max_steps` and `max_epochs` times its batches; None: not known.

    Args:
        trainer: of the run.
        datamodule: the data module of this package, if it is one.
    """
    limits = [trainer.max_steps] if trainer.max_steps >= 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        batches = batches_per_epoch(trainer, datamodule)
        if batches is not None:
            limits.append(math.ceil(batches / trainer.accumulate_grad_batches) * trainer.max_epochs)
        elif datamodule is None and datamodule_of(trainer) is None and trainer.lightning_module is not None:
            estimated = trainer.estimated_stepping_batches
            limits += [int(estimated)] if 0 <= estimated < math.inf else []
    return min(limits, default=None)


def has_validation(trainer: L.Trainer, datamodule: DistillationDataModule | None) -> bool:
    """Whether a run has rows to validate on."""
    if datamodule is None:
        return bool(trainer.enable_validation)
    return bool(datamodule.sources.get("val")) and limit_batches(trainer, "val") != 0


def schedule_notes(scheduler: Any, steps: int) -> Iterator[str]:
    """What of a schedule does not fit a run.

    Args:
        scheduler: as built at the start of the run.
        steps: optimizer steps of the run.

    Raises:
        ValueError: the schedule refuses to be longer than it is, and would end the run.
    """
    if steps < 1:
        return
    kind = type(scheduler).__name__
    name, end = _length(scheduler)
    if end is not None and end < steps:
        if isinstance(scheduler, lr_scheduler.OneCycleLR):
            raise ValueError(
                f"model.lr_scheduler.{name}: {kind} has {end} steps and the run {steps}, so that it would stop the run "
                f"at step {end}: set {name} to null (the run's length) or to at least {steps}"
            )
        if after := _after_end(scheduler):
            yield (
                f"model.lr_scheduler: {kind} ends at step {end}, the run at step {steps}: {after}; set {name} to null "
                "(the run's length) or to a share of the run"
            )
    if end is not None and end > steps:
        yield (
            f"model.lr_scheduler: the run ends at step {steps}, before {kind} does at step {end}: the learning rate "
            f"does not reach its last value; set {name} to null (the run's length) or to a share of the run"
        )
    for kinds, argument in LATEST.items():
        if isinstance(scheduler, kinds) and vars(scheduler)[argument] >= steps:
            value = vars(scheduler)[argument]
            if argument == "step_size" or value > steps:
                yield (
                    f"model.lr_scheduler: the run ends at step {steps}, and {kind} has {argument} {value}: set a "
                    f"smaller one, or a share of the run"
                )
    if isinstance(scheduler, lr_scheduler.MultiStepLR) and (late := [m for m in scheduler.milestones if m >= steps]):
        yield f"model.lr_scheduler: the run ends at step {steps}, before the milestones {', '.join(map(str, late))}"
    if (
        isinstance(scheduler, lr_scheduler.CyclicLR)
        and (up := round(scheduler.total_size * scheduler.step_ratio)) > steps
    ):
        yield f"model.lr_scheduler: the run ends at step {steps}, before {kind} is up at step {up}"
    if isinstance(scheduler, WarmupLR) and scheduler.num_warmup_steps >= steps:
        yield (
            f"model.lr_scheduler: the run ends at step {steps}, and the warm-up at step {scheduler.num_warmup_steps}: "
            "set a smaller num_warmup_steps, or a share of the run"
        )


def _length(scheduler: Any) -> tuple[str, int | None]:
    """Name and value of the argument that is the length of a schedule; None if it has none."""
    for kind, name in LENGTHS.items():
        if isinstance(scheduler, kind):
            return name, vars(scheduler)[name]
    if isinstance(scheduler, lr_scheduler.LambdaLR) and isinstance(shape := scheduler.lr_lambdas[0], partial):
        steps = shape.keywords.get("num_training_steps")  # of a function of transformers
        return "num_training_steps", steps if isinstance(steps, int) else None
    return "", None


def _after_end(scheduler: Any) -> str:
    """What the learning rate does after the end of the schedule; empty if that is what such a schedule is for."""
    if isinstance(scheduler, lr_scheduler.CosineAnnealingLR):
        return "the learning rate rises again after that"
    if isinstance(scheduler, lr_scheduler.ConstantLR):
        return ""
    if isinstance(scheduler, lr_scheduler.LinearLR):
        falls = scheduler.end_factor < scheduler.start_factor
        return f"the learning rate stays at {scheduler.end_factor:g} times its first value" if falls else ""
    if isinstance(scheduler, lr_scheduler.LambdaLR):
        _, end = _length(scheduler)
        assert end is not None
        last, later = (abs(float(scheduler.lr_lambdas[0](step))) for step in (end, round(1.5 * end) + 1))
        if later > last + 1e-6:
            return "the learning rate rises again after that"
        return f"the learning rate stays at {later * scheduler.base_lrs[0]:.3g}"
    return "the learning rate is 0 after that"


def validation_note(trainer: L.Trainer, datamodule: DistillationDataModule | None, steps: int | None) -> str:
    """A line if the run ends before its first validation; otherwise empty.

    Args:
        trainer: of the run.
        datamodule: its data, if they are of this package.
        steps: optimizer steps of the run; None: not known.
    """
    interval, epochs = trainer.val_check_interval, trainer.check_val_every_n_epoch
    if steps is None or isinstance(interval, bool) or not isinstance(interval, (int, float)):
        return ""
    bounded = trainer.max_epochs is not None and trainer.max_epochs > 0
    batches = batches_per_epoch(trainer, datamodule) if bounded or epochs is not None else None
    trained = steps * trainer.accumulate_grad_batches
    if bounded and batches is not None:
        trained = min(trained, int(trainer.max_epochs or 0) * batches)
    if epochs is None:
        first = int(interval)
    elif batches is None:
        return ""
    else:
        first = (epochs - 1) * batches + (int(interval * batches) if isinstance(interval, float) else interval)
    if first <= trained:
        return ""
    return (
        f"validation never runs: the first one is due after {first} training batches, and the run has {trained}: lower "
        "trainer.val_check_interval or trainer.check_val_every_n_epoch"
    )
