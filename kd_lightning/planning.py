"""One training step of a run as shapes alone: no weights, no device, no other ranks, and the bytes of each kind."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.overrides import TorchFunctionMode

from kd_lightning import engine
from kd_lightning.cutting import SCALES, logits
from kd_lightning.data.contrastive import ContrastiveDataModule
from kd_lightning.engine import Head
from kd_lightning.lora import with_lora
from kd_lightning.models import shape_of_causal_lm
from kd_lightning.rollout import AtWork
from kd_lightning.sharding import is_sharded, layers
from kd_lightning.strategies import FSDP2Strategy
from kd_lightning.student import StudentWithLoss
from kd_lightning.teachers import AdapterOffTeacher, HFTeacher, OffloadedTeacher, Teacher
from kd_lightning.tracking import ELSEWHERE, Tracker, nbytes

COLUMNS = ("advantage", "old_log_prob", "importance", "teacher_token_log_prob")  # what sources of responses add
BUCKET = 25 << 20  # bytes that DDP sends at a time


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
        activations: at the peak, what is kept for backward, and temporaries.
        gathered: at the peak, other ranks' parameters, and what is on its way between ranks.
        tiles: at the peak, the engine's logits.
        buckets: DDP's copy of the gradients.
        peak: the most at any moment of a step.
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
def ranks_in_name(count: int) -> Iterator[None]:
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
    with ranks_in_name(ranks):
        try:
            _Rehearsal(module, trainer, found, gpu).run()
        except DynamicOutputShapeException:
            raise ValueError(
                "plan knows shapes alone, and one of the models decides by its numbers what it computes (such as which "
                "expert reads a token)"
            ) from None
    return found


def _shape(datamodule: Any) -> tuple[int, int]:
    try:
        rows, length = int(datamodule.batch_size), int(datamodule.max_length)
    except AttributeError:
        raise ValueError(f"plan: {type(datamodule).__name__} has no batch_size and max_length to plan with") from None
    return rows * (2 if isinstance(datamodule, ContrastiveDataModule) else 1), length


def _cut(model: Any) -> tuple[nn.Module, Head]:
    """Where shapes alone say that a model can be cut: what enters the last layer is what the body gives.

    Raises:
        ValueError: there is more between them, or no such parts.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    layer, body = base.get_output_embeddings(), base.get_decoder()
    body = getattr(base, "model", base) if body is base else body
    weight, config = getattr(layer, "weight", None), base.config.get_text_config(decoder=True)
    entered: list[Tensor] = []
    given: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda part, args, output: entered.append(args[0])),
        body.register_forward_hook(lambda part, args, output: given.append(output.last_hidden_state)),
    ]
    ids = torch.zeros(1, 4, dtype=torch.long)
    try:
        with torch.no_grad():
            logits(model, ids, torch.ones_like(ids))
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{type(base).__name__} cannot be cut into body and head: {error}") from None
    finally:
        for handle in handles:
            handle.remove()
    if body is base or len(entered) != 1 or not given or not isinstance(weight, Tensor) or weight.ndim != 2:
        raise ValueError(f"{type(base).__name__} cannot be cut into body and head")
    same = entered[0].untyped_storage()._cdata == given[0].untyped_storage()._cdata
    scaled = entered[0].shape == given[0].shape and any(getattr(config, name, None) for name in SCALES)
    if not (same or scaled):
        raise ValueError(f"{type(base).__name__} cannot be cut into body and head: there are layers between")
    return body, Head(weight, getattr(layer, "bias", None))


