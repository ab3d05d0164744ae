"""The teacher role."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.engine.head import Head
from kd_lightning.engine.top_k import TopK


class Teacher(ABC):
    """Where the teacher's distribution comes from. A plain object: never in a `state_dict`, a summary, or under DDP.

    Made cheaply (arguments are checked, nothing is read), filled by `load`, asked by batch. A batch is a mapping with
    `input_ids`, `attention_mask` and `labels` of shape [B, T]; what comes back never carries a gradient, and need only
    be right where the label of the next token counts.
    """

    @property
    @abstractmethod
    def name(self) -> str | None:
        """Folder or hub name, where its tokenizer lies; None where it has none."""

    @property
    @abstractmethod
    def head(self) -> Head | None:
        """What turns `hidden` into logits; None where only `logits` can be asked for."""

    @abstractmethod
    def load(self, device: torch.device | str = "cpu") -> None:
        """Read what is needed and put it on a device; a second call only moves it."""

    @abstractmethod
    def to(self, device: torch.device | str) -> None:
        """Move to a device; nothing happens where it is there already."""

    def meet(self, module: Any) -> None:  # noqa: B027 - most teachers do not mind whom they teach
        """See the module that it teaches in, before anything is loaded but the student.

        Args:
            module: a `DistillationModule`; `module.model` is the student with its loss.

        Raises:
            ValueError: the two do not fit.
        """

    def shard(self, wrap: Callable[[nn.Module], nn.Module]) -> None:  # noqa: B027 - most teachers have nothing to shard
        """Let a strategy spread the parameters over ranks; called again, nothing happens.

        Args:
            wrap: shards a model where it is, and gives what its parameters are gathered by: `wrap(model)(f, *args)` is
                `f(*args)` with all of them whole.
        """

    @abstractmethod
    def hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Hidden states [B, T, H]."""

    @abstractmethod
    def logits(self, batch: Mapping[str, Tensor]) -> Tensor | TopK:
        """Logits [B, T, V]; `TopK` of shape [B, T] where no more is known."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A digest that changes with any weight: two teachers with the same one say the same."""
