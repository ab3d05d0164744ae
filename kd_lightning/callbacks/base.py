"""What the callbacks need of the run they belong to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, cast, runtime_checkable

import lightning.pytorch as L
from transformers import PreTrainedModel

from kd_lightning.data.base import DistillationDataModule, datamodule_of
from kd_lightning.teachers.base import generating_model
from kd_lightning.training.base import StudentTeacherModule


class PreparedRun(Protocol):
    """A run that has not started; models and data are loaded at their first use."""

    @property
    def trainer(self) -> L.Trainer:
        """The Trainer, not started."""

    @property
    def module(self) -> L.LightningModule:
        """The Lightning module."""

    @property
    def datamodule(self) -> DistillationDataModule:
        """The data module, with its rows tokenized."""

    @property
    def student(self) -> PreTrainedModel:
        """The student, loaded."""


@runtime_checkable
class ChecksBeforeStart(Protocol):
    """A callback that can check a run before it starts; `kd-lightning preflight` calls it."""

    def check_before_start(self, run: PreparedRun) -> None:
        """Check the run.

        Raises:
            ValueError: the run would fail; the message says what to change.
        """


class _HasStudent(Protocol):
    @property
    def student(self) -> PreTrainedModel: ...


def student_of(module: L.LightningModule) -> PreTrainedModel:
    """The student, loaded; a custom module has it as `student` too."""
    return cast(_HasStudent, module).student


def student_and_teacher(module: L.LightningModule) -> StudentTeacherModule:
    """The module of a run with student and teacher; a custom module needs the members that its callbacks use."""
    return cast(StudentTeacherModule, module)


def teacher_model(module: StudentTeacherModule) -> PreTrainedModel | None:
    """The teacher's model if it can generate responses, else None."""
    return cast("PreTrainedModel | None", generating_model(module.teacher))


def required_datamodule(trainer: L.Trainer, callback: str) -> DistillationDataModule:
    """The data module of a run.

    Args:
        trainer: the Trainer of the run.
        callback: name of the callback, for the message.

    Raises:
        ValueError: the run has none, or one of another class.
    """
    datamodule = datamodule_of(trainer)
    if datamodule is None:
        raise ValueError(f"{callback} needs a data module of this package, such as InstructionDataModule")
    return datamodule


@contextmanager
def on_training_device(trainer: L.Trainer, module: L.LightningModule) -> Iterator[None]:
    """Put the module back on the device it was trained on, for work in `on_fit_end`.

    Lightning tears its strategy down between `on_train_end` and `on_fit_end`; most strategies move the module to the
    CPU there. Process groups stay open, so collectives still work.
    """
    left = module.device
    moved = left != trainer.strategy.root_device
    if moved:
        trainer.strategy.model_to_device()
    try:
        yield
    finally:
        if moved:
            module.to(left)
