"""Where a chunk of logits comes from: hidden states times a head, or logits that exist already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from kd_lightning.engine.head import Head
from kd_lightning.engine.token_loss import Transform

UPCAST_ROWS = 4096  # vocabulary rows of a half-precision head that are held in fp32 at a time


class ProjectedLogits:
    """Counted rows of one model's products, made from its hidden states.

    Args:
        hidden: [M, H].
        head: its last layer; entries from `vocabulary` on are cut off.
        index: the counted rows, [N].
        vocabulary: width of the tile.
    """

    def __init__(self, hidden: Tensor, head: Head, index: Tensor, vocabulary: int) -> None:
        self.hidden, self.head, self.index, self.vocabulary = hidden, head, index, vocabulary
        self.transform: Transform = (head.scale, head.softcap)
        self.inputs: tuple[Tensor | None, ...] = (hidden, head.weight, head.bias)
        part = len(head.weight)
        self.start = 0 if head.group is None else min(head.group.rank() * part, vocabulary)  # of the columns made here
        self.width = min(part, vocabulary - self.start)

    def fill(self, tile: Tensor, a: int, b: int) -> None:
        """Write the products of the counted rows a to b."""
        dtype = self._precision(tile)
        h = self.hidden.index_select(0, self.index[a:b]).to(dtype)
        for lo, hi, w in self._weight(dtype):
            _add_product(tile[:, lo:hi], h, w.t(), beta=0)
        if self.head.bias is not None:
            tile[:, self.start : self.start + self.width] += self.head.bias[: self.width]
        if self.head.group is not None:
            self._gather(tile, self.head.group)

    def _gather(self, tile: Tensor, group: dist.ProcessGroup) -> None:
        """Fill the columns that other ranks have made."""
        part = len(self.head.weight)
        own = tile.new_zeros(len(tile), part)
        own[:, : self.width] = tile[:, self.start : self.start + self.width]
        parts = [torch.empty_like(own) for _ in range(group.size())]
        dist.all_gather(parts, own, group=group)
        for i, found in enumerate(parts):
            columns = tile[:, i * part : (i + 1) * part]
            columns.copy_(found[:, : columns.shape[1]])

    def take(self, dz: Tensor, gradients: Sequence[Tensor | None], a: int, b: int) -> None:
        """Add what the rows a to b contribute to the gradients of `inputs`."""
        d_hidden, d_weight, d_bias = gradients
        if d_bias is not None:
            d_bias[: self.width] += dz[:, self.start : self.start + self.width].sum(0)
        dtype = self._precision(dz, gradient=True)
        low = dz.to(dtype)
        if d_hidden is not None:
            dh = dz.new_zeros(b - a, self.hidden.shape[1])
            for lo, hi, w in self._weight(dtype):
                _add_product(dh, low[:, lo:hi], w)
            if self.head.group is not None:
                dist.all_reduce(dh, group=self.head.group)
            d_hidden.index_copy_(0, self.index[a:b], dh)
        if d_weight is not None:
            h = self.hidden.index_select(0, self.index[a:b]).to(dtype)
            _add_product(d_weight[: self.width], low[:, self.start : self.start + self.width].t(), h)

    def _precision(self, tile: Tensor, gradient: bool = False) -> torch.dtype:
        """Precision of a product's factors; its result always has the tile's.

        On a GPU half-precision factors stay as they are, for the product accumulates and returns fp32 by itself. fp16
        cannot hold a gradient of small probabilities: there, and on a CPU, the other factors are cast up.
        """
        low = self.head.weight.dtype
        native = tile.is_cuda and tile.dtype == torch.float32 and self.hidden.dtype == low
        return low if native and (low == torch.bfloat16 or (low == torch.float16 and not gradient)) else tile.dtype

    def _weight(self, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        """W in blocks of the vocabulary, with their columns: whole where nothing has to be cast."""
        weight = self.head.weight[: self.width]
        step = len(weight) if weight.dtype == dtype else UPCAST_ROWS
        for lo in range(0, len(weight), step or 1):
            block = weight[lo : lo + step].to(dtype)
            yield self.start + lo, self.start + lo + len(block), block


class GivenLogits:
    """Counted rows of logits that are there already.

    Args:
        logits: [M, V].
        index: the counted rows, [N].
        vocabulary: width of the tile; columns from there on are cut off.
    """

    def __init__(self, logits: Tensor, index: Tensor, vocabulary: int) -> None:
        self.logits, self.index, self.vocabulary = logits, index, vocabulary
        self.transform: Transform = (1.0, None)
        self.inputs: tuple[Tensor | None, ...] = (logits,)

    def fill(self, tile: Tensor, a: int, b: int) -> None:
        """Copy the logits of the counted rows a to b."""
        tile.copy_(self.logits[:, : self.vocabulary].index_select(0, self.index[a:b]))

    def take(self, dz: Tensor, gradients: Sequence[Tensor | None], a: int, b: int) -> None:
        """Put the gradient of the rows a to b in its place."""
        if gradients[0] is not None:
            gradients[0][:, : self.vocabulary].index_copy_(0, self.index[a:b], dz)


Model = ProjectedLogits | GivenLogits


def _add_product(out: Tensor, a: Tensor, b: Tensor, beta: int = 1) -> None:
    """Out ← beta·out + a b, in the precision of out."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    else:
        torch.addmm(out, a, b, beta=beta, out_dtype=out.dtype, out=out)  # not yet measured
