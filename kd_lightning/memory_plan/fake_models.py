"""Student and teacher of a run on fake tensors, built from their configurations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from kd_lightning.engine.compile import Compiled
from kd_lightning.engine.head import Head
from kd_lightning.engine.top_k import TopK
from kd_lightning.models.backbone import SCALES, logits
from kd_lightning.models.hf_adapter import (
    base_model,
    config_numbers,
    decoder,
    enable_activation_checkpointing,
    output_embeddings,
    text_config,
    weight_and_bias,
)
from kd_lightning.models.loading import causal_lm_from_config
from kd_lightning.models.lora import add_adapters
from kd_lightning.models.model_checks import freeze_unreached
from kd_lightning.module import DistillationModule
from kd_lightning.teachers.base import CachedOutputs, Teacher
from kd_lightning.teachers.hf import CausalLMTeacher

PURE = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}


def split_by_shapes(model: Any) -> tuple[nn.Module, Head]:
    """Split a model by shapes: the input of its LM head must be the output of its body.

    Args:
        model: a Hugging Face causal language model on fake tensors.

    Returns:
        As `models.backbone.body_and_head`, without the scale and the soft-cap of the head, which shapes do not show.

    Raises:
        ValueError: there is more between body and head, or there are no such parts.
    """
    base = base_model(model)
    layer = output_embeddings(base)
    body = decoder(base)
    weight, bias = weight_and_bias(layer)
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
        raise ValueError(f"{type(base).__name__} cannot be split into backbone and LM head: {error}") from None
    finally:
        for handle in handles:
            handle.remove()
    if body is base or len(entered) != 1 or not given or weight is None or weight.ndim != 2:
        raise ValueError(f"{type(base).__name__} cannot be split into backbone and LM head")
    same = entered[0].untyped_storage()._cdata == given[0].untyped_storage()._cdata
    scaled = entered[0].shape == given[0].shape and bool(config_numbers(text_config(base), SCALES))
    if not (same or scaled):
        raise ValueError(f"{type(base).__name__} cannot be split into backbone and LM head: there are layers between")
    return body, Head(weight, bias)


class FakeTeacher(CausalLMTeacher):
    """A teacher on fake tensors, split by shapes if possible.

    Args:
        model: the model, on fake tensors.
        layers_on_host: whether its layers stay in host memory, so that no strategy shards it.
    """

    split = staticmethod(split_by_shapes)

    def __init__(self, model: nn.Module, layers_on_host: bool = False) -> None:
        super().__init__(model)
        self._model, self.layers_on_host = model, layers_on_host
        self.load()

    def read_model(self) -> nn.Module:
        """The model that was given; fake tensors have no values to check."""
        return self._model

    def to(self, device: torch.device | str) -> None:
        """Do nothing: fake tensors are on no device."""

    def shard(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Let a strategy shard the model over ranks, unless its layers stay in host memory."""
        if not self.layers_on_host:
            super().shard(wrap)

    def fingerprint(self) -> str:
        """Empty: fake tensors have no values."""
        return ""


class FakeCachedTeacher(Teacher):
    """A teacher whose outputs are read from a cache, on fake tensors.

    Args:
        outputs: their shapes.
        fake: the mode that makes the LM head.
    """

    def __init__(self, outputs: CachedOutputs, fake: FakeTensorMode) -> None:
        self.outputs = outputs
        with fake:
            self._head = None if outputs.head is None else Head(torch.empty(outputs.head, dtype=outputs.dtype))

    @property
    def name(self) -> None:
        """None: nothing is read."""
        return None

    @property
    def head(self) -> Head | None:
        """The LM head; None if the top k are cached."""
        return self._head

    def load(self, device: torch.device | str = "cpu") -> None:
        """Do nothing: there is nothing to read."""

    def to(self, device: torch.device | str) -> None:
        """Do nothing: fake tensors are on no device."""

    def hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Hidden states [B, T, H]."""
        assert self.outputs.head is not None
        return torch.zeros(*batch["labels"].shape, self.outputs.head[1], dtype=self.outputs.dtype)

    def logits(self, batch: Mapping[str, Tensor]) -> TopK | Tensor:
        """The top k of shape [B, T]; logits [B, T, V] if hidden states are cached."""
        shape, outputs = batch["labels"].shape, self.outputs
        if outputs.k is None:
            return torch.zeros(*shape, outputs.vocabulary)
        ids = torch.zeros(*shape, outputs.k, dtype=torch.int32)
        return TopK(ids, torch.zeros(*shape, outputs.k, dtype=outputs.dtype), torch.zeros(shape), outputs.vocabulary)

    def fingerprint(self) -> str:
        """Empty: fake tensors have no values."""
        return ""


class OneBlockPerSize(Compiled):
    """A block of a loss that is computed once per size; its result stands for all other blocks of that size.

    Args:
        function: the block.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function, chosen=False)  # fake tensors are not compiled
        self._found: dict[Any, Any] = {}

    def __call__(self, *args: Any) -> Any:
        """The result of the first block of this size."""
        z, y, _, _, gradient, _ = args
        key = (*z.shape, y is None, gradient)
        if key not in self._found:
            self._found[key] = self.function(*args)
        return self._found[key]


