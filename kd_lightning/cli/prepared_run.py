"""A fit that is built and not started, as `preflight` and `cache` use it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, cast

import lightning.pytorch as L
import torch
from jsonargparse import Namespace
from torch import Tensor
from transformers import PreTrainedModel

from kd_lightning.callbacks.regenerate import Regeneration
from kd_lightning.cli.trainer_cli import TrainerCLI
from kd_lightning.data.base import DistillationDataModule
from kd_lightning.distributed.trainer import forward_context
from kd_lightning.engine.label_mask import next_token_mask
from kd_lightning.functional import log_softmax
from kd_lightning.models.backbone import logits
from kd_lightning.module import DistillationModule
from kd_lightning.teachers.batches import member_names, teacher_batch, tokens_by_member
from kd_lightning.training.evaluation import evaluated_batches, sums_and_counts
from kd_lightning.training.student import StudentWithLoss
from kd_lightning.training.teacher_setup import use_two_tokenizers

Level = Literal["error", "warning", "note"]  # the run would be wasted; it may be; for information
Findings = Iterator[tuple[Level, str]]

TOKENS = 512  # labeled tokens of the first batch on which the two models are compared


@dataclass(frozen=True)
class Finding:
    """One line of preflight.

    Attributes:
        level: "error", "warning" or "note".
        check: name of the check that found it.
        text: the message.
    """

    level: Level
    check: str
    text: str


class PreparedFit:
    """A fit that is not started; models and data are loaded at their first use.

    Args:
        cli: `program.run(args, start=False)`.
        command: name of the command, for messages.

    Raises:
        ValueError: the data module is of a custom class, of which nothing is known.
    """

    def __init__(self, cli: TrainerCLI, command: str) -> None:
        if not isinstance(cli.datamodule, DistillationDataModule):
            name = type(cli.datamodule).__name__
            raise ValueError(
                f"{command} needs a data module of this package, such as InstructionDataModule, got {name}"
            )
        self.module: DistillationModule = cli.model
        self.trainer: L.Trainer = cli.trainer
        self.config: Namespace = cli.built
        self.regenerations = cli.callbacks_of(Regeneration)
        self.callbacks = cli.callbacks_of(L.Callback)
        self._datamodule = cli.datamodule

    @property
    def device(self) -> torch.device:
        """The run's device."""
        return self.trainer.strategy.root_device

    @cached_property
    def datamodule(self) -> DistillationDataModule:
        """The data module, with its rows tokenized."""
        data = self._datamodule
        data.use_tokenizer_of(self.module.tokenizer_name)
        data.use_teacher_tokenizer_of(self.module.teacher_tokenizer_name)
        data.setup("fit")
        if data.sources["test"]:
            data.setup("test")
        return data

    @cached_property
    def model(self) -> StudentWithLoss:
        """Student with its loss, loaded, on the run's device and in its precision."""
        if self.datamodule.has_two_tokenizers:  # a Trainer compares them in `setup`
            use_two_tokenizers(self.datamodule, self.module.teacher, self.module.model, self.module.reporter)
        self.module.configure_model()
        if self.module.teacher is not None:
            self.module.teacher.to(self.device)
        assert self.module.model is not None
        model = self.trainer.precision_plugin.convert_module(self.module.model.to(self.device))
        assert isinstance(model, StudentWithLoss)
        return model

    @property
    def student(self) -> PreTrainedModel:
        """The student, loaded, on the run's device."""
        return cast(PreTrainedModel, self.model.student)

    # -------------------------------------------------------------------------------------------------------- batches
    @cached_property
    def batches(self) -> list[dict[str, Tensor]]:
        """The first two training batches; validation batches if the training responses are generated in the run."""
        if self.generates_responses and self.datamodule.sources["val"]:
            return self.held_out
        return self._first(self.datamodule.train_dataloader(), 2)

    @cached_property
    def held_out(self) -> list[dict[str, Tensor]]:
        """A few validation batches; training batches if there is no validation."""
        loader = self.datamodule.val_dataloader() if self.datamodule.sources["val"] else ()
        return self._first(loader, 4) or self.batches

    def _first(self, loader: Iterable[dict[str, Tensor]], count: int) -> list[dict[str, Tensor]]:
        """The first batches of a loader, on the run's device."""
        device = self.student.device
        found = [batch for batch, _ in zip(loader, range(count), strict=False)]
        return [{name: value.to(device) for name, value in batch.items()} for batch in found]

    @property
    def generates_responses(self) -> bool:
        """Whether a callback generates responses to training prompts that have none, once the run has begun."""
        return any(self.datamodule.missing_responses(regeneration.side) for regeneration in self.regenerations)

    # ---------------------------------------------------------------------------------------------------------- values
    @cached_property
    def means(self) -> dict[str, float]:
        """Token means of the evaluation's values on `held_out`."""
        assert self.model is not None  # loads it
        batches = evaluated_batches(self.trainer, self.module, self.held_out, range(len(self.held_out)))
        sums = sums_and_counts(batches)
        return {name: float(total[0] / total[1]) for name, total in sums.items()}

    @cached_property
    def means_by_teacher(self) -> dict[str, dict[str, float]]:
        """The same for each teacher, by its name, over the rows that it teaches; all rows for a single teacher.

        Teachers without a token in these rows are left out.
        """
        teacher, names = self.module.teacher, member_names(self.module.teacher)
        if not names:
            return {"": self.means}
        assert self.model is not None  # loads it
        own: dict[str, list[dict[str, Tensor]]] = {name: [] for name in names}
        batches = evaluated_batches(self.trainer, self.module, self.held_out, range(len(self.held_out)))
        for batch, values in zip(self.held_out, batches, strict=True):
            for name, tokens in zip(names, tokens_by_member(teacher, batch), strict=True):
                own[name].append({key: value[tokens] for key, value in values.items()})
        sums = {name: sums_and_counts(batches) for name, batches in own.items()}
        return {
            name: {key: float(total[0] / total[1]) for key, total in found.items()}
            for name, found in sums.items()
            if all(total[1] for total in found.values())
        }

    @cached_property
    def student_log_probs(self) -> Tensor:
        """The student's log-probabilities on labeled tokens of the first batch, [N, V]."""
        model = self.model.student
        model.eval()
        with torch.no_grad(), forward_context(self.trainer):
            found = logits(model, self.batches[0]["input_ids"], self.batches[0]["attention_mask"])
        model.train()
        return self._labeled(found, self.batches[0]["labels"])

    @cached_property
    def teacher_log_probs(self) -> Tensor | None:
        """The teacher's, [N, V]; None without a teacher, if only its top k are known, and if it has other tokens."""
        if self.module.teacher is None or not self.module.teacher.knows_all_tokens:
            return None
        if self.datamodule.has_two_tokenizers:
            return None
        assert self.model is not None  # loads both
        with torch.no_grad(), forward_context(self.trainer):
            found = self.module.teacher.logits(teacher_batch(self.batches[0]))
        return self._labeled(found, teacher_batch(self.batches[0])["labels"]) if isinstance(found, Tensor) else None

    @staticmethod
    def _labeled(logits: Tensor, labels: Tensor) -> Tensor:
        """Log-probabilities at the first `TOKENS` positions whose next token has a label."""
        index = next_token_mask(labels).reshape(-1).nonzero().squeeze(1)[:TOKENS]
        return log_softmax(logits[:, :-1].reshape(-1, logits.shape[-1])[index])

    @property
    def trains_on_teacher(self) -> bool:
        """Whether the training loss reads the teacher."""
        return self.module.teacher is not None and not self.module.labels_only
