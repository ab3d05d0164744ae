r"""A divergence of two models' likelihoods of a piece of text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from kd_lightning import functional
from kd_lightning.divergences.base import Composite, Divergence, check_divergence, evaluate
from kd_lightning.divergences.kl import ForwardKL
from kd_lightning.schedules import check_number, column

CHUNK_TEACHER, CHUNK_STUDENT, CHUNK_TOKENS = "chunk_teacher", "chunk_student", "chunk_tokens"
CHUNK_LOG_Q = "chunk_log_q"
"""Entry of `rows` with the label's log-probability under the student, through which the gradient flows."""


@final
class ChunkLikelihood(Composite):
    r"""\(\sum_c D\big((e^{P_c/\tau}, 1-e^{P_c/\tau}), (e^{S_c/\tau}, 1-e^{S_c/\tau})\big)\) over chunks c of the text.

    P and S are the teacher's and the student's log-likelihoods of the same bytes: the sums of the labels'
    log-probabilities, each in the tokens of its own model, at the temperature of the loss. A chunk starts at a token
    with a partner in `teacher_positions` and ends before the next one. Each of its tokens carries an equal part of the
    value and, with \(\partial D / \partial S\), its own part of the gradient; with reduction "none" the gradient of a
    chunk is exact if its tokens have equal weights. Reduces, where every token is a chunk and D is forward KL, to the
    binary KL of the labels' probabilities. Tokens outside of chunks have 0, and so have models that differ only in how
    likely they find other texts.

    Use it as the objective, or in a `WeightedSum` beside a divergence. It needs `teacher_positions` and
    `teacher_labels`, and costs one more projection of both models. It reads the entries of `rows` whose names start
    with "chunk_", which the loss computes.

    Args:
        divergence: D, an f-divergence that is computed from two outcomes; None: `ForwardKL()`.
        tau: τ > 0; larger values keep the likelihoods of long chunks away from 0.

    Raises:
        ValueError: an argument is out of range; in `forward`, an entry of `rows` is missing.

    Reference: ALM, Minixhofer et al., arXiv 2503.20083 (τ = 100).

    Examples:
        >>> import torch
        >>> from kd_lightning import ChunkLikelihood, distillation_loss
        >>> logits, labels = torch.zeros(3, 4), torch.tensor([0, 1, 2])  # the teacher's text has two tokens
        >>> text = {"teacher_labels": torch.tensor([0, 1]), "teacher_positions": torch.tensor([0, -1, 1])}
        >>> distillation_loss(logits, torch.zeros(2, 4), labels, objective=ChunkLikelihood(tau=1.0), **text)
        tensor(0.0597)
    """

    columns = (CHUNK_TEACHER, CHUNK_STUDENT, CHUNK_TOKENS, CHUNK_LOG_Q)

    def __init__(self, divergence: Divergence | None = None, tau: float = 100.0) -> None:
        super().__init__()
        divergence = ForwardKL() if divergence is None else divergence
        check_divergence("divergence", divergence)
        if isinstance(divergence, Composite) or not divergence.is_f_divergence:
            raise ValueError(
                f"divergence must be an f-divergence that is not made of others, got {type(divergence).__name__}"
            )
        check_number("tau", tau, 0, ends="()")
        self.divergence = divergence
        self.tau = tau

    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """The token's part of the value of its chunk; log p and log q are not read."""
        teacher, student, tokens, label = (column(rows, name, "ChunkLikelihood") for name in self.columns)
        label = label.clamp_min(functional.FLOOR)
        own = (label - label.detach()) / self.tau  # 0, with the gradient of this token's log-probability
        value = evaluate(self.divergence, _outcomes(teacher / self.tau), _outcomes(student / self.tau, own))
        share = value.detach() / tokens.clamp_min(1) + (value - value.detach())
        return torch.where(tokens > 0, share, 0.0)

    def not_f_divergence(self) -> None:
        """None: it does not depend on what is known of the two distributions."""

    def components(self) -> dict[str, Divergence]:
        """Empty: its divergence compares likelihoods, not the distributions of tokens."""
        return {}


def _outcomes(log_likelihood: Tensor, own: Tensor | float = 0.0) -> Tensor:
    r"""\(\log(e^x, 1 - e^x)\), [..., 2]; x is at most −ε, so that both and their gradients are finite."""
    x = log_likelihood.clamp_max(-torch.finfo(log_likelihood.dtype).eps) + own
    rest = torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
    return torch.stack([x, rest], -1).clamp_min(functional.FLOOR)
