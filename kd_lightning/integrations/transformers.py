"""The losses inside Hugging Face's `Trainer`, and trainers made from it such as TRL's `SFTTrainer`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kd_lightning.divergences import Divergence, ForwardKL
from kd_lightning.engine.head import Head
from kd_lightning.label_losses import LabelLoss
from kd_lightning.losses import DistillationLoss
from kd_lightning.losses.accumulation import AccumulationWindow
from kd_lightning.losses.batch import Alignment
from kd_lightning.losses.schedule_updates import update_from_means
from kd_lightning.models.hf_adapter import base_model
from kd_lightning.schedules import Weight
from kd_lightning.teachers.base import RunContext, Teacher
from kd_lightning.teachers.hf import as_teacher
from kd_lightning.training.student import ForwardPass, StudentWithLoss

SAME_TOKENS = Alignment(None, None, None)
SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
"""Distributed types of Accelerate whose LM head cannot be read outside of the model's forward."""


class DistillationMixin(Trainer):
    r"""Distillation in Hugging Face's `Trainer`: the loss is (1 − ce_weight)·KD + ce_weight·label loss, per token.

    Write it before the trainer: `class KDTrainer(DistillationMixin, Trainer)`, or `SFTTrainer` of TRL instead. The loss
    is computed from hidden states and divided by the labeled tokens of the whole accumulation window over all ranks
    (`num_items_in_batch`), so that a step does not depend on micro-batches and ranks. "kd" and "ce" are logged.

    Reduces to the `Trainer` itself with `teacher=None, ce_weight=1`.

    Args:
        args: arguments of the trainer.
        teacher: a causal LM, a `Teacher`, or a folder, hub name or `asset:` name; None: no teacher.
        objective: any `Divergence`; None: `ForwardKL()`.
        ce_weight: weight of the label loss, in [0, 1], or a schedule.
        temperature: divides the logits of both models in the divergence, > 0.
        label_loss: the term on the label's log-probability; None: `CrossEntropy()`.
        teacher_kwargs: arguments of `from_pretrained` for a teacher that is given by name.
        kwargs: arguments of the trainer.

    Raises:
        ValueError: an argument is out of range; the model is sharded (FSDP, DeepSpeed) or rows are packed: the
            `DistillationModule` of this package does that.
    """

    def __init__(
        self,
        *args: Any,
        teacher: Any = None,
        objective: Divergence | None = None,
        ce_weight: Weight = 0.0,
        temperature: float = 1.0,
        label_loss: LabelLoss | None = None,
        teacher_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.distillation_loss = DistillationLoss(
            ForwardKL() if objective is None else objective,
            ce_weight=ce_weight,
            temperature=temperature,
            label_loss=label_loss,
        )
        self.teacher: Teacher | None = as_teacher(teacher, teacher_kwargs)
        if self.teacher is None and self.distillation_loss.reads_teacher:
            raise ValueError("teacher must be given unless ce_weight is 1, got None")
        super().__init__(*args, **kwargs)
        kind = str(self.accelerator.distributed_type.value)
        if kind in SHARDED:
            raise ValueError(
                f"DistillationMixin cannot train a model that is sharded by {kind}: use DistillationModule with "
                "--trainer.strategy fsdp2, or one process per GPU with the whole model"
            )
        self.model_accepts_loss_kwargs = True  # `compute_loss` divides by `num_items_in_batch`
        self.loss_is_scaled_for_ga = None
        self._loss_shifts_labels = True
        self._student = StudentWithLoss(self.accelerator.unwrap_model(self.model), self.distillation_loss)
        self._window = AccumulationWindow("token_mean")
        self._means: dict[str, Tensor] = {}
        if self.teacher is not None:
            self.teacher.attach(RunContext(student=self._student, loss=self.distillation_loss))
            self.teacher.load(self.args.device)
        self.distillation_loss.to(self.args.device)
        self.add_callback(_AfterStep(self))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The divided loss of a batch.

        Args:
            model: the student, possibly wrapped by DDP.
            inputs: `input_ids`, `attention_mask`, `labels`, each [B, T]; labels are shifted here.
            return_outputs: whether the student's outputs are returned too.
            num_items_in_batch: labeled tokens of the accumulation window over all ranks; None: those of the batch.

        Raises:
            ValueError: there are no labels, or rows are packed.
        """
        batch = _checked(inputs)
        training = model.training
        outputs, forward = self._run(model, batch, whole=return_outputs or not training)
        parts = forward.loss(self.distillation_loss)
        if training:
            self._window.add(parts, batch)
        loss = parts.divided(by=num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP averages over the ranks
        return (loss, outputs) if return_outputs else loss

    def _run(self, model: nn.Module, batch: dict[str, Tensor], whole: bool) -> tuple[Any, ForwardPass]:
        """Run the teacher, then the student through what wraps it; its hidden states are read on the way."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        labels: Tensor = batch["labels"][:, 1:]
        columns: dict[str, Tensor] = {}
        teacher = self.teacher if self.distillation_loss.reads_teacher else None
        head: Head | None = self._student.head()
        known, known_head = None, None if teacher is None else teacher.head
        if teacher is not None:
            fused = head is not None and known_head is not None
            known = teacher.hidden(inputs)[:, :-1] if fused else teacher.logits(inputs)[:, :-1]
        if head is None or self._student.body is None or (isinstance(known, Tensor) and known_head is None):
            outputs = model(**inputs, use_cache=False)
            return outputs, ForwardPass(outputs.logits[:, :-1], None, known, None, labels, columns, SAME_TOKENS)
        fewer = {} if whole else self._one_position()
        with _hidden_states(self._student.body) as seen:
            outputs = model(**inputs, use_cache=False, **fewer)
        (hidden,) = seen
        return outputs, ForwardPass(hidden[:, :-1], head, known, known_head, labels, columns, SAME_TOKENS)

    def _one_position(self) -> dict[str, int]:
        """The argument by which a model computes the logits of one position alone, if it has it."""
        parameters = inspect.signature(base_model(self._student.student).forward).parameters
        return {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    def finish_step(self, progress: float) -> None:
        """Let teacher and schedules follow an optimizer step.

        Args:
            progress: share of the run that is done, in [0, 1].
        """
        if self.teacher is not None:
            self.teacher.after_step()
        _, self._means = self._window.close(self._sum_over_ranks)
        loss = self.distillation_loss
        update_from_means(loss.schedules(), loss.objective.weighted(), progress, self._means)

    def _sum_over_ranks(self, totals: Tensor) -> Tensor:
        summed: Tensor = self.accelerator.reduce(totals, reduction="sum")
        return summed

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the terms of the loss of the last step beside the loss."""
        if "loss" in logs:
            logs = {**logs, **{name: float(self._means[name]) for name in ("kd", "ce") if name in self._means}}
        super().log(logs, *args, **kwargs)


class _AfterStep(TrainerCallback):
    """Calls `finish_step` after each optimizer step."""

    def __init__(self, trainer: DistillationMixin) -> None:
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """After the optimizer has stepped."""
        self.trainer.finish_step(min(1.0, state.global_step / max(1, state.max_steps)))


def _checked(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a batch that are used."""
    if "labels" not in inputs:
        raise ValueError("labels must be in the batch: use a data collator that makes them, got none")
    if "position_ids" in inputs or "seq_idx" in inputs:
        raise ValueError("packed rows (position_ids) are not supported by DistillationMixin: turn packing off")
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    return {"input_ids": ids, "attention_mask": mask, "labels": inputs["labels"]}


@contextmanager
def _hidden_states(body: nn.Module) -> Iterator[list[Tensor]]:
    """While it is entered, the hidden states that a backbone returns are appended to a list."""
    seen: list[Tensor] = []

    def read(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output.last_hidden_state)

    handle = body.register_forward_hook(read)
    try:
        yield seen
    finally:
        handle.remove()
