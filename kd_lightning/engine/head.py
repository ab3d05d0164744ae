"""The LM head: the last layer of a language model, with its scale and soft-cap."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from kd_lightning.divergences import described
from kd_lightning.schedules import check_number

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FACTORS = (1e-6, 1e6)  # of scales and soft-caps: products and their gradients stay far from the ends of fp32
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
        ValueError: an argument is of another type or shape; |scale| or softcap is outside of [1e-6, 1e6].

    Examples:
        >>> import torch
        >>> from kd_lightning import Head
        >>> Head(torch.eye(2), softcap=30.0).logits(torch.tensor([3.0, 300.0]))
        tensor([ 2.9900, 30.0000])
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
        for name, tensor in (("weight", self.weight), ("bias", self.bias)):
            if not isinstance(tensor, Tensor) and (name == "weight" or tensor is not None):
                raise ValueError(f"head {name} must be a torch.Tensor, got {described(tensor)}")
            if tensor is not None and tensor.dtype not in FLOATS:
                raise ValueError(f"head {name} must be one of {', '.join(map(str, FLOATS))}, got {tensor.dtype}")
        if self.weight.ndim != 2:
            raise ValueError(f"head weight must be [vocabulary, hidden width], got shape {list(self.weight.shape)}")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(
                f"head bias must be [{self.weight.shape[0]}], one per vocabulary entry, got {list(self.bias.shape)}"
            )
        check_number("head scale", self.scale, -FACTORS[1], FACTORS[1])
        if abs(self.scale) < FACTORS[0]:
            raise ValueError(f"head scale must be at least {FACTORS[0]:g} or at most -{FACTORS[0]:g}, got {self.scale}")
        if self.softcap is not None:
            check_number("head softcap", self.softcap, *FACTORS, hint=" or None")


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
