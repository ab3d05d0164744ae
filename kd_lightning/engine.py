r"""From hidden states to values and gradients, chunk by chunk of counted rows, with the gradient taken in forward.

Two tiles of logits are alive, whatever the number of rows: the student's and the teacher's. Per chunk of rows, three
products of the student and one of the teacher:

.. math:: Z = H W^\top, \quad Y = H_t W_t^\top, \quad Z \leftarrow \partial \ell / \partial Z, \quad
          dH = Z W, \quad dW \mathrel{+}= Z^\top H .

The middle step is `TokenLoss`. Backward multiplies what is there by the upstream gradient, in place.

Arithmetic is fp32, or float64 where an input is; autocast is off inside. Counted rows are picked by index.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kd_lightning.outcomes import Outcomes
from kd_lightning.token_loss import TokenLoss, Transform

TILE_ROWS, TILE_BYTES = 512, 256 << 20  # of one tile: from 512 rows on a CPU's products gain little
TILE_ROWS_GPU, TILE_BYTES_GPU = 4096, 512 << 20  # not yet measured
UPCAST_ROWS = 4096  # vocabulary rows of a half-precision head that are held in fp32 at a time


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


class Projected:
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


class Given:
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


Model = Projected | Given


class Sweep:
    """One pass over the counted rows of a batch, as often as it is asked for.

    Args:
        token_loss: what is computed of a row.
        student: the student's rows.
        teacher: the teacher's, as many; None where there is none.
        rows: "labels" [N], inside the vocabulary, and columns [N] that the objective reads.
        chunk: rows of a tile; None: by a budget of bytes.
    """

    def __init__(
        self,
        token_loss: TokenLoss,
        student: Model,
        teacher: Model | Outcomes | None,
        rows: Mapping[str, Tensor],
        chunk: int | None,
    ) -> None:
        self.token_loss, self.student, self.teacher, self.rows, self.chunk = token_loss, student, teacher, rows, chunk
        self.values: dict[str, Tensor] = {}

    def loss(self, weights: Tensor, summed: bool = True) -> Tensor:
        """Weighted sum of the rows' losses, 0-d, with its gradient; or the losses themselves, [N].

        The gradient of the sum is taken here and handed over in backward. What is not known yet, or was handed over
        already, backward computes again: the gradient of losses that are not summed, and of a second backward.
        """
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in self.student.inputs):
            return _Loss.apply(self, weights, summed, *self.student.inputs)  # type: ignore[no-any-return,no-untyped-call]
        self.values, _ = self.run(weights, ())
        return self.total(weights, summed)

    def total(self, weights: Tensor, summed: bool) -> Tensor:
        """The values of the last pass as one loss, or as a copy."""
        return (self.values["loss"] * weights).sum() if summed else self.values["loss"].clone()

    @torch.no_grad()
    def run(self, weights: Tensor, needs: Sequence[bool]) -> tuple[dict[str, Tensor], list[Tensor | None]]:
        """Values of the rows, and gradients of their weighted sum with respect to the student's inputs.

        Args:
            weights: [N].
            needs: which of `student.inputs` want a gradient.
        """
        student, teacher, n, gradient = self.student, self.teacher, len(weights), any(needs)
        device, vocabulary = weights.device, student.vocabulary
        height, whole = self.token_loss.height(n, vocabulary, device, gradient)
        chunk = min(n, self.chunk or budget(vocabulary, weights.dtype, device))
        if whole:
            chunk = -(-chunk // height) * height
        z = _tile(chunk, vocabulary, weights)
        y = None if teacher is None else _tile(chunk, vocabulary, weights)
        gradients = [
            torch.zeros(x.shape, dtype=weights.dtype, device=device) if need and x is not None else None
            for x, need in zip(student.inputs, needs, strict=bool(needs))
        ]
        transforms = (student.transform, (1.0, None) if teacher is None else teacher.transform)
        values = {name: torch.empty_like(weights) for name in self.token_loss.names(teacher is not None)}
        with torch.autocast(device.type, enabled=False):
            for a in range(0, n, chunk or 1):
                b = min(a + chunk, n)
                student.fill(z[: b - a], a, b)
                if isinstance(teacher, Outcomes) and y is not None:
                    teacher.fill(y[: b - a], a, b, z[: b - a], student.transform)
                elif teacher is not None and y is not None:
                    teacher.fill(y[: b - a], a, b)  # type: ignore[call-arg]
                for tile in (z, y):
                    if tile is not None and whole:
                        tile[b - a :] = 0  # rows that fill up the last block
                vectors = {name: column[a:b] for name, column in self.rows.items()} | {"weights": weights[a:b]}
                chunk_values = {name: value[a:b] for name, value in values.items()}
                self.token_loss(z, y, transforms, vectors, height, gradient, chunk_values)
                if gradient:
                    student.take(z[: b - a], gradients, a, b)
        return values, gradients


def _tile(rows: int, vocabulary: int, like: Tensor) -> Tensor:
    """Room for logits; rows a power of two or an odd number apart would make the matrix products slow."""
    return like.new_empty(rows, padded(vocabulary))[:, :vocabulary]


def padded(vocabulary: int) -> int:
    """Columns that a tile of so many has room for."""
    return -(-vocabulary // 64) * 64 + 16


def budget(vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of a tile: as many as make products fast, within the bytes a tile may have."""
    rows, size = (TILE_ROWS, TILE_BYTES) if device.type == "cpu" else (TILE_ROWS_GPU, TILE_BYTES_GPU)
    return max(32, min(rows, size // (vocabulary * dtype.itemsize) // 32 * 32))


def _add_product(out: Tensor, a: Tensor, b: Tensor, beta: int = 1) -> None:
    """Out ← beta·out + a b, in the precision of out."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    else:
        torch.addmm(out, a, b, beta=beta, out_dtype=out.dtype, out=out)  # not yet measured


class _Loss(torch.autograd.Function):
    """A loss whose gradient is there before anybody asks."""

    @staticmethod
    def forward(ctx: Any, sweep: Sweep, weights: Tensor, summed: bool, *inputs: Tensor | None) -> Tensor:
        sweep.values, gradients = sweep.run(weights, ctx.needs_input_grad[3:] if summed else ())
        ctx.sweep, ctx.weights, ctx.summed = sweep, weights, summed
        ctx.gradients = gradients if summed else None
        ctx.save_for_backward(*inputs)  # for their dtypes, and so that a change before a recomputation is noticed
        return sweep.total(weights, summed)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        with torch.no_grad():
            if gradients is None:
                weights = ctx.weights if ctx.summed else ctx.weights * upstream
                _, gradients = ctx.sweep.run(weights, ctx.needs_input_grad[3:])
            if ctx.summed:  # in place and without asking: g * upstream is a second head gradient
                for gradient in gradients:
                    if gradient is not None:
                        gradient.mul_(upstream)
            cast = [g if g is None else g.to(x.dtype) for g, x in zip(gradients, inputs, strict=True)]
        if torch.is_grad_enabled():  # `create_graph=True`
            cast = [g if g is None else _Once.apply(g.requires_grad_()) for g in cast]  # type: ignore[no-untyped-call]
        return None, None, None, *cast


class _Once(torch.autograd.Function):
    """A gradient that says so where it is asked for its own."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        raise RuntimeError(
            "a distillation loss has no second derivative, as its gradient is taken in forward: "
            "for a penalty on gradients apply the Divergence to log-probabilities of your own"
        )
