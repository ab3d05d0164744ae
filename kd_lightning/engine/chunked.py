r"""From hidden states to values and gradients, chunk by chunk, with the gradient computed in the forward pass.

Only tokens with a label are processed. Two buffers of logits exist at a time, one chunk of the student's and one of the
teacher's. A chunk takes three matrix products of the student and one of the teacher:

.. math:: Z = H W^\top, \quad Y = H_t W_t^\top, \quad Z \leftarrow \partial \ell / \partial Z, \quad
          dH = Z W, \quad dW \mathrel{+}= Z^\top H .

The middle step is `TokenLoss`. Backward multiplies the stored gradients by the upstream gradient, in place.

Arithmetic is in fp32, or in float64 if an input is; autocast is disabled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from kd_lightning.engine.logit_source import DifferentiableLogits, LogitSource
from kd_lightning.engine.token_loss import TokenLoss

CHUNK_TOKENS, CHUNK_BYTES = 512, 256 << 20  # on a CPU larger matrix products are hardly faster
CHUNK_TOKENS_GPU, CHUNK_BYTES_GPU = 4096, 512 << 20  # not yet measured


class ChunkedPass:
    """A pass over the N tokens of a batch that have a label; it can run several times.

    Args:
        token_loss: the loss of a token.
        student: the student's logits.
        teacher: the teacher's logits; None: no teacher.
        rows: "labels", inside the vocabulary, and extra inputs per token, each [N].
        chunk: tokens of a chunk; None: chosen by a budget of bytes.

    Attributes:
        values: of the last pass by name, [N].
    """

    def __init__(
        self,
        token_loss: TokenLoss,
        student: DifferentiableLogits,
        teacher: LogitSource | None,
        rows: Mapping[str, Tensor],
        chunk: int | None,
    ) -> None:
        self.token_loss, self.student, self.teacher, self.rows, self.chunk = token_loss, student, teacher, rows, chunk
        self.values: dict[str, Tensor] = {}

    def loss(self, weights: Tensor, summed: bool = True) -> Tensor:
        """Weighted sum of the tokens' losses, 0-d, or the losses themselves, [N]; both can be differentiated.

        The gradient of the sum is computed here and returned in backward. Backward runs the pass again for losses that
        are not summed, whose weights are unknown before, and for a second backward.
        """
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in self.student.inputs):
            return _Loss.apply(self, weights, summed, *self.student.inputs)  # type: ignore[no-any-return,no-untyped-call]
        self.values, _ = self.run(weights, ())
        return self.total(weights, summed)

    def teacher_versions(self) -> list[int | Tensor]:
        """What changes if a tensor of the teacher is changed in place."""
        return [] if self.teacher is None else [_version(x) for x in self.teacher.inputs if x is not None]

    def check_teacher_versions(self, before: Sequence[int | Tensor]) -> None:
        """Check, before the loss is computed again, that the teacher's tensors have not been changed since.

        Autograd does this for tensors that are saved for backward, but also where the gradient is known already: a
        buffer that the user fills with the next batch's teacher logits would be refused.

        Args:
            before: `teacher_versions` of that time.

        Raises:
            RuntimeError: one was changed.
        """
        if any(bool(now != then) for now, then in zip(self.teacher_versions(), before, strict=True)):
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: the "
                "teacher's logits, hidden states or LM head were changed between the loss and a backward that computes "
                "it again (reduction 'none', or a second backward): call backward first, or pass a clone of them"
            )

    def total(self, weights: Tensor, summed: bool) -> Tensor:
        """The losses of the last pass, summed or copied."""
        return (self.values["loss"] * weights).sum() if summed else self.values["loss"].clone()

    @torch.no_grad()
    def run(self, weights: Tensor, needs: Sequence[bool]) -> tuple[dict[str, Tensor], list[Tensor | None]]:
        """Values of the tokens, and gradients of their weighted sum with respect to the student's inputs.

        Args:
            weights: [N].
            needs: whether each of `student.inputs` needs a gradient; empty: none does.
        """
        student, teacher, n, gradient = self.student, self.teacher, len(weights), any(needs)
        device, vocabulary = weights.device, student.vocabulary
        if gradient:
            self.token_loss.choose_compilation(n, vocabulary)
        block, full_blocks = self.token_loss.block_size(n, vocabulary, device), self.token_loss.is_compiled
        chunk = min(n, self.chunk or rows_per_chunk(vocabulary, weights.dtype, device))
        if full_blocks:
            chunk = -(-chunk // block) * block
        z = _chunk_buffer(chunk, vocabulary, weights)
        y = None if teacher is None else _chunk_buffer(chunk, vocabulary, weights)
        gradients = [
            torch.zeros(x.shape, dtype=weights.dtype, device=device) if need and x is not None else None
            for x, need in zip(student.inputs, needs, strict=bool(needs))
        ]
        transforms = (student.transform, (1.0, None) if teacher is None else teacher.transform)
        others = None if teacher is None else teacher.others
        shares = self.token_loss.diagnostics and teacher is not None and teacher.measures_share
        values = {name: torch.empty_like(weights) for name in self.token_loss.outputs(teacher is not None, shares)}
        with torch.autocast(device.type, enabled=False):
            for a in range(0, n, chunk or 1):
                b = min(a + chunk, n)
                student.fill(z[: b - a], a, b)
                if teacher is not None and y is not None:
                    teacher.fill(y[: b - a], a, b, (z[: b - a], student.transform))
                for buffer in (z, y):
                    if buffer is not None and full_blocks:
                        buffer[b - a :] = 0  # padding of the last block
                vectors = {name: column[a:b] for name, column in self.rows.items()} | {"weights": weights[a:b]}
                if teacher is not None:
                    vectors |= teacher.rest(weights[a:b], a, b, self.token_loss.temperatures, shares)
                chunk_values = {name: value[a:b] for name, value in values.items()}
                self.token_loss(z, y, transforms, vectors, block, gradient, chunk_values, others)
                if gradient:
                    student.add_gradients(z[: b - a], gradients, a, b)
        return values, gradients


def _version(x: Tensor) -> int | Tensor:
    """Autograd's counter of in-place changes; a checksum of a tensor made in inference mode, which has no counter."""
    if not x.is_inference():
        return x._version
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return x.detach().view(integers[x.element_size()]).sum(dtype=torch.int64)


