"""Sources of logits, one chunk of tokens at a time: hidden states times an LM head, or existing logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from kd_lightning.engine.head import Head, Transform

UPCAST_ROWS = 4096  # vocabulary entries of a half-precision LM head that are held in fp32 at a time


class LogitSource(ABC):
    """Logits of the tokens with a label of one model, computed into a buffer chunk by chunk.

    Attributes:
        vocabulary: V, the width of a chunk; vocabulary entries from there on are cut off.
        transform: scale and soft-cap that turn what `fill` writes into logits.
        inputs: the tensors that the logits are computed from.
        others: columns of the student's tokens that this model has not, ids; None: it has all.
        measures_share: whether `rest` can describe all of the model's tokens that the student has not.
    """

    vocabulary: int
    transform: Transform
    inputs: tuple[Tensor | None, ...]
    others: Tensor | None = None
    measures_share: bool = False

    @abstractmethod
    def fill(self, chunk: Tensor, start: int, stop: int, student: tuple[Tensor, Transform] | None = None) -> None:
        """Write the products (logits before the transform) of some tokens.

        Args:
            chunk: written, [stop − start, V].
            start: first token.
            stop: one past the last token.
            student: the student's products of the same tokens, shaped like `chunk`, and their transform; None for the
                student itself.
        """

    def rest(
        self, like: Tensor, start: int, stop: int, temperatures: Iterable[float], measured: bool = False
    ) -> dict[str, Tensor]:
        """What the model gives to tokens outside of its columns, [stop − start] by name; by default there are none.

        Args:
            like: a tensor [stop − start] of the chunk's dtype.
            start: first token.
            stop: one past the last token.
            temperatures: those at which the logits are compared.
            measured: whether the share of the columns in the model's distribution is measured.
        """
        return {}

    def without_label(self) -> LogitSource:
        """The same model's logits in a form that does not depend on the tokens' labels; by default these."""
        return self


class DifferentiableLogits(LogitSource):
    """Logits that pass a gradient on to their `inputs`: the student's."""

    @abstractmethod
    def add_gradients(self, dz: Tensor, gradients: Sequence[Tensor | None], start: int, stop: int) -> None:
        """Add the contribution of some tokens to the gradients of `inputs`.

        Args:
            dz: gradient with respect to the products of these tokens, [stop − start, V].
            gradients: one per input, added to; None where no gradient is needed.
            start: first token.
            stop: one past the last token.
        """

    @abstractmethod
    def fill_columns(self, out: Tensor, ids: Tensor, start: int, stop: int) -> None:
        """Write the products of some entries of the vocabulary.

        Args:
            out: written, [stop − start, K].
            ids: the entries, [K].
            start: first token.
            stop: one past the last token.
        """


