r"""From hidden states to values and gradients, chunk by chunk of counted rows, with the gradient taken in forward.

Two tiles of logits are alive, whatever the number of rows: the student's and the teacher's. Per chunk of rows, three
products of the student and one of the teacher:

.. math:: Z = H W^\top, \quad Y = H_t W_t^\top, \quad Z \leftarrow \partial \ell / \partial Z, \quad
          dH = Z W, \quad dW \mathrel{+}= Z^\top H .

The middle step is `TokenLoss`. Backward multiplies what is there by the upstream gradient, in place.

Arithmetic is fp32, or float64 where an input is; autocast is off inside. Counted rows are picked by index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kd_lightning.engine.logit_source import Model
from kd_lightning.engine.token_loss import TokenLoss
from kd_lightning.engine.top_k import TopKLogits

TILE_ROWS, TILE_BYTES = 512, 256 << 20  # of one tile: from 512 rows on a CPU's products gain little
TILE_ROWS_GPU, TILE_BYTES_GPU = 4096, 512 << 20  # not yet measured


class ChunkedPass:
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
        teacher: Model | TopKLogits | None,
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
        chunk = min(n, self.chunk or rows_per_chunk(vocabulary, weights.dtype, device))
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
                if isinstance(teacher, TopKLogits) and y is not None:
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
    return like.new_empty(rows, padded_width(vocabulary))[:, :vocabulary]


def padded_width(vocabulary: int) -> int:
    """Columns that a tile of so many has room for."""
    return -(-vocabulary // 64) * 64 + 16


def rows_per_chunk(vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of a tile: as many as make products fast, within the bytes a tile may have."""
    rows, size = (TILE_ROWS, TILE_BYTES) if device.type == "cpu" else (TILE_ROWS_GPU, TILE_BYTES_GPU)
    return max(32, min(rows, size // (vocabulary * dtype.itemsize) // 32 * 32))


class _Loss(torch.autograd.Function):
    """A loss whose gradient is there before anybody asks."""

    @staticmethod
    def forward(ctx: Any, sweep: ChunkedPass, weights: Tensor, summed: bool, *inputs: Tensor | None) -> Tensor:
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
