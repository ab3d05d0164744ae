"""Checks of the arguments of `DistillationModule`: their types, and what belongs together."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from kd_lightning.divergences import described
from kd_lightning.models.lora import LoRA
from kd_lightning.schedules import Weight
from kd_lightning.teachers.base import Teacher
from kd_lightning.training.learning_rate.schedulers import steps_given

MODEL = "a folder, a hub name, an `asset:` name or a loaded model"
TYPES: dict[str, tuple[tuple[Any, ...], str]] = {  # what an argument may be, in types and in words
    "student": ((str, nn.Module), MODEL),
    "teacher": ((Teacher, str, nn.Module, type(None)), f"a Teacher, {MODEL}, or None"),
    "student_kwargs": ((Mapping, type(None)), "a mapping of arguments of from_pretrained or None"),
    "teacher_kwargs": ((Mapping, type(None)), "a mapping of arguments of from_pretrained or None"),
    "optimizer": ((Callable,), "a function of the parameters, such as torch.optim.AdamW"),
    "lr_scheduler": ((Callable, type(None)), "a function of the optimizer or None"),
    "lora": ((LoRA, type(None)), "a LoRA(r=...) or None"),
}


def check_types(**arguments: object) -> None:
    """Check arguments that would otherwise fail when the run has started.

    Raises:
        ValueError: one is of another type than `TYPES` allows; also a class instead of an instance.
    """
    for name, value in arguments.items():
        types, words = TYPES[name]
        if not isinstance(value, types) or (isinstance(value, type) and Callable not in types):
            raise ValueError(f"{name} must be {words}, got {described(value)}")


def check_reduction(reduction: str) -> None:
    """Refuse "none", which has no single loss to train on.

    Raises:
        ValueError: the reduction is "none".
    """
    if reduction == "none":
        raise ValueError("reduction must be 'token_mean', 'sequence_mean' or 'sum' in training, got 'none'")


def check_models(
    student: Any, teacher: Any, student_init: str, teacher_kwargs: dict[str, Any] | None, ce_weight: Weight
) -> None:
    """Check student and teacher, before anything is loaded.

    Raises:
        ValueError: an argument is out of its range, or two of them contradict each other.
    """
    if student_init not in ("pretrained", "random"):
        raise ValueError(f"student_init must be 'pretrained' or 'random', got {student_init!r}")
    if teacher is None and ce_weight != 1:
        raise ValueError(f"ce_weight must be 1 where there is no teacher, got {ce_weight}")
    if teacher is not None and student is teacher and not isinstance(student, str):
        raise ValueError("student and teacher must be two objects, as the teacher is frozen: pass copy.deepcopy of one")
    if teacher_kwargs and isinstance(teacher, Teacher):
        raise ValueError(
            f"teacher_kwargs must be empty if teacher is a Teacher, got {teacher_kwargs}: pass them to "
            f"{type(teacher).__name__}"
        )


def check_teacher_cache(teacher: Any, responses: object | None) -> None:
    """Check that the teacher's outputs can be cached before the run.

    Raises:
        ValueError: there is no teacher, it cannot be cached, or responses are generated during the run.
    """
    if teacher is None or responses is not None:
        reason = "there is no teacher" if teacher is None else f"{type(responses).__name__} generates new ones"
        raise ValueError(f"teacher_cache must be false where no responses can be known beforehand: {reason}")
    if isinstance(teacher, Teacher):
        try:
            teacher.check_cacheable()
        except ValueError as error:
            raise ValueError(f"teacher_cache must be false: {error}") from None


REFUSALS = (ValueError, TypeError, ArithmeticError)  # what a class raises at an argument
MANY = 1000  # steps of the run for which a scheduler is tried
TORCH_WORDS = {"learning rate": "lr", "beta parameter": "betas", "epsilon value": "eps"}  # in torch's messages


def check_optimizer(optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None) -> None:
    """Check the arguments of optimizer and scheduler: both are built for a small tensor, and make two steps.

    Args:
        optimizer: builds the optimizer.
        lr_scheduler: builds the scheduler; None: there is none.

    Raises:
        ValueError: an argument is refused, or a learning rate would not be a finite number of at least 0.
    """
    try:
        built = optimizer([torch.nn.Parameter(torch.zeros(2, 2))])
    except REFUSALS as error:
        text = str(error)
        for words, name in TORCH_WORDS.items():
            text = text.replace(words, name)
        raise ValueError(f"model.optimizer: {text}") from error
    except RuntimeError:  # it needs the student's own parameters
        return
    _check_rates("model.optimizer", built)
    if lr_scheduler is None:
        return
    try:
        with steps_given(MANY):
            scheduler = lr_scheduler(built)
        _check_signs(scheduler)
        _check_rates("model.lr_scheduler", built)
        if isinstance(scheduler, ReduceLROnPlateau):
            return
        for _ in range(2):
            built.step()
            with suppress(ValueError):  # a schedule of so few steps is a question of the run's length
                scheduler.step()
            _check_rates("model.lr_scheduler", built)
    except REFUSALS as error:
        begin = "" if str(error).startswith("model.") else "model.lr_scheduler: "
        raise ValueError(f"{begin}{error}") from error


def _check_signs(scheduler: Any) -> None:
    """Refuse negative numbers among the arguments of one of torch's schedulers, and periods of 0 steps."""
    torchs = next((one for one in type(scheduler).__mro__ if one.__module__.startswith("torch.")), LRScheduler)
    for name in inspect.signature(torchs).parameters:
        number = vars(scheduler).get(name)
        least = 1 if name in ("step_size", "T_max", "T_0", "T_mult", "total_steps") else 0
        if name != "last_epoch" and isinstance(number, (int, float)) and not number >= least:
            raise ValueError(f"model.lr_scheduler.{name} must be at least {least}, got {number}")


def _check_rates(name: str, optimizer: torch.optim.Optimizer) -> None:
    for rate in (group["lr"] for group in optimizer.param_groups):
        if isinstance(rate, complex) or not 0 <= float(rate) < math.inf:
            raise ValueError(f"{name}: the learning rate must be a finite number of at least 0, got {rate}")
