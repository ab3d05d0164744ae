"""A Hugging Face causal language model as the teacher."""

from __future__ import annotations

import itertools
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
from kd_lightning.models.hf_adapter import name_or_path
from kd_lightning.models.loading import ModelNotFoundError, check_finite, checked_kwargs, load_causal_lm
from kd_lightning.subclasses import concrete_subclasses
from kd_lightning.teachers.base import Teacher as Teacher
from kd_lightning.teachers.cached import CachedTeacher as CachedTeacher


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
        return self._given if isinstance(self._given, str) else name_or_path(self._given)

    @property
    def head(self) -> Head | None:
        """Its head; None where it cannot be cut. Where it is sharded, all ranks ask together."""
        if self._reading is None:
            return None
        return head_on_rank(with_current_weights(self._loaded(), self._reading))

    def load(self, device: torch.device | str = "cpu") -> None:
        """Read and freeze the model, and find where to cut it."""
        if self.model is None:
            self.model = self._read().eval().requires_grad_(False)
            try:
                self._body, reading = body_and_head(self.model)
                self._reading = head_settings(reading)
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
            classes = ", ".join(sorted(leaf.__name__ for leaf in concrete_subclasses(Teacher)))
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
        return tensor_digest(itertools.chain(model.named_parameters(), model.named_buffers()))

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


def as_teacher(teacher: Any, kwargs: dict[str, Any] | None = None) -> Teacher | None:
    """A `Teacher` from what a user gives: one already, a name, a loaded model, or nothing."""
    return teacher if teacher is None or isinstance(teacher, Teacher) else HFTeacher(teacher, kwargs)


def parameter_counts(student: nn.Module, teacher: Teacher | None) -> str:
    """Who learns from whom, in numbers of parameters."""
    parameters = list(student.parameters())
    learning = sum(p.numel() for p in parameters if p.requires_grad)
    theirs = getattr(teacher, "model", None)
    text = f"student: {sum(p.numel() for p in parameters):,} parameters, {learning:,} of them learn"
    return text if theirs is None else f"{text}, teacher: {sum(p.numel() for p in theirs.parameters()):,} parameters"
