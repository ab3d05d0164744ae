"""A run that has not started, as preflight sees it, and what it finds there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from kd_lightning.callbacks.regenerate import Regeneration
from kd_lightning.constants import IGNORE_INDEX
from kd_lightning.data.base import DistillationDataModule

Level = str  # "error": the run would be wasted; "warning": it may be; "note": for information


@dataclass(frozen=True)
class Finding:
    """One line of preflight.

    Attributes:
        level: "error", "warning" or "note".
        check: the check that found it.
        text: what it is, in the user's words.
    """

    level: Level
    check: str
    text: str


class Setup:
    """A run that has not started; its parts are loaded when a check first asks for them.

    Args:
        module: the `DistillationModule`.
        datamodule: its data.
        trainer: built, not started.
        config: the parsed configuration with its objects built.
    """

    def __init__(self, module: Any, datamodule: DistillationDataModule, trainer: Any, config: Any) -> None:
        self.module, self.trainer, self.config = module, trainer, config
        self._datamodule = datamodule

    @cached_property
    def datamodule(self) -> DistillationDataModule:
        """The data, tokenised."""
        data = self._datamodule
        data.use_tokenizer_of(self.module.tokenizer_name)
        data.setup("fit")
        if data.sources["test"]:
            data.setup("test")
        return data

    @cached_property
    def model(self) -> Any:
        """Student with its loss, loaded, on the run's device."""
        self.module.configure_model()
        device = self.trainer.strategy.root_device
        if self.module.teacher is not None:
            self.module.teacher.to(device)
        return self.module.model.to(device)

    @cached_property
    def batches(self) -> list[dict[str, Tensor]]:
        """The first batches of training, on the run's device; of validation where the words to train on come later."""
        if self.words_come_later and self.datamodule.sources["val"]:
            return self.held_out
        device = self.model.student.device
        loader = self.datamodule.train_dataloader()
        found = [batch for batch, _ in zip(loader, range(2), strict=False)]
        return [{name: value.to(device) for name, value in batch.items()} for batch in found]

    @property
    def words_come_later(self) -> bool:
        """Whether a callback lets a model respond to the training prompts once the run has begun."""
        writers = [callback for callback in self.trainer.callbacks if isinstance(callback, Regeneration)]
        return any(self.datamodule.missing_responses(writer.side) for writer in writers)

    @cached_property
    def held_out(self) -> list[dict[str, Tensor]]:
        """A few validation batches; of training where there is no validation."""
        loader = self.datamodule.val_dataloader() if self.datamodule.sources["val"] else None
        found = [] if loader is None else [batch for batch, _ in zip(loader, range(4), strict=False)]
        device = self.model.student.device
        return [{name: value.to(device) for name, value in batch.items()} for batch in found] or self.batches

    @cached_property
    def means(self) -> dict[str, float]:
        """Token means of the evaluation's values on `held_out`."""
        totals: dict[str, float] = {}
        count = 0
        assert self.model is not None
        for batch in self.held_out:
            with self.trainer.precision_plugin.forward_context():
                parts = self.module.evaluate_batch(batch)
            count += int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
            for name, value in parts.values.items():
                totals[name] = totals.get(name, 0.0) + float(value.double().sum())
        return {name: total / count for name, total in totals.items()}

    @property
    def teacher_teaches(self) -> bool:
        """Whether the training loss reads the teacher."""
        return self.module.teacher is not None and not self.module.labels_only