class _Once:
    """A function of blocks that are all alike: the first of each size stands for the others."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.chosen = function, False  # shapes do not compile, and a compiled loss needs no more
        self._found: dict[Any, Any] = {}

    def __call__(self, z: Tensor, *rest: Any) -> Any:
        key = (*z.shape, rest[-1])
        if key not in self._found:
            self._found[key] = self.function(z, *rest)
        return self._found[key]


class _FewParts(TorchFunctionMode):
    """Of the many equal parts that a tensor is cut into, one a rank, only the first and the last are made."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.chunk or args[1] < 3:
            return func(*args, **kwargs)
        tensor, parts, dim = args[0], args[1], kwargs.get("dim", 0)
        length = tensor.shape[dim]
        step = -(-length // parts)
        count = max(1, -(-length // max(step, 1)))
        first, last = tensor.narrow(dim, 0, step), tensor.narrow(dim, (count - 1) * step, length - (count - 1) * step)
        return [*[first] * (count - 1), last]


class _Student(StudentWithLoss):
    cut = staticmethod(_cut)


class _Teacher(HFTeacher):
    cut = staticmethod(_cut)

    def _read(self) -> Any:
        return self._given


class _Rehearsal:
    """The run's own step, on shapes."""

    def __init__(self, module: Any, trainer: Any, plan: Plan, gpu: bool) -> None:
        self.module, self.trainer, self.plan, self.gpu = module, trainer, plan, gpu
        self.strategy = trainer.strategy
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.tracker = Tracker(self.fake)
        self.offloaded = gpu and getattr(self.strategy, "cpu_offload", False)

    def run(self) -> None:
        """Build, then step; write what was seen into the plan."""
        torch.set_num_threads(1)
        self._build_student()
        self._build_teacher()
        self._spread()
        optimizer = self._optimizer()
        self._hold(optimizer)
        self._step(optimizer)
        self._write(optimizer)

    # ------------------------------------------------------------------------------------------------------- the models
    def _build_student(self) -> None:
        module, precision = self.module, self.trainer.precision_plugin.precision
        if not isinstance(module.student_source, str):
            raise ValueError("plan: the student must be a folder, a hub name or an asset")
        kwargs = dict(module.student_kwargs or {})
        if precision in ("bf16-true", "16-true", "64-true"):
            kwargs["dtype"] = {"b": torch.bfloat16, "1": torch.float16, "6": torch.float64}[precision[0]]
        with self.fake:
            student = shape_of_causal_lm(module.student_source, kwargs=kwargs, role="student")
            if module.lora is not None:
                student = with_lora(student, module.lora)
        module.loss.token_loss.compiled = _Once(module.loss.token_loss.block)
        module.model = _Student(student.train(), module.loss)
        del module.loss
        if module.responses is not None:
            module._at_work = AtWork(None)
            self.plan.notes.append("responses that are generated in a step, and their cache, are not counted")

    def _build_teacher(self) -> None:
        teacher = self.module.teacher
        if teacher is None:
            return
        if isinstance(teacher, AdapterOffTeacher):
            teacher.meet(self.module)
            return
        inner = teacher._inner if isinstance(teacher, OffloadedTeacher) else teacher
        if not isinstance(inner, HFTeacher):
            raise ValueError(f"plan: {type(teacher).__name__} has no configuration to plan with: name its model instead")
        if not isinstance(inner._given, str):
            raise ValueError("plan: the teacher must be a folder, a hub name or an asset")
        with self.fake:
            model = shape_of_causal_lm(inner._given, kwargs=inner.kwargs, role="teacher")
        planned = _Teacher(model)
        if self.gpu and isinstance(teacher, OffloadedTeacher):
            self._visit(model)
        self.module.teacher = planned
        planned.load()
        if isinstance(teacher, OffloadedTeacher):
            planned.shard = Teacher.shard.__get__(planned)  # type: ignore[method-assign]  # it stays where it is
        if self.module.teacher_cache:
            self.plan.notes.append("the teacher is there only while its cache is written, without the student's step")

    def _visit(self, model: nn.Module) -> None:
        """Layers lie in the host's memory and are on the card while they are read."""
        for layer in layers(model):
            size = nbytes(layer.parameters())
            layer.register_forward_pre_hook(lambda *_, size=size: self.tracker.add("gathered", size))  # type: ignore[misc]
            layer.register_forward_hook(lambda *_, size=size: self.tracker.add("gathered", -size))  # type: ignore[misc]
        self._away = [parameter for layer in layers(model) for parameter in layer.parameters()]

    _away: list[Tensor] = []  # noqa: RUF012 - replaced, never filled

    def _spread(self) -> None:
        """Lay out ranks, and give each its part."""
        for name in ("MASTER_ADDR", "MASTER_PORT"):  # Lightning wants to know, though nobody is called
            os.environ.setdefault(name, "0")
        self.module.trainer = self.trainer
        self.strategy.connect(self.module)
        self.strategy.setup_environment()
        if isinstance(self.strategy, FSDP2Strategy):
            with self.tracker, _FewParts():
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
        if getattr(self.module.teacher, "model", None) is not None:
            models["teacher"] = self.module.teacher.model
        return models

    # --------------------------------------------------------------------------------------------------------- the step
    def _hold(self, optimizer: Any) -> None:
        """Name what is held from step to step."""
        hold = self.tracker.hold
        for name, model in self._models().items():
            hold(ELSEWHERE if self.offloaded else f"{name}.parameters", model.parameters())
            hold(f"{name}.buffers", model.buffers())
        hold(ELSEWHERE, self._away)
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
        for parameter in self._learning():
            if not is_sharded(parameter):
                parameter.register_post_accumulate_grad_hook(lambda p: tracker.hold("student.gradients", [p.grad]))
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
        heads = [part.get_output_embeddings().weight for part in self._hf()]
        vocabulary = min(len(weight) for weight in heads)
        self.tracker.widths = {engine.padded(vocabulary): "tiles"}
        loss = self.module.model.loss
        if self.gpu and loss.chunk is None:
            loss.chunk = engine.budget(vocabulary, torch.float32, torch.device("cuda"))

    def _hf(self) -> list[Any]:
        return [self.module.model.student, *(model for name, model in self._models().items() if name == "teacher")]

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
        plan.host = tracker.now[ELSEWHERE]
        seen = tracker.at_peak
        plan.peak, plan.gathered, plan.tiles = tracker.peak, seen["gathered"], seen["tiles"]
        plan.activations = seen["activations"]
        plan.collectives = {
            name: {"count": count, "bytes": tracker.collective_bytes[name]}
            for name, count in sorted(tracker.collectives.items())
        }
        if plan.buckets:
            total = nbytes(self._gradients())
            plan.collectives.setdefault("all_reduce", {"count": 0, "bytes": 0})
            plan.collectives["all_reduce"]["count"] += -(-total // BUCKET)
            plan.collectives["all_reduce"]["bytes"] += total


def _state(optimizer: Any) -> list[Tensor]:
    return [value for entries in optimizer.state.values() for value in entries.values() if isinstance(value, Tensor)]
