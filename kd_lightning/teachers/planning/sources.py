"""Where `plan` finds the shapes of a teacher, without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class ConfigSource:
    """Where a teacher's model can be built from its configuration, without its weights.

    Args:
        path: folder, hub name or `asset:` name.
        kwargs: arguments of `from_pretrained`.
        layers_on_host: whether the transformer layers stay in host memory.
    """

    path: str
    kwargs: dict[str, Any] | None = None
    layers_on_host: bool = False


@dataclass(frozen=True)
class CachedOutputs:
    """Shapes of a teacher's outputs that are read from a cache, for `plan`.

    Args:
        vocabulary: number of tokens that the distributions cover.
        dtype: of the outputs.
        head: shape [V, H] of the LM head; None: the top k are cached.
        k: number of cached tokens; None: hidden states are cached.
    """

    vocabulary: int
    dtype: torch.dtype
    head: tuple[int, int] | None = None
    k: int | None = None