class ProjectedLogits(DifferentiableLogits):
    """Products of hidden states and an LM head.

    Args:
        hidden: [M, H].
        head: the LM head; entries from `vocabulary` on are cut off.
        index: indices of the tokens with a label, [N].
        vocabulary: width of a chunk.
    """

    def __init__(self, hidden: Tensor, head: Head, index: Tensor, vocabulary: int) -> None:
        self.hidden, self.head, self.index, self.vocabulary = hidden, head, index, vocabulary
        self.transform = head.transform
        self.inputs = (hidden, head.weight, head.bias)
        shard = len(head.weight)
        self.start = 0 if head.group is None else min(head.group.rank() * shard, vocabulary)  # this rank's columns
        self.width = min(shard, vocabulary - self.start)

    def fill(self, chunk: Tensor, start: int, stop: int, student: tuple[Tensor, Transform] | None = None) -> None:
        """Write the products of the tokens start to stop."""
        dtype = self._factor_dtype(chunk)
        h = self.hidden.index_select(0, self.index[start:stop]).to(dtype)
        for low, high, w in self._weight_blocks(dtype):
            _add_product(chunk[:, low:high], h, w.t(), beta=0)
        if self.head.bias is not None:
            chunk[:, self.start : self.start + self.width] += self.head.bias[: self.width]
        if self.head.group is not None:
            self._gather_shards(chunk, self.head.group)

    def fill_columns(self, out: Tensor, ids: Tensor, start: int, stop: int) -> None:
        """Write the products of the tokens start to stop; each rank of a sharded head computes its own entries."""
        if self.head.group is None:
            self._fill_own(out, ids, start, stop)
            return
        own = torch.nonzero((ids >= self.start) & (ids < self.start + self.width)).flatten()
        products = out.new_empty(len(out), len(own))
        self._fill_own(products, ids[own] - self.start, start, stop)
        out.zero_().index_copy_(1, own, products)
        summed = out.contiguous()  # collectives need dense tensors; adding 0 changes no bit
        dist.all_reduce(summed, group=self.head.group)
        out.copy_(summed)

    def _fill_own(self, out: Tensor, ids: Tensor, start: int, stop: int) -> None:
        """Write the products of entries of this rank's shard."""
        dtype = self._factor_dtype(out)
        h = self.hidden.index_select(0, self.index[start:stop]).to(dtype)
        _add_product(out, h, self.head.weight.index_select(0, ids).to(dtype).t(), beta=0)
        if self.head.bias is not None:
            out += self.head.bias.index_select(0, ids)

    def _gather_shards(self, chunk: Tensor, group: dist.ProcessGroup) -> None:
        """Fill the columns that other ranks have computed."""
        size = len(self.head.weight)
        own = chunk.new_zeros(len(chunk), size)
        own[:, : self.width] = chunk[:, self.start : self.start + self.width]
        shards = [torch.empty_like(own) for _ in range(group.size())]
        dist.all_gather(shards, own, group=group)
        for i, shard in enumerate(shards):
            columns = chunk[:, i * size : (i + 1) * size]
            columns.copy_(shard[:, : columns.shape[1]])

    def add_gradients(self, dz: Tensor, gradients: Sequence[Tensor | None], start: int, stop: int) -> None:
        """Add the contribution of the tokens start to stop to the gradients of hidden states, weight and bias."""
        d_hidden, d_weight, d_bias = gradients
        if d_bias is not None:
            d_bias[: self.width] += dz[:, self.start : self.start + self.width].sum(0)
        dtype = self._factor_dtype(dz, gradient=True)
        low_precision = dz.to(dtype)
        if d_hidden is not None:
            dh = dz.new_zeros(stop - start, self.hidden.shape[1])
            for low, high, w in self._weight_blocks(dtype):
                _add_product(dh, low_precision[:, low:high], w)
            if self.head.group is not None:
                dist.all_reduce(dh, group=self.head.group)
            d_hidden.index_copy_(0, self.index[start:stop], dh)
        if d_weight is not None:
            h = self.hidden.index_select(0, self.index[start:stop]).to(dtype)
            _add_product(d_weight[: self.width], low_precision[:, self.start : self.start + self.width].t(), h)

    def _factor_dtype(self, chunk: Tensor, gradient: bool = False) -> torch.dtype:
        """Dtype of the factors of a product, whose result always has the chunk's dtype.

        On a GPU half-precision factors keep their dtype, because the product accumulates and returns fp32. fp16 cannot
        hold the gradient of small probabilities: there, and on a CPU, the other factor is cast up.
        """
        low = self.head.weight.dtype
        native = chunk.is_cuda and chunk.dtype == torch.float32 and self.hidden.dtype == low
        return low if native and (low == torch.bfloat16 or (low == torch.float16 and not gradient)) else chunk.dtype

    def _weight_blocks(self, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        """W in blocks of the vocabulary with their first and last columns; one block where no cast is needed."""
        weight = self.head.weight[: self.width]
        step = len(weight) if weight.dtype == dtype else UPCAST_ROWS
        for low in range(0, len(weight), step or 1):
            block = weight[low : low + step].to(dtype)
            yield self.start + low, self.start + low + len(block), block


class GivenLogits(DifferentiableLogits):
    """Logits that exist already.

    Args:
        logits: [M, V].
        index: indices of the tokens with a label, [N].
        vocabulary: width of a chunk; columns from there on are cut off.
    """

    def __init__(self, logits: Tensor, index: Tensor, vocabulary: int) -> None:
        self.logits, self.index, self.vocabulary = logits, index, vocabulary
        self.transform = (1.0, None)
        self.inputs = (logits,)

    def fill(self, chunk: Tensor, start: int, stop: int, student: tuple[Tensor, Transform] | None = None) -> None:
        """Copy the logits of the tokens start to stop."""
        chunk.copy_(self.logits[:, : self.vocabulary].index_select(0, self.index[start:stop]))

    def fill_columns(self, out: Tensor, ids: Tensor, start: int, stop: int) -> None:
        """Copy the logits of the tokens start to stop."""
        out.copy_(self.logits[self.index[start:stop, None], ids])

    def add_gradients(self, dz: Tensor, gradients: Sequence[Tensor | None], start: int, stop: int) -> None:
        """Copy the gradient of the tokens start to stop to their rows."""
        if gradients[0] is not None:
            gradients[0][:, : self.vocabulary].index_copy_(0, self.index[start:stop], dz)


def _add_product(out: Tensor, a: Tensor, b: Tensor, beta: int = 1) -> None:
    """Out ← beta·out + a b, in the precision of out."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    else:
        torch.addmm(out, a, b, beta=beta, out_dtype=out.dtype, out=out)  # not yet measured
