"""What callbacks and commands need of the module that is trained."""

from __future__ import annotations

from abc import ABC, abstractmethod

import lightning.pytorch as L
from torch import Tensor, nn

from kd_lightning.losses import LossParts
from kd_lightning.teachers.base import Teacher


class StudentTeacherModule(L.LightningModule, ABC):
    """A Lightning module that trains a student; `DistillationModule` is the one of this package.

    Attributes:
        teacher: None for training on labels alone.
        monitors: divergences measured in validation and test, by name.
        teacher_cache: whether the teacher's outputs are cached before the first step.
    """

    teacher: Teacher | None
    monitors: nn.ModuleDict
    teacher_cache: bool

    @property
    @abstractmethod
    def student(self) -> nn.Module:
        """The student's Hugging Face model; loaded by `configure_model`."""

    @property
    @abstractmethod
    def tokenizer_name(self) -> str | None:
        """Folder or hub name of the student's tokenizer; None for a loaded model without a name."""

    @property
    @abstractmethod
    def labels_only(self) -> bool:
        """Whether the training loss reads nothing of a teacher, so that no step runs it."""

    @property
    @abstractmethod
    def objective_moves(self) -> bool:
        """Whether the objective changes during training, so that its values at two steps are not comparable."""

    @property
    @abstractmethod
    def measured(self) -> tuple[str, ...]:
        """Names of the values that validation logs as `val/NAME`."""

    @property
    @abstractmethod
    def generates_responses(self) -> bool:
        """Whether a response source generates responses during training."""

    @abstractmethod
    def take_generated_batch(self) -> dict[str, Tensor] | None:
        """The last batch of generated responses, once; None if there is no new one."""

    @abstractmethod
    def evaluate_batch(self, batch: dict[str, Tensor]) -> LossParts:
        """Loss, monitors and diagnostics of one batch, without gradient, in eval mode and in the run's precision."""
