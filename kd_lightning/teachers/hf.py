"""Teachers that are Hugging Face causal language models in this process."""

from __future__ import annotations

import itertools
from abc import ABC
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from kd_lightning.distributed.dtensor import tensor_digest as tensor_digest
from kd_lightning.distributed.vocab_parallel import head_on_rank
from kd_lightning.engine.head import Head
from kd_lightning.models.backbone import body_and_head as body_and_head
from kd_lightning.models.backbone import head_settings, hidden_states, with_current_weights
from kd_lightning.models.backbone import logits as logits
from kd_lightning.models.hf_adapter import base_model, name_or_path
from kd_lightning.models.loading import ModelNotFoundError, load_causal_lm
from kd_lightning.models.model_checks import check_finite
from kd_lightning.models.packing.check import check_packing
from kd_lightning.models.pretrained import checked_kwargs
from kd_lightning.models.quantized.layers import (
    check_not_quantized,
    check_widths,
    count_parameters,
    is_quantized,
    plain_parameters,
    prepare_layers,
)
from kd_lightning.subclasses import concrete_subclasses
from kd_lightning.teachers.base import RunContext, Teacher
from kd_lightning.teachers.batches import models_of_run
from kd_lightning.teachers.cached import CachedTeacher as CachedTeacher
from kd_lightning.teachers.planning.sources import ConfigSource


