"""One optimizer step of a run on fake tensors: no weights, no device, no other ranks; bytes by kind."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from kd_lightning.console import progress_bar
from kd_lightning.constants import TEACHER_FIELDS, TEACHER_INDEX, TEACHER_POSITIONS
from kd_lightning.distributed.dtensor import is_sharded, local_shard
from kd_lightning.distributed.fsdp2 import transformer_layers
from kd_lightning.distributed.trainer import gradients_are_bucket_views
from kd_lightning.engine import chunked as engine
from kd_lightning.engine.vocabulary_map import VocabularyMap
from kd_lightning.memory_plan.fake_models import FewChunks, set_fake_student, set_fake_teacher
from kd_lightning.memory_plan.figures import Holding, Plan
from kd_lightning.memory_plan.tracker import ELSEWHERE, Tracker, nbytes
from kd_lightning.models.hf_adapter import output_embeddings, weight_and_bias
from kd_lightning.module import DistillationModule
from kd_lightning.strategies import FSDP2Strategy
from kd_lightning.teachers.base import Teacher

COLUMNS = ("advantage", "old_log_prob", "importance")  # that response sources add
FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20  # bytes that DDP sends at a time


class StepSimulation:
    """The optimizer step of a run on fake tensors, as Lightning's loop runs it.

    Args:
        module: not loaded; it must not be used afterwards.
        trainer: of as many CPU devices as there are ranks.
        plan: receives the figures.
        gpu: whether the plan is for GPUs.
        own_input: whether the teacher has an input of its own; it is assumed to be as long as the student's.
        vocabulary_map: the tokens that student and teacher share, if they have two tokenizers; every label is assumed
            to have a position of the teacher.
    """

    def __init__(
        self,
        module: DistillationModule,
        trainer: L.Trainer,
        plan: Plan,
        gpu: bool,
        own_input: bool = False,
        vocabulary_map: VocabularyMap | None = None,
    ) -> None:
        self.module, self.trainer, self.plan, self.gpu, self.own_input = module, trainer, plan, gpu, own_input
        self.vocabulary_map = vocabulary_map
        self.strategy = trainer.strategy
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.tracker = Tracker(self.fake)
        self.on_host: list[Tensor] = []  # layers of the teacher
        self.offloaded = gpu and isinstance(trainer.strategy, FSDP2Strategy) and trainer.strategy.cpu_offload

    def run(self) -> None:
        """Build the models, run the step, and write the figures into the plan."""
        for _ in progress_bar(self._stages(), "Planning", total=5):
            pass

    def _stages(self) -> Iterator[None]:
        self._build_models()
        yield
        self._shard()
        yield
        optimizer = self._make_optimizer()
        yield
        self._name_memory(optimizer)
        yield
        self._step(optimizer)
        self._write_figures(optimizer)
        yield

    def _build_models(self) -> None:
        module = self.module
        precision = self.trainer.precision_plugin
        with precision.train_step_context():
            set_fake_student(module, precision.precision, self.fake)
            on_host = set_fake_teacher(module, self.fake)
        if module.responses is not None:
            module.disable_rollout()
            self.plan.notes.append("generation of responses within a step, and its KV cache, are not included")
        for model in on_host if self.gpu else ():
            self._count_layer_copies(model)
        if (count := len(self._teachers())) > 1:
            self.plan.notes.append(f"the rows of a batch are assumed to name the {count} teachers in turn")
        if module.teacher_cache:
            self.plan.notes.append("the teacher is loaded only while its cache is written, before the first step")

    def _count_layer_copies(self, model: nn.Module) -> None:
        """Layers are in host memory and are copied to the GPU for their forward."""
        for layer in transformer_layers(model):
            count = functools.partial(self._count_copy, nbytes(layer.parameters()))
            layer.register_forward_pre_hook(functools.partial(count, 1))
            layer.register_forward_hook(functools.partial(count, -1))
            self.on_host += layer.parameters()

    def _count_copy(self, size: int, sign: int, *_: Any) -> None:
        self.tracker.add("gathered", sign * size)

    def _shard(self) -> None:
        """Set up the strategy and shard the models."""
        self.module.trainer = self.trainer
        self.strategy.connect(self.module)
        self.strategy.setup_environment()
        if isinstance(self.strategy, FSDP2Strategy):
            with self.tracker, FewChunks():
                self.strategy.shard(self.module)

    def _make_optimizer(self) -> Optimizer:
        found = self.module.configure_optimizers()
        optimizer: Optimizer = found["optimizer"] if isinstance(found, dict) else found
        for group in optimizer.param_groups:
            group.update({name: False for name in ("foreach", "fused") if name in group})
        self.strategy.optimizers = [optimizer]
        with self.tracker:  # creates the state that an earlier step would have left
            for parameter in self._trainable():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
        return optimizer

    def _trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.module.model.parameters() if parameter.requires_grad]

    def _teachers(self) -> list[Teacher]:
        return [] if self.module.teacher is None else list(self.module.teacher.members.values())

    def _tensors(self) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
        """Parameters and buffers of the student, and of all teachers without what they share with the student."""
        student = self.module.model
        own = {_storage(tensor) for tensor in (*student.parameters(), *student.buffers())}
        models = [teacher.model for teacher in self._teachers() if teacher.model is not None]
        states = [teacher.state for teacher in self._teachers() if teacher.state is not None]
        parameters: list[Tensor] = [
            x for model in (*models, *states) for x in model.parameters() if _storage(x) not in own
        ]
        heads = [t.head for t in self._teachers() if t.model is None and not t.shares_student]
        parameters += [head.weight for head in heads if head is not None]  # of caches
        buffers = [x for model in models for x in model.buffers() if _storage(x) not in own]
        found: dict[str, tuple[list[Tensor], list[Tensor]]] = {
            "student": (list(student.parameters()), list(student.buffers()))
        }
        if self._teachers():
            found["teacher"] = (parameters, buffers)
        return found

    # --------------------------------------------------------------------------------------------------------- the step
    def _name_memory(self, optimizer: Optimizer) -> None:
        """Name the memory that is held from step to step."""
        hold = self.tracker.hold
        for name, (parameters, buffers) in self._tensors().items():
            hold(ELSEWHERE if self.offloaded else f"{name}.parameters", parameters)
            hold(f"{name}.buffers", buffers)
        hold(ELSEWHERE, self.on_host)
        hold(ELSEWHERE if self.offloaded else "student.optimizer", _state(optimizer))
        self._name_gradients()
        if self.plan.strategy == "ddp" and not gradients_are_bucket_views(self.strategy):
            self.plan.buckets = nbytes(self._gradients())
            self.tracker.add("buckets", self.plan.buckets)

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._trainable() if parameter.grad is not None]

    def _name_gradients(self) -> None:
        self.tracker.hold(ELSEWHERE if self.offloaded else "student.gradients", self._gradients())

    def _step(self, optimizer: Optimizer) -> None:
        """One accumulation window as Lightning runs it: the last gradients are held until the first backward."""
        module, trainer, tracker = self.module, self.trainer, self.tracker
        tracker.widths = dict.fromkeys(map(engine.padded_width, self._tile_widths()), "tiles")
        batch = self._batch()
        tracker.hold("activations", batch.values())

        def hold(parameter: Tensor) -> None:
            assert parameter.grad is not None
            tracker.hold("student.gradients", [parameter.grad])

        for parameter in self._trainable():
            if not is_sharded(parameter):
                parameter.register_post_accumulate_grad_hook(hold)  # type: ignore[no-untyped-call]
        accumulate = trainer.accumulate_grad_batches
        with engine.chunks_sized_for(torch.device("cuda") if self.gpu else None), tracker:
            if accumulate > 1:  # the first one stands for all but the last
                before = (Counter(tracker.collectives), Counter(tracker.collective_bytes))
                self._micro_batch(batch, 0, optimizer, last=False)
                for now, then in zip((tracker.collectives, tracker.collective_bytes), before, strict=True):
                    now.update({name: (accumulate - 2) * (now[name] - then[name]) for name in now})
            self._micro_batch(batch, min(accumulate, 2) - 1, optimizer, last=True)
            module.on_before_optimizer_step(optimizer)
            module.configure_gradient_clipping(optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm)
            optimizer.step()
            if module.teacher is not None:
                module.teacher.after_step()

    def _micro_batch(self, batch: dict[str, Tensor], index: int, optimizer: Optimizer, last: bool) -> None:
        """Forward and backward; as Lightning does, gradients are reset after the first forward of a window."""
        strategy = self.strategy
        with strategy.block_backward_sync() if isinstance(strategy, FSDP2Strategy) and not last else nullcontext():
            with self.trainer.precision_plugin.train_step_context():
                loss: Any = self.module.training_step(batch, index)
            if index == 0:
                optimizer.zero_grad()
            loss.backward()
            del loss
        self._name_gradients()

    def _tile_widths(self) -> list[int]:
        """Columns of the logits that the engine holds a chunk of, by which tiles are recognized."""
        known, loss = self.vocabulary_map, self.module.model.loss
        if known is not None:  # `ChunkLikelihood` projects each model at its own tokens
            return [known.student_size, *([known.teacher_size] if loss.token_loss.reads_chunks else [])]
        own, teachers = _vocabulary(self.module.model.student), self._teachers()
        others = [t.vocabulary if t.model is None else _vocabulary(t.model) for t in teachers if not t.shares_student]
        return [own if other is None else min(own, other) for other in others] or [own]

    def _batch(self) -> dict[str, Tensor]:
        rows, length = self.plan.batch
        ids = torch.ones(rows, length, dtype=torch.long)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        if self.own_input:
            batch |= {TEACHER_FIELDS[name]: column.clone() for name, column in batch.items()}
        if self.vocabulary_map is not None:
            batch[TEACHER_POSITIONS] = torch.arange(length).expand(rows, length).clone()
        batch["source"] = torch.arange(rows) * 2 // max(rows, 1) + 1  # one half from the teacher, one from the student
        if (count := len(self._teachers())) > 1:
            batch[TEACHER_INDEX] = torch.arange(rows) % count
        if self.module.responses is not None:
            batch |= {name: torch.zeros(rows, length) for name in COLUMNS}
        return batch

    # ------------------------------------------------------------------------------------------------------ the figures
    def _write_figures(self, optimizer: Optimizer) -> None:
        plan, tracker = self.plan, self.tracker
        held = {name: (nbytes(one), nbytes(other)) for name, (one, other) in self._tensors().items()}
        parameters, buffers = held["student"]
        gradients, state = nbytes(self._gradients()), nbytes(_state(optimizer))
        plan.student = Holding(parameters, gradients, state, buffers)
        if "teacher" in held:
            plan.teacher = Holding(held["teacher"][0], buffers=held["teacher"][1])
        plan.host, plan.peak = tracker.now[ELSEWHERE], tracker.peak
        plan.activations, plan.gathered, plan.tiles = (
            tracker.most[kind] for kind in ("activations", "gathered", "tiles")
        )
        plan.collectives = {
            name: {"count": count, "bytes": tracker.collective_bytes[name]}
            for name, count in sorted(tracker.collectives.items())
        }
        if plan.buckets:
            found = plan.collectives.setdefault("all_reduce", {"count": 0, "bytes": 0})
            found["count"] += _buckets(self._gradients())
            found["bytes"] += nbytes(self._gradients())


def _buckets(gradients: list[Tensor]) -> int:
    """Number of all-reduces of DDP: a bucket is sent when its gradients reach its size; the first one is smaller."""
    count, held, limit = 0, 0, FIRST_BUCKET
    for gradient in reversed(gradients):
        held += gradient.nbytes
        if held >= limit:
            count, held, limit = count + 1, 0, BUCKET
    return count + (held > 0)


def _vocabulary(model: nn.Module) -> int:
    weight, _ = weight_and_bias(output_embeddings(model))
    assert weight is not None
    return len(weight)


def _storage(tensor: Tensor) -> int:
    return int(local_shard(tensor).untyped_storage()._cdata)


def _state(optimizer: Optimizer) -> list[Tensor]:
    return [value for entries in optimizer.state.values() for value in entries.values() if isinstance(value, Tensor)]
