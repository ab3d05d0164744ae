"""The Lightning module: wiring only, and the one place that divides by the number of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from kd_lightning.console import enable_info_logging, progress_bar_enabled
from kd_lightning.constants import moves_objective
from kd_lightning.data.base import datamodule_of, max_length_of, tokenizer_of
from kd_lightning.distributed.checkpoint_io import install_checkpoint_io
from kd_lightning.distributed.collectives import check_ranks_agree, sum_over_ranks
from kd_lightning.distributed.dtensor import is_sharded, local_shard, tensor_digest
from kd_lightning.distributed.grad_norm import clip_norm, gradient_norm
from kd_lightning.distributed.trainer import data_parallel_rank, is_fast_dev_run, log_every_n_steps
from kd_lightning.divergences import Divergence, ForwardKL, GeneralizedJSD, ReverseKL, TotalVariation
from kd_lightning.label_losses import LabelLoss
from kd_lightning.losses import DistillationLoss, LossParts, check_names
from kd_lightning.metrics.per_token import TokenMean
from kd_lightning.models.compatibility import check_model_fits_data
from kd_lightning.models.hf_adapter import base_model, eos_token_ids, name_or_path
from kd_lightning.models.loading import check_causal, check_finite, check_tokenizers, load_causal_lm
from kd_lightning.models.lora import LoRA, add_adapters, exclude_base_weights
from kd_lightning.rollout.base import ResponseSource
from kd_lightning.rollout.runner import RolloutRunner
from kd_lightning.schedules import Schedule, Weight
from kd_lightning.seeding import derive_seed, run_seed
from kd_lightning.teachers.base import RunContext, Teacher
from kd_lightning.teachers.cache_writer import Ranks, cache_teacher
from kd_lightning.teachers.hf import as_teacher, parameter_counts
from kd_lightning.training.accumulation import AccumulationWindow, NonFiniteLossCheck
from kd_lightning.training.loss_components import PREFIX, PartialKL, component_loss
from kd_lightning.training.student import StudentWithLoss


class DistillationModule(L.LightningModule):
    r"""A student learns from a frozen teacher: loss = (1 − ce_weight)·KD + ce_weight·label loss, per token.

    Reduces to plain supervised fine-tuning with `teacher=None, ce_weight=1`. Gradients are accumulated as sums and
    divided once by the number of counted tokens (or responses) of the whole accumulation window over all ranks, so
    that a step is the same however its rows are split.

    Args:
        student: folder, hub name or `asset:` name of a Hugging Face causal LM; in Python also a loaded model.
        teacher: a `Teacher`, or a folder, hub name or `asset:` name; in Python also a loaded model; None: no teacher.
        objective: any `Divergence`: a plain one, an `Objective`, a recipe such as `TAID`.
        ce_weight: share of the label loss, in [0, 1].
        temperature: divides both models' logits in the soft loss, > 0.
        reduction: `token_mean`, `sequence_mean` or `sum`.
        responses: where the responses trained on come from; None: the data.
        label_loss: the term on the label's log-probability; None: `CrossEntropy()`.
        optimizer: builds the optimizer from parameters.
        lr_scheduler: builds a scheduler from the optimizer; it steps once per optimizer step.
        monitors: divergences measured in validation and test beside the loss; None: forward and reverse KL, JSD,
            total variation, and forward KL on the teacher's head alone.
        student_init: `pretrained`, or `random` to start from the configuration alone.
        student_kwargs: arguments of `from_pretrained` for the student (`dtype`, `attn_implementation` …).
        teacher_kwargs: the same for the teacher.
        lora: adapters that learn in the student's place; None: all of its parameters learn.
        teacher_cache: write down once, before the first step, what the teacher says about every row of the data, in
            `ROOT/teacher_cache`, and read that from then on; the teacher leaves the memory.

    Raises:
        ValueError: an argument is out of its range, or a model cannot be read.
    """

    student_source: Any
    evaluation_loss: DistillationLoss
    component_loss: DistillationLoss | None

    def __init__(
        self,
        student: str | Any,  # a loaded model too: named here, its type would list every module in `--help`
        teacher: Teacher | str | None = None,
        objective: Divergence = ForwardKL(),  # noqa: B008 - stateless, and so it can be shown and dumped by the command line
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
        teacher_cache: bool = False,
    ) -> None:
        super().__init__()
        if reduction == "none":
            raise ValueError("reduction must be 'token_mean', 'sequence_mean' or 'sum' in training, got 'none'")
        if student_init not in ("pretrained", "random"):
            raise ValueError(f"student_init must be 'pretrained' or 'random', got {student_init!r}")
        if teacher is None and ce_weight != 1:
            raise ValueError(f"ce_weight must be 1 where there is no teacher, got {ce_weight}")
        loaded: Any = student
        if teacher is not None and loaded is teacher and not isinstance(loaded, str):
            raise ValueError(
                "student and teacher must be two objects, as the teacher is frozen: give copy.deepcopy of one"
            )
        object.__setattr__(self, "student_source", student)  # a loaded model is registered under one name: `model`
        self.student_init = student_init
        self.student_kwargs = student_kwargs
        self.lora = lora
        if teacher_cache and (teacher is None or responses is not None):
            reason = "there is no teacher" if teacher is None else f"{type(responses).__name__} writes new ones"
            raise ValueError(f"teacher_cache must be false where no responses can be known beforehand: {reason}")
        self.teacher_cache = teacher_cache
        if teacher_kwargs and isinstance(teacher, Teacher):
            raise ValueError(f"teacher_kwargs {teacher_kwargs} go to the Teacher itself where one is given")
        self.teacher = as_teacher(teacher, teacher_kwargs)
        self.loss = DistillationLoss(
            objective, ce_weight=ce_weight, temperature=temperature, reduction=reduction, label_loss=label_loss
        )
        default: dict[str, Divergence] = {
            "forward_kl": ForwardKL(),
            "reverse_kl": ReverseKL(),
            "jsd": GeneralizedJSD(0.5),
            "total_variation": TotalVariation(),
        }
        wanted = ({} if teacher is None else default) if monitors is None else monitors
        check_names(wanted)
        self.monitors = nn.ModuleDict(wanted)
        head: dict[str, Divergence] = {"head_kl": PartialKL("head")} if wanted is default else {}
        evaluation_loss = DistillationLoss(
            objective,
            ce_weight=ce_weight,
            temperature=temperature,
            reduction=reduction,
            monitors={**wanted, **head},
            diagnostics=True,
        )
        object.__setattr__(self, "evaluation_loss", evaluation_loss)  # made of parts that are registered already
        object.__setattr__(self, "component_loss", None if teacher is None else component_loss(objective))
        self.optimizer_callable = optimizer
        self.lr_scheduler_callable = lr_scheduler
        self.model: StudentWithLoss | None = None
        self.evaluation = nn.ModuleDict()
        self.responses = responses
        self._at_work = RolloutRunner(responses)
        self._window = AccumulationWindow(reduction)
        self._means: dict[str, Tensor] = {}
        self._watch = NonFiniteLossCheck()
        self._rate = 0.0
        self._teacher_device: torch.device | None = None
        self._max_new_tokens = 32
        self._base: str | None = None  # digest of the weights under the adapters, where checkpoints leave them out

    # ------------------------------------------------------------------------------------------------ construction
    @property
    def student(self) -> nn.Module:
        """The student's Hugging Face model (there from `configure_model` on)."""
        if self.model is None:
            raise ValueError("the student is loaded when a Trainer starts (or by `configure_model()`)")
        return self.model.student

    @property
    def tokenizer_name(self) -> str | None:
        """Where the student's tokenizer lies; None where the student came as an object without a folder."""
        source = self.student_source
        return source if isinstance(source, str) else name_or_path(source)

    def setup(self, stage: str) -> None:
        """Compare the two tokenizers, and the ranks, before anything is loaded or trained."""
        install_checkpoint_io(self.trainer.strategy)
        datamodule, tokenizer = datamodule_of(self.trainer), tokenizer_of(self.trainer)
        if self.teacher is not None and tokenizer is not None and self.teacher.name is not None:
            check_tokenizers(self.teacher.name, tokenizer)
        if stage == "fit" and self.trainer.world_size > 1:
            rows = {} if datamodule is None else datamodule.description()
            check_ranks_agree({"loss": repr(self.evaluation_loss), **rows})

    def configure_model(self) -> None:
        """Load student and teacher; Lightning calls this more than once."""
        if self.model is None:
            student: Any = self.student_source
            if not isinstance(student, str):
                check_finite(student, "student")
                check_causal(student.eval(), "student")
            else:
                student = load_causal_lm(student, init=self.student_init, kwargs=self.student_kwargs, role="student")
            if self.lora is not None:
                if isinstance(self.student_source, str) and self.student_init == "pretrained":
                    self._base = tensor_digest(student.named_parameters())
                    exclude_base_weights(self)
                student = add_adapters(student, self.lora)
            self.model = StudentWithLoss(student.train(), self.loss)
            del self.loss  # it lives in the wrapped model, under one name
        self._teacher_device = None
        if self.teacher is not None:
            self.teacher.attach(self.run_context())
            self.teacher.load()
        teacher_model = None if self.teacher is None else self.teacher.model
        for text in check_model_fits_data(self.student, teacher_model, datamodule_of(self._trainer)):
            rank_zero_warn(text)
        if self.responses is not None:
            self.responses.check(self.student, self.teacher, max_length_of(self._trainer))

    def run_context(self) -> RunContext:
        """What the teacher is given of the run; the student is loaded."""
        assert self.model is not None
        return RunContext(
            student=self.model,
            loss=self.model.loss,
            monitors={name: d for name, d in self.monitors.items() if isinstance(d, Divergence)},
            data=datamodule_of(self._trainer),
            generates_responses=self.responses is not None,
            sum_over_ranks=sum_over_ranks(self._trainer),
        )

    def _move_teacher(self) -> None:
        """Have the teacher on the student's device; a no-op once it is there."""
        if self.teacher is not None and self._teacher_device != self.device:
            self.teacher.to(self.device)
            self._teacher_device = self.device

    def configure_optimizers(self) -> Any:
        """Optimizer over the parameters that learn, scheduler stepped once per optimizer step."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError("none of the student's parameters requires a gradient: there is nothing that could learn")
        optimizer = self.optimizer_callable(parameters)
        self._rate = float(optimizer.param_groups[0]["lr"])
        if self.lr_scheduler_callable is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.lr_scheduler_callable(optimizer), "interval": "step"},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights and schedules.

        Raises:
            ValueError: the state is another model's or another objective's.
        """
        try:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        except RuntimeError as error:
            first = str(error).splitlines()[1].strip()
            first = first if len(first) < 200 else f"{first[:200].rpartition(', ')[0]} …"
            raise ValueError(f"the checkpoint belongs to another model or objective: {first}") from error

    def on_fit_start(self) -> None:
        """Say who learns from whom."""
        enable_info_logging()
        rank_zero_info(parameter_counts(self.student, self.teacher))

    # ---------------------------------------------------------------------------------------------------- training
    def on_train_start(self) -> None:
        """Write down what the teacher says, where asked, the callbacks having seen it; catch up with validation."""
        group = self.trainer.optimizers[0].param_groups[0]
        if missing := self.trainer.optimizers[0].defaults.keys() - group.keys():
            kind = type(self.trainer.optimizers[0]).__name__
            raise ValueError(
                f"the checkpoint holds another optimizer than {kind}: no {', '.join(sorted(missing))} in it"
            )
        rate = float(group.get("initial_lr", group["lr"]))
        if rate != self._rate:
            rank_zero_warn(f"the rate goes on from the checkpoint, {rate:g}: {self._rate:g}, as given now, is not used")
        if self.teacher_cache and self.teacher is not None and not is_fast_dev_run(self.trainer):
            self.teacher = self._cached_teacher(self.teacher)
        self._at_work.start(self)

    def _cached_teacher(self, teacher: Teacher) -> Teacher:
        """The teacher, read from `ROOT/teacher_cache` from now on; the cache is written first."""
        assert self.model is not None
        trainer = self.trainer
        datamodule = datamodule_of(trainer)
        if datamodule is None:
            raise ValueError("teacher_cache needs a data module of this package, got a custom one or none")
        if datamodule.sources["test"] and trainer.limit_test_batches != 0:
            datamodule.setup("test")
        folder, ranks = (
            Path(trainer.default_root_dir) / "teacher_cache",
            Ranks(trainer.global_rank, sum_over_ranks(trainer)),
        )
        with trainer.precision_plugin.forward_context():
            return cache_teacher(
                folder, teacher, datamodule, self.model.vocabulary, self.device, ranks, progress_bar_enabled(trainer)
            )

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Randomness of this micro-batch from (seed, counter, rank): stored generator states shift at a resume."""
        self._check_finite()
        counter = self.trainer.fit_loop.epoch_loop.total_batch_idx
        torch.manual_seed(derive_seed(run_seed(), counter, data_parallel_rank(self.trainer)[0]))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Undivided loss of one micro-batch; `on_before_optimizer_step` divides."""
        assert self.model is not None
        self._move_teacher()
        batch, notes = self._at_work.draw(self, batch)
        beside = self.component_loss if self._is_logged() else None
        parts: LossParts = self.model(batch, None if self.labels_only else self.teacher, beside=beside)
        self._window.add(batch, parts, notes)
        self._watch.remember(self.trainer.global_step, batch.get("row_ids"), parts.loss)
        return parts.loss

    def _is_logged(self) -> bool:
        """Whether a logger will see the step under way."""
        every = log_every_n_steps(self.trainer)
        return bool(self.trainer.loggers) and every > 0 and (self.trainer.global_step + 1) % every == 0

    @property
    def labels_only(self) -> bool:
        """Whether the loss is the label loss alone (`ce_weight` is the number 1), so that it never asks the teacher."""
        ce_weight = self.evaluation_loss.ce_weight
        return not isinstance(ce_weight, Schedule) and ce_weight == 1

    @property
    def measured(self) -> tuple[str, ...]:
        """What validation logs, as `val/NAME`."""
        names = self.evaluation_loss.token_loss.names(self.teacher is not None)
        return tuple("ce" if name == "student_nll" else name for name in names if name not in ("loss", "ce"))

    @property
    def objective_moves(self) -> bool:
        """Whether a schedule changes what the objective measures, so that its values are not one curve."""
        return any(moves_objective(name) for name in self.schedules())

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the whole window's divisor, over all ranks; before clipping.

        Lightning has divided every loss by `accumulate_grad_batches` and the strategy averages over ranks: both are
        taken back here, and the divisor is what was really accumulated, also in a last, shorter window.
        """
        divisor, self._means = self._window.close(self._sum_over_ranks)
        grads = [local_shard(p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_mul_(grads, self.trainer.accumulate_grad_batches * data_parallel_rank(self.trainer)[1] / divisor)
        if self._is_logged():
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self._means["grad_norm"] = gradient_norm(parameters, self.device)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by Lightning's means; a norm of what is sharded in several ways is taken here."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm") and any(is_sharded(p) for p in parameters):
            clip_norm(parameters, gradient_clip_val, self.device)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def _sum_over_ranks(self, totals: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return totals
        summed: Tensor = self.trainer.strategy.reduce(totals, reduce_op="sum")
        return (
            summed * data_parallel_rank(self.trainer)[1] / self.trainer.world_size
        )  # the same rows may be on several ranks

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then move the schedules: at the end of the batch the checkpoints are already written."""
        super().optimizer_step(*args, **kwargs)
        total = self.trainer.estimated_stepping_batches
        progress = (self.trainer.global_step + 1) / total if total and total != float("inf") else 0.0
        stats = {**self._means, "epoch": torch.tensor(self._passes())}
        for schedule in self.schedules().values():
            schedule.update(min(progress, 1.0), stats)

    def _passes(self) -> float:
        """How many passes over the data are done with this batch; Lightning's epoch skips a number at a resume."""
        batches = self.trainer.fit_loop.epoch_loop.total_batch_idx + 1
        return batches / self.trainer.num_training_batches  # 0 where the data has no end

    def schedules(self) -> dict[str, Schedule]:
        """Every schedule of the loss by its dotted path in the objective (or `ce_weight`)."""
        loss = self.loss if self.model is None else self.model.loss
        found = {name: part for name, part in loss.objective.named_modules() if isinstance(part, Schedule)}
        if isinstance(loss.ce_weight, Schedule):
            found["ce_weight"] = loss.ce_weight
        for name, part in () if self.responses is None else self.responses.named_modules():
            if isinstance(part, Schedule):
                found[f"responses.{name}"] = part
        return found

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the means of the window that has just stepped."""
        if not self._means:
            return
        means, self._means = self._means, {}
        names = ("loss", "kd", "ce", "student_share", "grad_norm", *sorted(self._at_work.names))
        scalars = {f"train/{name}": means[name] for name in names if name in means}
        scalars |= {name: means[name] for name in means if name.startswith(PREFIX)}
        for path, schedule in self.schedules().items():
            value = means.get(f"schedule/{path}", schedule())
            if value.ndim == 0:
                scalars[f"schedule/{path}"] = value
        self.log("train/loss", scalars.pop("train/loss"), prog_bar=True)
        self.log_dict(scalars)

    def _check_finite(self) -> None:
        self._watch.check(self._places)

    def _places(self, row_ids: list[int]) -> str:
        """File and line of rows where the data module knows them."""
        datamodule = datamodule_of(self.trainer)
        return ", ".join(map(str, row_ids) if datamodule is None else datamodule.row_locations("train", row_ids))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep a step that was not finite out of the checkpoints; say which weights the adapters belong to."""
        self._check_finite()
        if self._base is not None:
            checkpoint["lora_base"] = self._base

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse adapters that learnt on other weights."""
        theirs = checkpoint.get("lora_base", self._base)
        if self._base is not None and theirs != self._base:
            raise ValueError(
                f"the checkpoint holds adapters of another model than {self.student_source}: its weights have digest "
                f"{str(theirs)[:12]}, here they have {self._base[:12]}"
            )

    def on_train_end(self) -> None:
        """Look at the last step's loss too."""
        self._check_finite()

    # -------------------------------------------------------------------------------------------------- evaluation
    def on_validation_epoch_start(self) -> None:
        """Look at the last step's loss before its student is measured."""
        self._check_finite()

    def on_validation_epoch_end(self) -> None:
        """Let the source of responses hear of it."""
        self._at_work.hear(self)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Measure one batch under `val/`; what was measured of each counted token, for callbacks."""
        return self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Measure one batch under `test/`; what was measured of each counted token, for callbacks."""
        return self._evaluate(batch, "test")

    def evaluate_batch(self, batch: dict[str, Tensor]) -> LossParts:
        """Loss, monitors and diagnostics of one batch, without gradient and in eval mode."""
        assert self.model is not None
        self._move_teacher()
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            parts: LossParts = self.model(batch, self.teacher, self.evaluation_loss)
        self.model.train(training)
        return parts

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> dict[str, Tensor]:
        values = dict(self.evaluate_batch(batch).values)
        values["ce"] = values.pop("student_nll")
        values.pop("loss")
        for name, value in values.items():
            key = f"{stage}_{name}"
            if key not in self.evaluation:
                self.evaluation[key] = TokenMean().to(self.device)
            metric: Any = self.evaluation[key]
            metric.update(value)
            self.log(
                f"{stage}/{name}",
                metric,
                metric_attribute=f"evaluation.{key}",
                prog_bar=name == "kd",
                on_epoch=True,
                on_step=False,
            )
        return values

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Greedy responses to left-padded prompts.

        Returns:
            `row_ids` [B]; `responses`, token ids [B, up to max_new_tokens]; `finished` [B], whether a response has
            ended, or was cut.
        """
        from kd_lightning.models.generate import generate

        responses = generate(self.student, batch["input_ids"], batch["attention_mask"], self._max_new_tokens)
        ends = torch.tensor(eos_token_ids(base_model(self.student)), dtype=responses.dtype, device=responses.device)
        return {"row_ids": batch["row_ids"], "responses": responses, "finished": torch.isin(responses, ends).any(1)}

    def set_max_new_tokens(self, max_new_tokens: int) -> None:
        """Set the longest response of `predict_step`, in tokens; it is 32 otherwise.

        Raises:
            ValueError: it is below 1.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self._max_new_tokens = max_new_tokens