class CausalLMTeacher(Teacher, ABC):
    """A Hugging Face causal LM in this process, frozen and in eval mode. Subclasses decide where its weights are.

    A subclass implements `to`; it may override `read_model` (how the model is read) and `split` (how it is split into
    body and head).

    Args:
        path: folder, hub name or `asset:` name; in Python also a loaded model, which is then frozen.
        kwargs: arguments of `from_pretrained` (`dtype`, `attn_implementation` …); without `dtype` as saved.

    Raises:
        ValueError: an argument in `kwargs` is refused; on `load`, the model cannot be read.
    """

    split = staticmethod(body_and_head)
    layers_on_host = False

    def __init__(self, path: str | Any, kwargs: dict[str, Any] | None = None) -> None:
        self._source = path
        self.kwargs = checked_kwargs(kwargs, "teacher")
        self.model: Any = None
        self._body: nn.Module | None = None
        self._head: Head | None = None  # its settings alone: the weights are read from the model each time
        self._gathered: nn.Module | None = None
        self._packed, self._packing_checked = False, False
        if kwargs and not isinstance(path, str):
            raise ValueError(
                f"teacher_kwargs must be empty for a model that is loaded already, got {kwargs}: pass them to "
                "from_pretrained"
            )

    @property
    def name(self) -> str | None:
        """Folder or hub name; None for a loaded model without one."""
        return self._source if isinstance(self._source, str) else name_or_path(self._source)

    @property
    def config_source(self) -> ConfigSource | None:
        """Its path and arguments; None for a loaded model."""
        if not isinstance(self._source, str):
            return None
        return ConfigSource(self._source, self.kwargs, self.layers_on_host)

    @property
    def head(self) -> Head | None:
        """Its LM head; None if the model cannot be split. If it is sharded, all ranks must ask together."""
        if self._head is None:
            return None
        return head_on_rank(with_current_weights(self._loaded(), self._head))

    def load(self, device: torch.device | str = "cpu") -> None:
        """Read and freeze the model, and split it into body and head."""
        if self.model is None:
            self.model = self.read_model().eval().requires_grad_(False)
            try:
                self._body, head = self.split(self.model)
                self._head = head_settings(head)
            except ValueError as error:
                rank_zero_info(f"teacher: {error}; full logits are used instead")
        if self._packed and not self._packing_checked:
            check_packing(self.model, self._body, "teacher")
            self._packing_checked = True
        self.to(device)

    def read_model(self) -> Any:
        """The model, in host memory.

        Raises:
            ValueError: it cannot be read, or has weights that are not finite.
        """
        if not isinstance(self._source, str):
            prepare_layers(self._source)
            check_widths(self._source, "teacher")
            check_finite(self._source, "teacher")
            return self._source
        try:
            return load_causal_lm(self._source, kwargs=self.kwargs, role="teacher")
        except ModelNotFoundError as error:
            names = (leaf.__name__ for leaf in concrete_subclasses(Teacher))
            classes = ", ".join(sorted(name for name in names if not name.startswith("_")))
            raise ModelNotFoundError(f"{error}, and no class of that name (there is {classes})") from None

    def shard(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Let a strategy shard the model over ranks.

        Raises:
            ValueError: it is quantized.
        """
        check_not_quantized(self._loaded(), "teacher")
        if self._gathered is None:
            self._gathered = wrap(self._loaded())

    @property
    def is_sharded(self) -> bool:
        """Whether a strategy has sharded the model."""
        return self._gathered is not None

    @property
    def is_collective(self) -> bool:
        """Whether a strategy has sharded the model."""
        return self.is_sharded

    def attach(self, run: RunContext) -> None:
        """Check that it is not the student itself, and read rows without padding if the student does.

        Raises:
            ValueError: it is the same object.
        """
        if self._source in (run.student.student, base_model(run.student.student)):
            raise ValueError("student and teacher must be two objects, as the teacher is frozen: pass SelfTeacher()")
        self._packed = run.student.packed

    @torch.no_grad()
    def hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Hidden states [B, T, H].

        Raises:
            ValueError: the model cannot be split (`head` is None).
        """
        self._loaded()
        if self._body is None:
            raise ValueError(f"teacher '{self.name}' cannot be split into body and head: ask for its logits")
        return self._run(hidden_states, self._body, batch)

    @torch.no_grad()
    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits [B, T, V]."""
        return self._run(logits, self._loaded(), batch)

    def _run(self, function: Callable[..., Tensor], part: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """`function` of a part of the model, with full parameters."""
        inputs = (batch["input_ids"], batch["attention_mask"], self._packed)
        if self._gathered is None:
            return function(part, *inputs)
        found: Tensor = self._gathered(function, part, *inputs)
        return found

    def fingerprint(self) -> str:
        """SHA-256 over names, types and bytes of all its tensors; quantized ones as the weights they stand for."""
        model = self._loaded()
        return tensor_digest(itertools.chain(plain_parameters(model), model.named_buffers()))

    def _loaded(self) -> Any:
        if self.model is None:
            raise ValueError("the teacher is not loaded yet: call `load(device)` first")
        return self.model


class HFTeacher(CausalLMTeacher):
    """A Hugging Face causal language model on the device of the run, frozen and in eval mode.

    Args:
        path: folder, hub name or `asset:` name; in Python also a loaded model, which is then frozen.
        kwargs: arguments of `from_pretrained` (`dtype`, `attn_implementation` …); without `dtype` as saved.

    Raises:
        ValueError: an argument in `kwargs` is refused; on `load`, the model cannot be read.

    Examples:
        >>> import torch
        >>> from kd_lightning import HFTeacher
        >>> teacher, ids = HFTeacher("asset:teacher"), torch.tensor([[1, 2, 3]])
        >>> teacher.load()
        >>> tuple(teacher.logits({"input_ids": ids, "attention_mask": torch.ones_like(ids)}).shape)
        (1, 3, 2048)
    """

    def __init__(self, path: str, kwargs: dict[str, Any] | None = None) -> None:
        super().__init__(path, kwargs)

    def to(self, device: torch.device | str) -> None:
        """Move the model; a sharded one stays where its strategy has put it, a quantized one on the GPU."""
        model, target = self._loaded(), torch.device(device)
        now = next(model.parameters()).device
        if self.is_sharded or now == target or (target.type == "cpu" and is_quantized(model)):
            return
        prepare_layers(model)
        model.to(target)


def as_teacher(teacher: Any, kwargs: dict[str, Any] | None = None) -> Teacher | None:
    """A `Teacher` from what a user passes: a `Teacher`, a name, a loaded model, or None."""
    return teacher if teacher is None or isinstance(teacher, Teacher) else HFTeacher(teacher, kwargs)


def parameter_counts(student: nn.Module, teacher: Teacher | None) -> str:
    """Numbers of parameters of student and teacher, as one line of a log."""
    trainable = count_parameters(student, trainable=True)
    models = {role: model for role, model, _ in models_of_run(student, teacher)}
    counts = {role: count_parameters(model) for role, model in models.items()}
    text = f"student: {counts['student']:,} parameters, {trainable:,} trainable"
    others = (role for role, model in models.items() if model is not student)
    return ", ".join([text, *(f"{role}: {counts[role]:,} parameters" for role in others)])