class FewChunks(TorchFunctionMode):
    """Makes `torch.chunk` into many parts cheap: the first and the last are made, the first stands for all between."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one function."""
        kwargs = kwargs or {}
        if func is not torch.chunk or args[1] < 3:
            return func(*args, **kwargs)
        tensor, parts, dim = args[0], args[1], kwargs.get("dim", 0)
        length = tensor.shape[dim]
        step = max(1, -(-length // parts))
        count = max(1, -(-length // step))
        before = (count - 1) * step
        return [*[tensor.narrow(dim, 0, min(step, length))] * (count - 1), tensor.narrow(dim, before, length - before)]


def set_fake_student(module: DistillationModule, precision: str, fake: FakeTensorMode) -> None:
    """Give a module its student, on fake tensors.

    Args:
        module: not loaded.
        precision: of the trainer.
        fake: the mode that makes the tensors.

    Raises:
        ValueError: the student is a loaded model, or cannot be built.
    """
    source = module.student_source
    if not isinstance(source.model, str):
        raise ValueError(
            f"plan: the student must be a folder, a hub name or an asset, got a loaded {type(source.model).__name__}"
        )
    kwargs = dict(source.kwargs or {})
    if precision in PURE:
        kwargs["dtype"] = PURE[precision]
    with torch.device("meta"):
        student: Any = causal_lm_from_config(source.model, kwargs=kwargs, role="student")
        if source.lora is not None:
            student = add_adapters(student, source.lora)
    _to_fake(student, fake)
    freeze_unreached(student)
    if source.gradient_checkpointing:
        enable_activation_checkpointing(base_model(student), "gradient_checkpointing")
    module.loss.token_loss.run_blocks_with(OneBlockPerSize(module.loss.token_loss.block))
    module.model.set_student(student.train(), split_by_shapes)


def set_fake_teacher(module: DistillationModule, fake: FakeTensorMode) -> list[nn.Module]:
    """Give a module its teacher, if it has one, on fake tensors.

    Args:
        module: with its student.
        fake: the mode that makes the tensors.

    Returns:
        The models whose layers stay in host memory.

    Raises:
        ValueError: a teacher has no configuration, or cannot be built.
    """
    if module.teacher is None:
        return []
    on_host: list[nn.Module] = []
    module.teacher = module.teacher.map_members(lambda member: _fake_teacher(member, module, fake, on_host))
    return on_host


def _fake_teacher(
    teacher: Teacher, module: DistillationModule, fake: FakeTensorMode, on_host: list[nn.Module]
) -> Teacher:
    """A teacher that is not made of others, on fake tensors; a model with layers in host memory is added to a list."""
    if teacher.starts_as_student:
        teacher.attach(module.run_context())
        return teacher
    source, cached = teacher.config_source, teacher.cached_outputs
    if cached is not None:
        return FakeCachedTeacher(cached, fake)
    if source is None:
        raise ValueError(
            f"plan: {type(teacher).__name__} has no configuration to plan with: pass a model folder or name as teacher"
        )
    with torch.device("meta"):
        model = causal_lm_from_config(source.path, kwargs=source.kwargs, role="teacher")
    _to_fake(model, fake)
    if source.layers_on_host:
        on_host.append(model)
    found = FakeTeacher(model, source.layers_on_host)
    found.attach(module.run_context())
    return found


def _to_fake(model: nn.Module, fake: FakeTensorMode) -> None:
    """Replace every tensor by a fake one on a device; tied tensors stay tied."""
    placed: dict[int, tuple[Tensor, Tensor]] = {}
    tables: Iterator[dict[str, Any]] = (
        table for module in model.modules() for table in (module._parameters, module._buffers, vars(module))
    )
    with fake:
        for table in tables:
            for name, tensor in table.items():
                if isinstance(tensor, Tensor):
                    made: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        made = nn.Parameter(made, requires_grad=tensor.requires_grad)
                    table[name] = placed.setdefault(id(tensor), (tensor, made))[1]
