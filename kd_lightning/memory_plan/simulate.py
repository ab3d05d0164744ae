"""One training step of a run as shapes alone: no weights, no device, no other ranks, and the bytes of each kind."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.distributed.fsdp import FSDPModule

from kd_lightning.console import progress_bar
from kd_lightning.data.base import DistillationDataModule
from kd_lightning.distributed.dtensor import is_sharded
from kd_lightning.distributed.fsdp2 import transformer_layers
from kd_lightning.engine import chunked as engine
from kd_lightning.memory_plan.fake_models import FewParts, build_fake_student, build_fake_teacher
from kd_lightning.memory_plan.tracker import ELSEWHERE, Tracker, nbytes
from kd_lightning.rollout.runner import RolloutRunner
from kd_lightning.strategies import FSDP2Strategy

COLUMNS = ("advantage", "old_log_prob", "importance", "teacher_token_log_prob")  # what sources of responses add
FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20  # bytes that DDP sends at a time


@dataclass
class Holding:
    """Bytes of one model on one rank."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    buffers: int = 0


@dataclass
class Plan:
    """What one rank, the first, holds in a step and exchanges with the others; bytes.

    Args:
        ranks: how many there are.
        strategy: what spreads the run over them.
        batch: rows of a micro-batch on a rank, and tokens of each, all of which are counted.
        student: held from step to step.
        teacher: the same; nothing of it learns.
        host: of all these, what lies in the host's memory and not on the card.
        activations: at their most, what is kept for backward, and temporaries.
        gathered: at their most, other ranks' parameters, and what is on its way between ranks.
        tiles: at their most, the engine's logits.
        buckets: DDP's copy of the gradients.
        peak: the most of all together; less than the sum of what is largest at other moments.
        collectives: by name, how often a step exchanges what, and bytes: of the gathered, of what is scattered.
        notes: what the figures do not say.
    """

    ranks: int
    strategy: str
    batch: tuple[int, int]
    student: Holding = field(default_factory=Holding)
    teacher: Holding = field(default_factory=Holding)
    host: int = 0
    activations: int = 0
    gathered: int = 0
    tiles: int = 0
    buckets: int = 0
    peak: int = 0
    collectives: dict[str, dict[str, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain dicts and lists."""
        return asdict(self)


@contextmanager
def fake_process_group(count: int) -> Iterator[None]:
    """Inside, this process is rank 0 of so many, whose exchanges bring nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if count > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        if count > 1:
            dist.destroy_process_group()


def plan(module: Any, datamodule: Any, trainer: Any, gpu: bool) -> Plan:
    """Plan the step of a run that has not started; its module is used up by it.

    Args:
        module: a `DistillationModule` with names of models; nothing of it is loaded.
        datamodule: says `batch_size` and `max_length`; not read otherwise.
        trainer: of as many CPU devices as there are ranks.
        gpu: whether tiles are as on a GPU, and what is offloaded lies elsewhere.

    Raises:
        ValueError: a model has no configuration, or decides by numbers what it computes; the strategy is another one.
    """
    ranks, kind = trainer.num_devices, type(trainer.strategy).__name__
    if kind not in ("FSDP2Strategy", "DDPStrategy", "SingleDeviceStrategy"):
        raise ValueError(f"plan knows one device, ddp and fsdp2, not {kind}")
    found = Plan(ranks, {"FSDP2Strategy": "fsdp2", "DDPStrategy": "ddp"}.get(kind, "one device"), _shape(datamodule))
    with fake_process_group(ranks):
        try:
            _Rehearsal(module, trainer, found, gpu).run()
        except DynamicOutputShapeException:
            raise ValueError(
                "plan knows shapes alone, and one of the models decides by its numbers what it computes (such as which "
                "expert reads a token)"
            ) from None
        except RuntimeError as error:
            if "Expected inputs of BF16" not in str(error):
                raise
            raise ValueError(
                "plan knows mixtures of experts in bfloat16 alone: --trainer.precision bf16-true for a student, "
                "--model.teacher_kwargs.dtype bfloat16 for a teacher"
            ) from None
    return found


def _shape(datamodule: Any) -> tuple[int, int]:
    if isinstance(datamodule, DistillationDataModule):
        return datamodule.rows_per_batch, datamodule.max_length
    try:
        rows, length = int(datamodule.batch_size), int(datamodule.max_length)
    except AttributeError:
        raise ValueError(f"plan: {type(datamodule).__name__} has no batch_size and max_length to plan with") from None
    return rows, length


class _Rehearsal:
    """The run's own step, on shapes."""

    def __init__(self, module: Any, trainer: Any, plan: Plan, gpu: bool) -> None:
        self.module, self.trainer, self.plan, self.gpu = module, trainer, plan, gpu
        self.strategy = trainer.strategy
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.tracker = Tracker(self.fake)
        self.away: list[Tensor] = []  # of the teacher, in the host's memory
        self.offloaded = gpu and getattr(self.strategy, "cpu_offload", False)

    def run(self) -> None:
        """Build, then step; write what was seen into the plan."""
        for _ in progress_bar(self._stages(), "Planning", total=5):
            pass

    def _stages(self) -> Iterator[None]:
        self._build()
        yield
        self._spread()
        yield
        optimizer = self._optimizer()
        yield
        self._hold(optimizer)
        yield
        self._step(optimizer)
        self._write(optimizer)
        yield

    def _build(self) -> None:
        module = self.module
        precision = self.trainer.precision_plugin
        with precision.train_step_context():
            build_fake_student(module, precision.precision, self.fake)
            offloaded = build_fake_teacher(module, self.fake)
        if module.responses is not None:
            module._at_work = RolloutRunner(None)
            self.plan.notes.append("responses that are generated in a step, and their cache, are not counted")
        if offloaded and self.gpu:
            self._visit(module.teacher.model)
        if module.teacher_cache:
            self.plan.notes.append("the teacher is there only while its cache is written, without the student's step")

    def _visit(self, model: nn.Module) -> None:
        """Layers lie in the host's memory and are on the card while they are read."""
        for layer in transformer_layers(model):
            count = functools.partial(self._visited, nbytes(layer.parameters()))
            layer.register_forward_pre_hook(functools.partial(count, 1))
            layer.register_forward_hook(functools.partial(count, -1))
            self.away += layer.parameters()

    def _visited(self, size: int, sign: int, *_: Any) -> None:
        self.tracker.add("gathered", sign * size)

    def _spread(self) -> None:
        """Lay out ranks, and give each its part."""
        self.module.trainer = self.trainer
        self.strategy.connect(self.module)
        self.strategy.setup_environment()
        if isinstance(self.strategy, FSDP2Strategy):
            with self.tracker, FewParts():
                self.strategy.shard(self.module)

    def _optimizer(self) -> Any:
        found = self.module.configure_optimizers()
        optimizer = found["optimizer"] if isinstance(found, dict) else found
        for group in optimizer.param_groups:
            group.update({name: False for name in ("foreach", "fused") if name in group})
        self.strategy.optimizers = [optimizer]
        with self.tracker:  # so that a step finds the state that the step before has left
            for parameter in self._learning():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
        return optimizer

    def _learning(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.module.model.parameters() if parameter.requires_grad]

    def _models(self) -> dict[str, nn.Module]:
        models = {"student": self.module.model}
        if self.module.teacher is not None and self.module.teacher.model is not None:
            models["teacher"] = self.module.teacher.model
        return models

    # --------------------------------------------------------------------------------------------------------- the step
    def _hold(self, optimizer: Any) -> None:
        """Name what is held from step to step."""
        hold = self.tracker.hold
        for name, model in self._models().items():
            hold(ELSEWHERE if self.offloaded else f"{name}.parameters", model.parameters())
            hold(f"{name}.buffers", model.buffers())
        hold(ELSEWHERE, self.away)
        hold(ELSEWHERE if self.offloaded else "student.optimizer", _state(optimizer))
        self._hold_gradients()
        if self.plan.strategy == "ddp" and not self.strategy._ddp_kwargs.get("gradient_as_bucket_view"):
            self.plan.buckets = nbytes(self._gradients())
            self.tracker.add("buckets", self.plan.buckets)

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._learning() if parameter.grad is not None]

    def _hold_gradients(self) -> None:
        self.tracker.hold(ELSEWHERE if self.offloaded else "student.gradients", self._gradients())

    def _step(self, optimizer: Any) -> None:
        """One window as Lightning goes through it: the last window's gradients are there until the first backward."""
        module, trainer, tracker = self.module, self.trainer, self.tracker
        self._size_tiles()
        batch = self._batch()
        tracker.hold("activations", batch.values())

        def hold(parameter: Tensor) -> None:
            assert parameter.grad is not None
            tracker.hold("student.gradients", [parameter.grad])

        for parameter in self._learning():
            if not is_sharded(parameter):
                parameter.register_post_accumulate_grad_hook(hold)  # type: ignore[no-untyped-call]
        micro = trainer.accumulate_grad_batches
        with tracker:
            for i in range(min(micro, 2)):
                tally = (Counter(tracker.collectives), Counter(tracker.collective_bytes))
                last = i == min(micro, 2) - 1
                waiting = hasattr(self.strategy, "block_backward_sync") and isinstance(module.model, FSDPModule)
                with self.strategy.block_backward_sync() if waiting and not last else nullcontext():
                    with trainer.precision_plugin.train_step_context():
                        loss = module.training_step(batch, i)
                    if i == 0:
                        optimizer.zero_grad()
                    loss.backward()
                    del loss
                self._hold_gradients()
                if not last:  # the others of a long window are like it
                    for now, then in zip((tracker.collectives, tracker.collective_bytes), tally, strict=True):
                        now.update({name: (micro - 2) * (now[name] - then[name]) for name in now})
            module.on_before_optimizer_step(optimizer)
            module.configure_gradient_clipping(optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm)
            optimizer.step()

    def _size_tiles(self) -> None:
        """Tiles of the device that is planned for, and how they are known."""
        parts: list[Any] = [self.module.model.student, *list(self._models().values())[1:]]
        vocabulary = min(len(part.get_output_embeddings().weight) for part in parts)
        self.tracker.widths = {engine.padded_width(vocabulary): "tiles"}
        loss = self.module.model.loss
        if self.gpu and loss.chunk is None:
            loss.chunk = engine.rows_per_chunk(vocabulary, torch.float32, torch.device("cuda"))

    def _batch(self) -> dict[str, Tensor]:
        rows, length = self.plan.batch
        ids = torch.ones(rows, length, dtype=torch.long)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        batch["source"] = torch.arange(rows) * 2 // max(rows, 1) + 1  # as many of the teacher's as of the student's
        if self.module.responses is not None:
            batch |= {name: torch.zeros(rows, length) for name in COLUMNS}
        return batch

    # ------------------------------------------------------------------------------------------------------- the result
    def _write(self, optimizer: Any) -> None:
        plan, tracker = self.plan, self.tracker
        for name, model in self._models().items():
            setattr(plan, name, Holding(nbytes(model.parameters()), buffers=nbytes(model.buffers())))
        plan.student.gradients, plan.student.optimizer = nbytes(self._gradients()), nbytes(_state(optimizer))
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
    """How often DDP sends: a bucket is full when what it holds reaches its size; the first is smaller."""
    count, held, limit = 0, 0, FIRST_BUCKET
    for gradient in reversed(gradients):
        held += gradient.nbytes
        if held >= limit:
            count, held, limit = count + 1, 0, BUCKET
    return count + (held > 0)


def _state(optimizer: Any) -> list[Tensor]:
    return [value for entries in optimizer.state.values() for value in entries.values() if isinstance(value, Tensor)]
