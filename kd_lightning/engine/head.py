"""The LM head: the last layer of a language model, with its scale and soft-cap."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Head:
    r"""The last layer of a language model: \(\mathrm{logits} = \mathrm{cap}(\mathrm{scale} \cdot (h W^\top + b))\).

    Args:
        weight: W, [V, H].
        bias: b, [V].
        scale: multiplies the logits (Cohere's `logit_scale`, one over Granite's `logits_scaling`).
        softcap: \(\mathrm{cap}(x) = c \tanh(x / c)\) (Gemma 2), c > 0; None: no cap.
        group: ranks that hold consecutive parts of W and b, of one size, and read the same rows: each makes its part of
            the logits and gets the others'. None: all of it is here.

    Raises:
        ValueError: shapes do not fit, scale is 0, or softcap is not positive.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    group: dist.ProcessGroup | None = None

    @property
    def vocabulary(self) -> int:
        """V, over all parts."""
        return len(self.weight) * (1 if self.group is None else self.group.size())

    def __post_init__(self) -> None:
        if self.weight.ndim != 2:
            raise ValueError(f"head weight must be [vocabulary, hidden width], got shape {list(self.weight.shape)}")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(
                f"head bias must be [{self.weight.shape[0]}], one per vocabulary entry, got {list(self.bias.shape)}"
            )
        if self.scale == 0:
            raise ValueError("head scale must not be 0")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"head softcap must be > 0 or None, got {self.softcap}")
