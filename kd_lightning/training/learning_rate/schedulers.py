"""PyTorch's learning-rate schedulers with lengths that can follow the run.

A length is a number of optimizer steps (int), a share of the run's steps in (0, 1] (float), or None: all of them. Each
class reduces to PyTorch's of the same name if its lengths are whole numbers. In a configuration they replace PyTorch's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from lightning.pytorch.cli import ReduceLROnPlateau as MonitoredReduceLROnPlateau
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

RUN: ContextVar[tuple[int | None]] = ContextVar("RUN")  # the steps of the run whose scheduler is being built


@contextmanager
def steps_given(steps: int | None) -> Iterator[None]:
    """Build schedulers for a run of so many optimizer steps; None: their number is not known."""
    token = RUN.set((steps,))
    try:
        yield
    finally:
        RUN.reset(token)


def whole_steps(name: str, length: float | None) -> int:
    """A length as a number of optimizer steps.

    Args:
        name: of the argument, for messages.
        length: a number of steps, a share of the run, or None.

    Raises:
        ValueError: it is out of range, or relative to a run of unknown length.
    """
    share = 1.0 if length is None else length
    if isinstance(share, bool) or not isinstance(share, (int, float)):
        raise ValueError(f"{name} must be a number of steps, a share of the run in (0.0, 1.0] or null, got {length!r}")
    if isinstance(share, int):
        if share < 1:
            raise ValueError(f"{name} must be at least 1 step, got {length}")
        return share
    if not 0 < share <= 1:
        raise ValueError(f"{name} must be a whole number of steps or a share of the run in (0.0, 1.0], got {length}")
    (steps,) = RUN.get((None,))
    if steps is None:
        shown = "null" if length is None else length
        raise ValueError(
            f"{name} {shown} follows the length of the run, which is not known: set trainer.max_steps or "
            f"trainer.max_epochs, or {name} to a number of steps"
        )
    return max(1, round(share * steps))


class _FollowsRun(LRScheduler):
    """Keeps lengths that are relative to the run when the state of a run with another number of steps is restored."""

    relative: tuple[str, ...] = ()  # attributes

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state."""
        kept = {name: vars(self)[name] for name in self.relative if name in vars(self)}
        changed = any(state_dict.get(name, value) != value for name, value in kept.items())
        super().load_state_dict({**state_dict, **kept})
        rates: Callable[[], list[float]] | None = getattr(self, "_get_closed_form_lr", None)  # PyTorch: some have it
        if changed and rates is not None:
            for group, rate in zip(self.optimizer.param_groups, rates(), strict=True):
                group["lr"] = rate
            self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The state."""
        return {name: value for name, value in super().state_dict().items() if name != "relative"}


def _relative(**lengths: object) -> tuple[str, ...]:
    """Names of the lengths that follow the run."""
    return tuple(name for name, length in lengths.items() if length is None or isinstance(length, float))


class PolynomialLR(_FollowsRun, lr_scheduler.PolynomialLR):
    """From the configured learning rate to 0 in `total_iters` steps.

    Args:
        optimizer: whose learning rate it changes.
        total_iters: steps, share of the run, or None: the run.
        kwargs: PyTorch's other arguments.
    """

    def __init__(self, optimizer: Optimizer, total_iters: int | float | None = None, **kwargs: Any) -> None:
        self.relative = _relative(total_iters=total_iters)
        super().__init__(optimizer, total_iters=whole_steps("total_iters", total_iters), **kwargs)


class LinearLR(_FollowsRun, lr_scheduler.LinearLR):
    """A factor on the learning rate that changes linearly for `total_iters` steps.

    Args:
        optimizer: whose learning rate it changes.
        total_iters: steps, share of the run, or None: the run.
        kwargs: PyTorch's other arguments.
    """

    def __init__(self, optimizer: Optimizer, total_iters: int | float | None = 5, **kwargs: Any) -> None:
        self.relative = _relative(total_iters=total_iters)
        super().__init__(optimizer, total_iters=whole_steps("total_iters", total_iters), **kwargs)


class ConstantLR(_FollowsRun, lr_scheduler.ConstantLR):
    """A constant factor on the learning rate for `total_iters` steps.

    Args:
        optimizer: whose learning rate it changes.
        total_iters: steps, share of the run, or None: the run.
        kwargs: PyTorch's other arguments.
    """

    def __init__(self, optimizer: Optimizer, total_iters: int | float | None = 5, **kwargs: Any) -> None:
        self.relative = _relative(total_iters=total_iters)
        super().__init__(optimizer, total_iters=whole_steps("total_iters", total_iters), **kwargs)


class CosineAnnealingLR(_FollowsRun, lr_scheduler.CosineAnnealingLR):
    """Half a cosine from the configured learning rate to `eta_min` in `T_max` steps.

    Args:
        optimizer: whose learning rate it changes.
        T_max: steps, share of the run, or None: the run.
        kwargs: PyTorch's other arguments.
    """

    def __init__(self, optimizer: Optimizer, T_max: int | float | None = None, **kwargs: Any) -> None:
        self.relative = _relative(T_max=T_max)
        super().__init__(optimizer, T_max=whole_steps("T_max", T_max), **kwargs)


class CosineAnnealingWarmRestarts(lr_scheduler.CosineAnnealingWarmRestarts):
    """Half cosines, the first of `T_0` steps.

    Args:
        optimizer: whose learning rate it changes.
        T_0: steps, share of the run, or None: the run.
        kwargs: PyTorch's other arguments.
    """

    def __init__(self, optimizer: Optimizer, T_0: int | float | None = None, **kwargs: Any) -> None:
        super().__init__(optimizer, T_0=whole_steps("T_0", T_0), **kwargs)


class StepLR(_FollowsRun, lr_scheduler.StepLR):
    """The learning rate times `gamma` after every `step_size` steps.

    Args:
        optimizer: whose learning rate it changes.
        step_size: steps, or share of the run.
        kwargs: PyTorch's other arguments.
    """

    def __init__(self, optimizer: Optimizer, step_size: int | float, **kwargs: Any) -> None:
        self.relative = _relative(step_size=step_size)
        super().__init__(optimizer, step_size=whole_steps("step_size", step_size), **kwargs)


class MultiStepLR(_FollowsRun, lr_scheduler.MultiStepLR):
    """The learning rate times `gamma` at each milestone.

    Args:
        optimizer: whose learning rate it changes.
        milestones: steps, or shares of the run.
        kwargs: PyTorch's other arguments.
    """

    def __init__(self, optimizer: Optimizer, milestones: list[int | float], **kwargs: Any) -> None:
        self.relative = ("milestones",) if any(isinstance(one, float) for one in milestones) else ()
        super().__init__(optimizer, milestones=[whole_steps("milestones", one) for one in milestones], **kwargs)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state; a checkpoint that is read without running code may hold the counts as a plain dict."""
        super().load_state_dict(state_dict)
        self.milestones = Counter(self.milestones)


