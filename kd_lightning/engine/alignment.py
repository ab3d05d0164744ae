"""Which token of the teacher's input belongs to which of the student's, and the likelihoods of the text in between."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kd_lightning.divergences import CHUNK_STUDENT, CHUNK_TEACHER, CHUNK_TOKENS, ForwardKL
from kd_lightning.engine.chunked import ChunkedPass
from kd_lightning.engine.label_mask import INTEGERS, LabelMask
from kd_lightning.engine.logit_source import DifferentiableLogits
from kd_lightning.engine.token_loss import TokenLoss
from kd_lightning.label_losses import LabelLoss


class TeacherPositions:
    """The position in the teacher's input that each token with a label is compared with.

    Args:
        mask: the student's tokens with a label.
        positions: integers in the shape of the labels; −1: none. Read only where there is a label.
        length: T', positions of the teacher's input.

    Attributes:
        index: indices of the partners in the flattened teacher, [N]; any for tokens without one.
        paired: whether a token has a partner, [N].

    Raises:
        ValueError: they are not integers, of another shape, or one is outside of the teacher's input.
    """

    def __init__(self, mask: LabelMask, positions: Tensor, length: int) -> None:
        if positions.dtype not in INTEGERS:
            raise ValueError(f"teacher_positions must be integers, got {positions.dtype}")
        if positions.shape != mask.shape:
            raise ValueError(
                f"teacher_positions must have the labels' shape {list(mask.shape)}, got {list(positions.shape)}"
            )
        self.mask, self.length = mask, length
        self.position = positions.reshape(-1).index_select(0, mask.index).long()
        wrong = (self.position < -1) | (self.position >= length)
        for n in torch.nonzero(wrong)[:1].flatten().tolist():  # a wait for a GPU
            raise ValueError(
                f"teacher_positions must be −1 or in [0, {length}), the positions of the teacher's input, got "
                f"{int(self.position[n])} in row {int(mask.response[n])}"
            )
        self.paired = self.position >= 0
        self.index = torch.where(self.paired, mask.response * length + self.position, 0)

    def check_increasing(self) -> None:
        """Check that the partners of each row are in the order of the text.

        Raises:
            ValueError: they are not; the message names the row.
        """
        key, response = self.index[self.paired], self.mask.response[self.paired]
        for n in torch.nonzero((key[1:] <= key[:-1]) & (response[1:] == response[:-1]))[:1].flatten().tolist():
            raise ValueError(
                "teacher_positions must increase within a row for ChunkLikelihood, got "
                f"{int(key[n]) % self.length} before {int(key[n + 1]) % self.length} in row {int(response[n])}"
            )

    def chunk_columns(self, student: Tensor, teacher: Tensor, other: LabelMask) -> dict[str, Tensor]:
        """Log-likelihoods of the chunk of each of the student's tokens with a label.

        A chunk is the tokens from one with a partner up to the next one, or to the end of the row, on both sides.

        Args:
            student: log-probabilities of the student's labels, [N].
            teacher: log-probabilities of the teacher's own labels, [M].
            other: the teacher's tokens with a label.

        Returns:
            What `ChunkLikelihood` reads, [N] each: the sums of both models, and the number of the student's tokens; 0
            tokens outside of a chunk, and where the teacher has no label in it.
        """
        self.check_increasing()
        if not len(student):
            return {name: student for name in (CHUNK_TEACHER, CHUNK_STUDENT, CHUNK_TOKENS)}
        start = torch.where(self.paired, self.index, -1).cummax(0).values  # partner of the first token of the chunk
        chunk = (self.paired.cumsum(0) - 1).clamp_min(0)
        inside = (start >= 0) & (start // self.length == self.mask.response)  # not before the row's first pair
        sums, tokens = student.new_zeros(2, len(start)), student.new_zeros(2, len(start))
        sums[0].index_add_(0, chunk, torch.where(inside, student, 0.0))
        tokens[0].index_add_(0, chunk, inside.to(student.dtype))
        last = (torch.searchsorted(start, other.index, right=True) - 1).clamp_min(0)  # of the student, not after it
        within = (start[last] >= 0) & (start[last] <= other.index) & (start[last] // self.length == other.response)
        sums[1].index_add_(0, chunk[last], torch.where(within, teacher, 0.0))
        tokens[1].index_add_(0, chunk[last], within.to(student.dtype))
        counts = inside & (tokens[1][chunk] > 0)
        return {
            CHUNK_TEACHER: sums[1][chunk],
            CHUNK_STUDENT: sums[0][chunk],
            CHUNK_TOKENS: torch.where(counts, tokens[0][chunk], 0.0),
        }


def label_log_probs(
    source: DifferentiableLogits, mask: LabelMask, t: float, dtype: torch.dtype, chunk: int | None
) -> Tensor:
    """Log-probabilities of one model's labels at a temperature, [N], without gradient; −1e4 at least."""
    weights = torch.ones(len(mask.index), dtype=dtype, device=mask.index.device)
    term = TokenLoss(ForwardKL(), _NegativeLogProb(), 1.0, t, False, {}, diagnostics=False, compile=False)
    return -ChunkedPass(term, source, None, {"labels": mask.labels}, chunk).run(weights, ())[0]["ce"]


class _NegativeLogProb(LabelLoss):
    """−log q of the label at the temperature of the loss."""

    temperature = None
    columns = ()

    def forward(self, log_q_label: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        return -log_q_label
