"""The Lightning module that distills a student: it connects models, loss, data and rollout."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from kd_lightning.console import enable_info_logging
from kd_lightning.constants import moves_objective
from kd_lightning.data.alignment.two_tokenizers import TeacherTokenizers
from kd_lightning.data.base import datamodule_of, max_length_of
from kd_lightning.distributed.checkpoint_io import install_checkpoint_io
from kd_lightning.distributed.collectives import check_ranks_agree, sum_over_ranks
from kd_lightning.distributed.trainer import data_parallel_rank, forward_context, is_fast_dev_run
from kd_lightning.divergences import Divergence, ForwardKL, WeightedTokens, described
from kd_lightning.label_losses import LabelLoss
from kd_lightning.losses import DistillationLoss, LossParts
from kd_lightning.models.lora import LoRA, exclude_frozen_weights
from kd_lightning.rollout.base import ResponseSource
from kd_lightning.rollout.runner import RolloutRunner
from kd_lightning.rollout.sampled_tokens import check_label_columns, check_sampled_tokens
from kd_lightning.schedules import Schedule, Weight, check_flag
from kd_lightning.seeding import derive_seed, run_seed
from kd_lightning.teachers.base import RunContext, Teacher
from kd_lightning.teachers.hf import as_teacher, parameter_counts
from kd_lightning.training.arguments import check_models, check_reduction, check_teacher_cache, check_types
from kd_lightning.training.evaluation import evaluate_batch, validation_ce
from kd_lightning.training.optimization import AccumulatingModule
from kd_lightning.training.prediction import PredictingModule
from kd_lightning.training.reporter import EvaluationReporter
from kd_lightning.training.student import StudentWithLoss
from kd_lightning.training.student_source import StudentSource
from kd_lightning.training.teacher_setup import cached_teacher, compare_tokenizers, load_teacher, tokenizers_of


class DistillationModule(PredictingModule, AccumulatingModule):
    r"""Train a student on a frozen teacher: loss = (1 − ce_weight)·KD + ce_weight·label loss, per token.

    Reduces to supervised fine-tuning with `teacher=None, ce_weight=1`. Gradients are sums, divided once by the number
    of labeled tokens (or responses) of the step on all ranks: a step is the same however its rows are split.

    Args:
        student: folder, hub name or `asset:` name of a Hugging Face causal LM; in Python also a loaded model.
        teacher: a `Teacher`, or a folder, hub name or `asset:` name; in Python also a loaded model; None: no teacher.
        objective: any `Divergence`: a plain one, an `Objective`, or a recipe such as `TAID`.
        ce_weight: weight of the label loss, in [0, 1].
        temperature: divides the logits of both models in the divergence, > 0.
        reduction: `token_mean`, `sequence_mean` or `sum`.
        responses: source of the responses that are trained on; None: those of the data.
        label_loss: the term on the label's log-probability; None: `CrossEntropy()`.
        optimizer: builds the optimizer from the trainable parameters.
        lr_scheduler: builds a scheduler from the optimizer; it steps once per optimizer step.
        monitors: divergences measured in validation and test, independent of the loss; None: forward and reverse KL,
            JSD, total variation, and forward KL on the top of the teacher's distribution (`head_kl`).
        student_init: `pretrained`, or `random` to start from the configuration alone.
        student_kwargs: arguments of `from_pretrained` for the student (`dtype`, `quantization_config` …).
        teacher_kwargs: the same for the teacher.
        lora: train adapters instead of the student's parameters; None: all parameters are trained.
        gradient_checkpointing: recompute the student's layers in backward: less memory, one more forward pass.
        teacher_cache: cache the teacher's outputs for all rows in `ROOT/teacher_cache` before step 0, and unload it.

    Raises:
        ValueError: an argument is out of its range, or a model cannot be read.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from kd_lightning import DistillationModule, InstructionDataModule
        >>> module = DistillationModule("asset:student", "asset:teacher", ce_weight=0.1)
        >>> trainer = Trainer(accelerator="cpu", fast_dev_run=2, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(module, InstructionDataModule("asset:text_validation", "asset:text_validation", batch_size=2))
        >>> trainer.global_step
        2
    """

    def __init__(
        self,
        student: str | Any,  # also a loaded model: named here, its type would list every module in `--help`
        teacher: Teacher | str | None = None,
        objective: Divergence = ForwardKL(),  # noqa: B008 - stateless; an instance can be shown and dumped by the CLI
        *,
        ce_weight: Weight = 0.0,
        temperature: float = 1.0,
        reduction: str = "token_mean",
        responses: ResponseSource | None = None,
        label_loss: LabelLoss | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        monitors: dict[str, Divergence] | None = None,
        student_init: str = "pretrained",
        student_kwargs: dict[str, Any] | None = None,
        teacher_kwargs: dict[str, Any] | None = None,
        lora: LoRA | None = None,
        gradient_checkpointing: bool = False,
        teacher_cache: bool = False,
    ) -> None:
        super().__init__(reduction, optimizer, lr_scheduler)
        check_types(
            student=student,
            teacher=teacher,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            student_kwargs=student_kwargs,
            teacher_kwargs=teacher_kwargs,
            lora=lora,
        )
        check_reduction(reduction)
        check_flag("gradient_checkpointing", gradient_checkpointing)
        check_flag("teacher_cache", teacher_cache)
        if responses is not None and not isinstance(responses, ResponseSource):
            raise ValueError(f"responses must be a ResponseSource or None, got {described(responses)}")
        check_models(student, teacher, student_init, teacher_kwargs, ce_weight)
        if teacher_cache:
            check_teacher_cache(teacher, responses)
        loss = DistillationLoss(
            objective, ce_weight=ce_weight, temperature=temperature, reduction=reduction, label_loss=label_loss
        )
        check_sampled_tokens(label_loss, temperature, responses)
        self.student_source = StudentSource(student, student_init, student_kwargs, lora, gradient_checkpointing)
        self.teacher = as_teacher(teacher, teacher_kwargs)
        self.teacher_cache = teacher_cache
        self.reporter = EvaluationReporter(loss, self.teacher, monitors)
        self.monitors = self.reporter.monitors
        self.evaluation = self.reporter.metrics
        self.responses = responses
        self.rollout = RolloutRunner(responses)
        self.model = StudentWithLoss(None, loss)
        self.teacher_state: nn.Module | None = None  # tensors of the teacher that belong into checkpoints
        self._teacher_device: torch.device | None = None
        self._base_digest: str | None = None  # of the weights under the adapters, if checkpoints leave them out

    # ------------------------------------------------------------------------------------------------ construction
    @property
    def student(self) -> nn.Module:
        """The student's Hugging Face model; loaded by `configure_model`."""
        if not self.model.has_student:
            raise ValueError("the student is not loaded yet: a Trainer does it at its start, or call configure_model()")
        return self.model.student

    @property
    def loss(self) -> DistillationLoss:
        """The training loss."""
        return self.model.loss

    @property
    def lora(self) -> LoRA | None:
        """The adapters that are trained; None: all parameters are."""
        return self.student_source.lora

    @property
    def tokenizer_name(self) -> str | None:
        """Folder or hub name of the student's tokenizer; None for a loaded model without a name."""
        return self.student_source.name

    @property
    def teacher_tokenizer_name(self) -> str | TeacherTokenizers | None:
        """Folder or hub name of the teacher's tokenizer, or those of several; None if it has none of its own."""
        return tokenizers_of(self.teacher)

    def setup(self, stage: str) -> None:
        """Compare the two tokenizers, and the ranks, before anything is loaded or trained."""
        install_checkpoint_io(self.trainer.strategy)
        datamodule = datamodule_of(self.trainer)
        compare_tokenizers(self.trainer, self.teacher, self.model, self.reporter)
        check_label_columns(self.loss.token_loss.label_loss, self.teacher, self.responses, datamodule is not None)
        if stage == "fit" and self.trainer.world_size > 1:
            check_ranks_agree({"loss": repr(self.reporter.loss), **(datamodule.description() if datamodule else {})})

    def configure_model(self) -> None:
        """Load student and teacher; Lightning calls this more than once."""
        if not self.model.has_student:
            student, self._base_digest = self.student_source.load()
            self.model.set_student(student)
            if self._base_digest is not None:
                exclude_frozen_weights(self, "model.student")
        data = datamodule_of(self._trainer)
        if data is not None and data.packing:
            self.model.pack_rows()
        self.teacher_state = load_teacher(self.teacher, self.run_context(), data)
        self._teacher_device = None
        if self.responses is not None:
            self.responses.check(self.student, self.teacher, max_length_of(self._trainer))
            self.rollout.read_ahead(self._trainer)

    def run_context(self) -> RunContext:
        """What the teacher is given of the run; the student must be loaded."""
        data, sums = datamodule_of(self._trainer), sum_over_ranks(self._trainer)
        return RunContext(self.model, self.loss, self.reporter.divergences, data, self.generates_responses, sums)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the digest of the weights that the adapters belong to."""
        super().on_save_checkpoint(checkpoint)
        if self._base_digest is not None:
            checkpoint["lora_base"] = self._base_digest

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse adapters that were trained on other weights."""
        saved = checkpoint.get("lora_base", self._base_digest)
        if self._base_digest is not None and saved != self._base_digest:
            raise ValueError(
                f"the checkpoint holds adapters of another model than {self.tokenizer_name}: its base weights have "
                f"digest {str(saved)[:12]}, these have {self._base_digest[:12]}; pass the student it was trained on"
            )

    # ---------------------------------------------------------------------------------------------------- training
    def on_fit_start(self) -> None:
        """Log the numbers of parameters."""
        enable_info_logging()
        rank_zero_info(parameter_counts(self.student, self.teacher))

    def on_train_start(self) -> None:
        """Check the restored optimizer, cache the teacher if asked, and catch up on a validation after a resume."""
        super().on_train_start()
        if self.teacher_cache and self.teacher is not None and not is_fast_dev_run(self.trainer):
            self.teacher = cached_teacher(self.trainer, self.teacher, self.model.vocabulary, self.device)
        self.rollout.start(self.trainer, self.model)
        self.rollout.after_resume(self.trainer, lambda: validation_ce(self.trainer, self))

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Seed this micro-batch from (seed, counter, rank): restored generator states would be shifted at a resume."""
        super().on_train_batch_start(batch, batch_idx)
        counter = self.trainer.fit_loop.epoch_loop.total_batch_idx
        torch.manual_seed(derive_seed(run_seed(), counter, data_parallel_rank(self.trainer)[0]))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Undivided loss of one micro-batch; `on_before_optimizer_step` divides the gradients."""
        self._move_teacher()
        batch, notes = self.rollout.draw(batch, self.model, self.teacher, self.trainer)
        components = self.reporter.components if self.is_logged_step() else None
        teacher = None if self.labels_only else self.teacher
        parts: LossParts = self.model(batch, teacher, components=components)
        self.accumulate(batch, parts, notes)
        return parts.loss

    def _move_teacher(self) -> None:
        """Move the teacher to the student's device, once."""
        if self.teacher is not None and self._teacher_device != self.device:
            self.teacher.to(self.device)
            self._teacher_device = self.device

    def schedules(self) -> dict[str, Schedule]:
        """Every schedule of the run by its dotted path in the objective (or `ce_weight`, or under `responses`)."""
        inside = () if self.responses is None else self.responses.named_modules()
        return self.loss.schedules() | {f"responses.{name}": x for name, x in inside if isinstance(x, Schedule)}

    def weighted(self) -> dict[str, WeightedTokens]:
        """Every divergence of the training objective that weights its tokens, by its dotted path."""
        return self.loss.objective.weighted()

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the means of the window after its step."""
        if means := self.take_means():
            scalars = self.reporter.training_scalars(means, self.schedules(), self.rollout.names)
            self.log("train/loss", scalars.pop("train/loss"), prog_bar=True)
            self.log_dict(scalars)

    def row_locations(self, row_ids: list[int]) -> str:
        """File and line of rows if the data module knows them, else their numbers."""
        datamodule = datamodule_of(self.trainer)
        return ", ".join(map(str, row_ids) if datamodule is None else datamodule.row_locations("train", row_ids))

    # ----------------------------------------------------------------------------------------- what others may ask
    @property
    def labels_only(self) -> bool:
        """Whether the loss reads nothing of a teacher (`ce_weight` is the number 1), so that no step runs it."""
        return self.teacher is None or not self.loss.reads_teacher

    @property
    def objective_moves(self) -> bool:
        """Whether the objective changes during training, so that its values at two steps are not comparable."""
        weights_move = any(part.moves for part in self.weighted().values())
        return weights_move or any(moves_objective(name) for name in self.schedules())

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of the values that validation logs as `val/NAME`."""
        return self.reporter.names

    @property
    def generates_responses(self) -> bool:
        """Whether a response source generates responses during training."""
        return self.responses is not None

    def take_generated_batch(self) -> dict[str, Tensor] | None:
        """The last batch of generated responses, once; None if there is no new one."""
        return self.rollout.take_generated_batch()

    def disable_rollout(self) -> None:
        """Train on the batches of the data as they are; `responses` stays as it was given."""
        self.rollout = RolloutRunner(None)

    # -------------------------------------------------------------------------------------------------- evaluation
    def on_validation_epoch_end(self) -> None:
        """Give the validation loss to the response source."""
        super().on_validation_epoch_end()
        self.rollout.after_validation(self.trainer, lambda: self.reporter.mean("val", "ce"))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Measure one batch under `val/`; returns the values of each labeled token, for callbacks."""
        return self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Measure one batch under `test/`; returns the values of each labeled token, for callbacks."""
        return self._evaluate(batch, "test")

    def evaluate_batch(self, batch: dict[str, Tensor]) -> LossParts:
        """Loss, monitors and diagnostics of one batch, without gradient, in eval mode and in the run's precision."""
        self._move_teacher()
        with forward_context(self._trainer):
            return evaluate_batch(self.model, batch, self.teacher, self.reporter.loss)

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> dict[str, Tensor]:
        values = self.reporter.values(self.evaluate_batch(batch), batch["labels"][:, 1:])
        for name, path, metric in self.reporter.update(stage, values, batch, self.device):
            bar = name == f"{stage}/kd"
            self.log(name, metric, prog_bar=bar, on_epoch=True, on_step=False, metric_attribute=path)
        return values