class CyclicLR(lr_scheduler.CyclicLR):
    """Between two learning rates, up in `step_size_up` steps and down in `step_size_down`.

    Args:
        optimizer: whose learning rate it changes.
        base_lr: lower learning rate.
        max_lr: upper learning rate.
        step_size_up: steps, or share of the run.
        step_size_down: the same; None: as `step_size_up`.
        kwargs: PyTorch's other arguments.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        base_lr: float | list[float],
        max_lr: float | list[float],
        step_size_up: int | float = 2000,
        step_size_down: int | float | None = None,
        **kwargs: Any,
    ) -> None:
        up = whole_steps("step_size_up", step_size_up)
        down = None if step_size_down is None else whole_steps("step_size_down", step_size_down)
        super().__init__(optimizer, base_lr, max_lr, step_size_up=up, step_size_down=down, **kwargs)


class OneCycleLR(lr_scheduler.OneCycleLR):
    """One cycle of `total_steps` steps: up to `max_lr`, then down.

    Args:
        optimizer: whose learning rate it changes.
        max_lr: largest learning rate.
        total_steps: steps, share of the run, or None: `epochs` times `steps_per_epoch` if both are given, or the run.
        epochs: number of epochs.
        steps_per_epoch: steps in an epoch.
        kwargs: PyTorch's other arguments.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_lr: float | list[float],
        total_steps: int | float | None = None,
        epochs: int | None = None,
        steps_per_epoch: int | None = None,
        **kwargs: Any,
    ) -> None:
        if total_steps is None and epochs is not None and steps_per_epoch is not None:
            total_steps = epochs * steps_per_epoch
        super().__init__(optimizer, max_lr, total_steps=whole_steps("total_steps", total_steps), **kwargs)


