"""The LM head: the last layer of a language model, with its scale and soft-cap."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

Transform = tuple[float, float | None]
"""Scale and soft-cap of an LM head."""


@dataclass(frozen=True)
class Head:
    r"""The last layer of a language model: \(\mathrm{logits} = \mathrm{cap}(\mathrm{scale} \cdot (h W^\top + b))\).

    Args:
        weight: W, [V, H].
        bias: b, [V].
        scale: multiplies the logits (`logit_scale` of Cohere, the inverse of Granite's `logits_scaling`).
        softcap: \(\mathrm{cap}(x) = c \tanh(x / c)\) (Gemma 2), c > 0; None: no cap.
        group: ranks that hold consecutive shards of W and b, of equal size, and process the same tokens: each computes
            its shard of the logits and receives the others. None: W and b are complete.

    Raises:
        ValueError: shapes do not match, scale is 0, or softcap is not positive.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    group: dist.ProcessGroup | None = None

    @property
    def vocabulary(self) -> int:
        """V, over all shards."""
        return len(self.weight) * (1 if self.group is None else self.group.size())

    @property
    def transform(self) -> Transform:
        """Scale and soft-cap, for `apply_transform`."""
        return self.scale, self.softcap

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., H] in fp32; the weights must be complete (no `group`)."""
        bias = None if self.bias is None else self.bias.float()
        return apply_transform(F.linear(hidden.float(), self.weight.float(), bias), self.transform)

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


def apply_transform(products: Tensor, transform: Transform, out: Tensor | None = None) -> Tensor:
    r"""Logits \(c \tanh(s \cdot a / c)\) of the products \(a = h W^\top + b\); \(s \cdot a\) without a soft-cap.

    Args:
        products: [..., V].
        transform: scale s and soft-cap c.
        out: tensor to write to instead of new memory; may be `products` itself.
    """
    scale, softcap = transform
    if out is not None:
        torch.mul(products, scale, out=out)
        return out if softcap is None else out.div_(softcap).tanh_().mul_(softcap)
    x = products if scale == 1 else products * scale
    return x if softcap is None else torch.tanh(x / softcap) * softcap