def _chunk_buffer(tokens: int, vocabulary: int, like: Tensor) -> Tensor:
    """Uninitialized logits of one chunk, padded: a stride that is a power of two or odd slows matrix products down."""
    return like.new_empty(tokens, padded_width(vocabulary))[:, :vocabulary]


def padded_width(vocabulary: int) -> int:
    """Allocated columns of a chunk's buffer."""
    return -(-vocabulary // 64) * 64 + 16


_simulated: ContextVar[torch.device | None] = ContextVar("simulated device", default=None)


@contextmanager
def chunks_sized_for(device: torch.device | None) -> Iterator[None]:
    """Within the context, chunks have the size that they have on this device; None changes nothing."""
    token = _simulated.set(device)
    try:
        yield
    finally:
        _simulated.reset(token)


def rows_per_chunk(vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens of a chunk: enough for fast matrix products, within a budget of bytes."""
    on_cpu = (_simulated.get() or device).type == "cpu"
    tokens, size = (CHUNK_TOKENS, CHUNK_BYTES) if on_cpu else (CHUNK_TOKENS_GPU, CHUNK_BYTES_GPU)
    return max(32, min(tokens, size // (vocabulary * dtype.itemsize) // 32 * 32))


class _Loss(torch.autograd.Function):
    """A loss whose gradient is computed in forward."""

    @staticmethod
    def forward(ctx: Any, chunked_pass: ChunkedPass, weights: Tensor, summed: bool, *inputs: Tensor | None) -> Tensor:
        chunked_pass.values, gradients = chunked_pass.run(weights, ctx.needs_input_grad[3:] if summed else ())
        ctx.chunked_pass, ctx.weights, ctx.summed = chunked_pass, weights, summed
        ctx.gradients = gradients if summed else None
        ctx.save_for_backward(*inputs)  # for their dtypes, and to detect in-place changes before a recomputation
        ctx.teacher_versions = chunked_pass.teacher_versions()
        return chunked_pass.total(weights, summed)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        with torch.no_grad():
            if gradients is None:
                ctx.chunked_pass.check_teacher_versions(ctx.teacher_versions)
                weights = ctx.weights if ctx.summed else ctx.weights * upstream
                _, gradients = ctx.chunked_pass.run(weights, ctx.needs_input_grad[3:])
            if ctx.summed:  # in place: g * upstream would allocate a second gradient of the LM head
                for gradient in gradients:
                    if gradient is not None:
                        gradient.mul_(upstream)
            cast = [g if g is None else g.to(x.dtype) for g, x in zip(gradients, inputs, strict=True)]
        if torch.is_grad_enabled():  # `create_graph=True`
            cast = [g if g is None else _NoSecondDerivative.apply(g.requires_grad_()) for g in cast]  # type: ignore[no-untyped-call]
        return None, None, None, *cast


class _NoSecondDerivative(torch.autograd.Function):
    """Identity that raises on double backward."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        raise RuntimeError(
            "a distillation loss has no second derivative, because its gradient is computed in forward: "
            "for a gradient penalty, apply the Divergence to log-probabilities that you compute with autograd"
        )