class ReduceLROnPlateau(MonitoredReduceLROnPlateau):
    """Multiply the learning rate by `factor` when a metric stops improving; it looks after every validation.

    Args:
        optimizer: whose learning rate it changes.
        monitor: name of a metric that validation logs; None: the checkpoint's monitor, or the loss in validation.
        kwargs: PyTorch's other arguments.
    """

    def __init__(self, optimizer: Optimizer, monitor: str | None = None, **kwargs: Any) -> None:
        super().__init__(optimizer, monitor, **kwargs)  # type: ignore[arg-type]  # the run replaces None by its default


class WarmupLR(lr_scheduler.LambdaLR):
    """A schedule with warm-up of Hugging Face, by its name in `transformers.get_scheduler`.

    Args:
        optimizer: whose learning rate it changes.
        name: `cosine`, `linear`, `constant_with_warmup`, `polynomial`, `cosine_with_restarts`, `inverse_sqrt` …
        num_warmup_steps: steps from 0 to the configured learning rate, or share of the run; 0: no warm-up.
        num_training_steps: length: steps, share of the run, or None: the run.
        scheduler_specific_kwargs: further arguments of that schedule, such as `num_cycles`, `power` or `min_lr_rate`.

    Raises:
        ValueError: the name is not known, or an argument is refused.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        name: str = "cosine",
        num_warmup_steps: int | float = 0,
        num_training_steps: int | float | None = None,
        scheduler_specific_kwargs: dict[str, Any] | None = None,
    ) -> None:
        from transformers import get_scheduler
        from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

        names = [kind.value for kind in TYPE_TO_SCHEDULER_FUNCTION]
        names = [one for one in names if one not in ("reduce_lr_on_plateau", "greedy")]  # they read the loss
        if name not in names:
            raise ValueError(f"name must be one of {', '.join(names)}, got {name!r}")
        bounded = not name.startswith(("constant", "inverse_sqrt"))
        self.num_training_steps = whole_steps("num_training_steps", num_training_steps) if bounded else None
        self.num_warmup_steps = whole_steps("num_warmup_steps", num_warmup_steps) if num_warmup_steps else 0
        extra = {
            key: whole_steps(key, value) if key.endswith("_steps") and isinstance(value, float) else value
            for key, value in (scheduler_specific_kwargs or {}).items()
        }
        shape = torch.optim.SGD([torch.zeros(1)], lr=float(optimizer.param_groups[0]["lr"]))
        try:
            built = get_scheduler(name, shape, self.num_warmup_steps, self.num_training_steps, extra or None)
        except TypeError as error:
            raise ValueError(f"{name}: {str(error).partition('() ')[2] or error}") from error
        assert isinstance(built, lr_scheduler.LambdaLR)
        super().__init__(optimizer, built.lr_lambdas * len(optimizer.param_groups))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of steps; the shape is that of this run."""
        kept = {"num_training_steps": self.num_training_steps, "num_warmup_steps": self.num_warmup_steps}
        super().load_state_dict({**state_dict, **kept})
