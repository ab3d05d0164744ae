"""Where the teacher's distribution comes from: a model here, its layers in host memory, the student itself, a cache."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from kd_lightning.cached_teacher import CachedTeacher as CachedTeacher
from kd_lightning.cutting import body_and_head as body_and_head
from kd_lightning.cutting import evaluating, factors, head_of, hidden_states
from kd_lightning.cutting import logits as logits
from kd_lightning.engine import Head
from kd_lightning.leaves import leaves
from kd_lightning.lora import adapters_off, lora_layers
from kd_lightning.models import ModelNotFoundError, check_finite, checked_kwargs, load_causal_lm
from kd_lightning.sharding import here, layers
from kd_lightning.teacher_base import Teacher as Teacher
from kd_lightning.teacher_base import digest as digest


class HFTeacher(Teacher):
    """A Hugging Face causal language model in this process, frozen and in eval mode.

    Args:
        path: folder, hub name or `asset:` name; in Python also a loaded model, which is then frozen.
        kwargs: arguments of `from_pretrained` (`dtype`, `attn_implementation` …); without `dtype` it stays as saved.

    Raises:
        ValueError: an argument in `kwargs` is refused; on `load`, the model cannot be read.
    """

    def __init__(self, path: str, kwargs: dict[str, Any] | None = None) -> None:
        self._given: Any = path
        self.kwargs = checked_kwargs(kwargs, "teacher")
        self.model: Any = None
        self._body: nn.Module | None = None
        self._reading: Head | None = None
        self._root: nn.Module | None = None
        if kwargs and not isinstance(self._given, str):
            raise ValueError(f"teacher_kwargs {kwargs} cannot be applied to a model that is loaded already")

    @property
    def name(self) -> str | None:
        """Folder or hub name; None for a loaded model that came from nowhere."""
        return self._given if isinstance(self._given, str) else getattr(self._given, "name_or_path", None) or None

    @property
    def head(self) -> Head | None:
        """Its head; None where it cannot be cut. Where it is sharded, all ranks ask together."""
        if self._reading is None:
            return None
        return here(head_of(self._loaded(), self._reading))

    def load(self, device: torch.device | str = "cpu") -> None:
        """Read and freeze the model, and find where to cut it."""
        if self.model is None:
            self.model = self._read().eval().requires_grad_(False)
            try:
                self._body, reading = body_and_head(self.model)
                self._reading = factors(reading)
            except ValueError as error:
                rank_zero_info(f"teacher: {error}; its whole logits are used instead")
        self.to(device)

    def _read(self) -> Any:
        if not isinstance(self._given, str):
            check_finite(self._given, "teacher")
            return self._given
        try:
            return load_causal_lm(self._given, kwargs=self.kwargs, role="teacher")
        except ModelNotFoundError as error:
            classes = ", ".join(sorted(leaf.__name__ for leaf in leaves(Teacher)))
            raise ModelNotFoundError(f"{error}, and no class of that name (there is {classes})") from None

    def to(self, device: torch.device | str) -> None:
        """Move the model; one that is sharded stays where its strategy has put it."""
        model = self._loaded()
        if self._root is None and next(model.parameters()).device != torch.device(device):
            model.to(device)

    def shard(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Let a strategy spread the model over ranks."""
        if self._root is None:
            self._root = wrap(self._loaded())

    @torch.no_grad()
    def hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Hidden states [B, T, H].

        Raises:
            ValueError: it cannot be cut (`head` is None).
        """
        self._loaded()
        if self._body is None:
            raise ValueError(f"teacher '{self.name}' has no cut between body and head: ask for its logits")
        return self._run(hidden_states, self._body, batch)

    @torch.no_grad()
    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits [B, T, V]."""
        return self._run(logits, self._loaded(), batch)

    def _run(self, function: Callable[..., Tensor], part: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """`function` of a part of the model, with the parameters whole."""
        inputs = (batch["input_ids"], batch["attention_mask"])
        if self._root is None:
            return function(part, *inputs)
        found: Tensor = self._root(function, part, *inputs)
        return found

    def fingerprint(self) -> str:
        """SHA-256 over names, types and bytes of all its tensors."""
        model = self._loaded()
        return digest(itertools.chain(model.named_parameters(), model.named_buffers()))

    def _loaded(self) -> Any:
        if self.model is None:
            raise ValueError("the teacher is not loaded yet: call `load(device)` first")
        return self.model


class AroundHF(Teacher):
    """What an `HFTeacher` inside says; how it is filled and moved is left to those below.

    Args:
        inner: the teacher.
    """

    def __init__(self, inner: HFTeacher) -> None:
        self._inner = inner

    @property
    def name(self) -> str | None:
        """Folder or hub name; None for a loaded model that came from nowhere."""
        return self._inner.name

    @property
    def model(self) -> Any:
        """The model; None before `load`."""
        return self._inner.model

    @property
    def head(self) -> Head | None:
        """Its head; None where it cannot be cut."""
        return self._inner.head

    def hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Hidden states [B, T, H]."""
        return self._inner.hidden(batch)

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits [B, T, V]."""
        return self._inner.logits(batch)

    def fingerprint(self) -> str:
        """As an `HFTeacher`'s of the same model."""
        return self._inner.fingerprint()


class OffloadedTeacher(AroundHF):
    """A Hugging Face model whose layers wait in host memory and visit the device one at a time.

    What stands around the layers (embedding, last norm, head) stays on the device.

    Args:
        path: as for `HFTeacher`.
        kwargs: as for `HFTeacher`.
    """

    def __init__(self, path: str, kwargs: dict[str, Any] | None = None) -> None:
        super().__init__(HFTeacher(path, kwargs))
        self._device = torch.device("cpu")
        self._visits: list[_Visit] = []

    def load(self, device: torch.device | str = "cpu") -> None:
        """Read the model into host memory, and let its layers visit the device."""
        self._inner.load()
        self.to(device)

    def to(self, device: torch.device | str) -> None:
        """Move what stands around the layers, and send the layers to another device from now on."""
        device = torch.device(device)
        if device == self._device:
            return
        for visit in self._visits:
            visit.end()
        parts = layers(self.model)
        inside = {id(module) for part in parts for module in part.modules()}
        moved: dict[int, Tensor] = {}  # a tied weight stays one
        for module in self.model.modules():
            if id(module) not in inside:
                for table, name, tensor in _tensors(module):
                    table[name] = moved.setdefault(id(tensor), _at(tensor, device))
        self._visits = [_Visit(part, device) for part in parts]
        self._device = device


class _Visit:
    """Hooks that copy a layer to a device before its forward and drop the copy after it."""

    def __init__(self, layer: nn.Module, device: torch.device) -> None:
        self.device = device
        self.home = [(table, name, tensor) for module in layer.modules() for table, name, tensor in _tensors(module)]
        if device.type == "cuda":  # from page-locked memory the host need not wait for the copy
            self.home = [(table, name, _page_locked(tensor)) for table, name, tensor in self.home]
            self._leave()
        before = layer.register_forward_pre_hook(self._arrive)
        after = layer.register_forward_hook(self._leave, always_call=True)
        self.handles = (before, after)

    def _arrive(self, *_: Any) -> None:
        for table, name, tensor in self.home:
            table[name] = _at(tensor, self.device)

    def _leave(self, *_: Any) -> None:
        for table, name, tensor in self.home:
            table[name] = tensor

    def end(self) -> None:
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()


def _tensors(module: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    """A module's own parameters and buffers, each with the table that it stands in."""
    tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    return [(table, name, tensor) for table in tables for name, tensor in table.items() if tensor is not None]


def _at(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.device == device:
        return tensor
    copy = tensor.detach().to(device, non_blocking=True)
    return nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy


def _page_locked(tensor: Tensor) -> Tensor:
    pinned = tensor.detach().pin_memory()
    return nn.Parameter(pinned, requires_grad=False) if isinstance(tensor, nn.Parameter) else pinned


class AdapterOffTeacher(Teacher):
    """The student itself with its adapters off: the model it started as, without a second copy.

    Raises:
        ValueError: when the run starts, the student has no adapters.
    """

    def __init__(self) -> None:
        self._model: Any = None

    @property
    def name(self) -> None:
        """None: its tokenizer is the student's."""
        return None

    @property
    def head(self) -> Head | None:
        """The student's; None where it cannot be cut."""
        head: Head | None = self._met().head()
        return head

    def meet(self, module: Any) -> None:
        """Take the student."""
        if not lora_layers(module.model.student):
            raise ValueError("teacher AdapterOffTeacher needs a student with adapters: give --model.lora.r")
        self._model = module.model

    def load(self, device: torch.device | str = "cpu") -> None:
        """Nothing: the student is there."""

    def to(self, device: torch.device | str) -> None:
        """Nothing: it is where the student is."""

    @torch.no_grad()
    def hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Hidden states [B, T, H]."""
        model = self._met()
        with adapters_off(model.student), evaluating(model.student):
            return hidden_states(model.body, batch["input_ids"], batch["attention_mask"])

    @torch.no_grad()
    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits [B, T, V]."""
        student = self._met().student
        with adapters_off(student), evaluating(student):
            return logits(student, batch["input_ids"], batch["attention_mask"])

    def fingerprint(self) -> str:
        """SHA-256 over the tensors that are not an adapter's."""
        student = self._met().student
        frozen = ((name, p) for name, p in student.named_parameters() if not p.requires_grad)
        return digest(itertools.chain(frozen, student.named_buffers()))

    def _met(self) -> Any:
        if self._model is None:
            raise ValueError("teacher AdapterOffTeacher has met no student yet: it is given one when a run starts")
        return self._model


def as_teacher(teacher: Any, kwargs: dict[str, Any] | None = None) -> Teacher | None:
    """A `Teacher` from what a user gives: one already, a name, a loaded model, or nothing."""
    return teacher if teacher is None or isinstance(teacher, Teacher) else HFTeacher(teacher, kwargs)


def sizes(student: nn.Module, teacher: Teacher | None) -> str:
    """Who learns from whom, in numbers of parameters."""
    parameters = list(student.parameters())
    learning = sum(p.numel() for p in parameters if p.requires_grad)
    theirs = getattr(teacher, "model", None)
    text = f"student: {sum(p.numel() for p in parameters):,} parameters, {learning:,} of them learn"
    return text if theirs is None else f"{text}, teacher: {sum(p.numel() for p in theirs.parameters()):,} parameters"
