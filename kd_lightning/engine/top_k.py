r"""A teacher of which k tokens and the mass of all others are known: the vocabulary cut into k + 1 outcomes.

Divergences of k + 1 outcomes are read from whole rows: let the teacher's remaining mass P be spread over the other
tokens as the student spreads his, Q, that is p_v = q_v P/Q. Every f-divergence of such rows is that of the k + 1
outcomes, for f sees a ratio that is the same all over the rest, and so is its gradient with p held fixed:

.. math:: \frac{\partial}{\partial q_v} q_v f\Big(\frac{p_v}{q_v}\Big) = f\Big(\frac PQ\Big)
          - \frac PQ f'\Big(\frac PQ\Big) = \frac{\partial}{\partial Q} Q f\Big(\frac PQ\Big) .

No coarser cut can raise an f-divergence: what is computed is a lower bound of the full one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kd_lightning.divergences import Divergence

Transform = tuple[float, float | None]  # a head's scale and soft-cap


@dataclass(frozen=True)
class TopK:
    """What is known of a teacher's distribution, at temperature 1.

    Args:
        ids: k different tokens, integers [..., k].
        log_probs: their log-probabilities, [..., k].
        log_tail: the logarithm of all others' mass, [...].
        vocabulary: how many tokens the teacher speaks of.
    """

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor
    vocabulary: int

    @property
    def shape(self) -> torch.Size:
        """Shape without the k."""
        return self.log_tail.shape

    def __getitem__(self, index: Any) -> TopK:
        return TopK(self.ids[index], self.log_probs[index], self.log_tail[index], self.vocabulary)


def top_k(logits: Tensor, labels: Tensor, k: int) -> TopK:
    """The k most probable tokens, of which the last makes room for the label where it is not among them.

    Args:
        logits: [N, V], V > k.
        labels: [N]: the log-probability of these stays known.
        k: at least 1.
    """
    log_p = torch.log_softmax(logits.float(), -1)
    ids = log_p.topk(k, dim=-1).indices
    missing = (ids != labels.unsqueeze(1)).all(1)
    ids[:, -1] = torch.where(missing, labels, ids[:, -1])
    rest = log_p.scatter(-1, ids, -torch.inf)
    return TopK(ids, log_p.gather(-1, ids), rest.logsumexp(-1), logits.shape[-1])


class TopKLogits:
    """Counted rows of a teacher's logits, made from what is known of them and what the student says of the rest.

    Args:
        known: of the counted tokens, [N].
        vocabulary: width of the tile.
    """

    transform: Transform = (1.0, None)

    def __init__(self, known: TopK, vocabulary: int) -> None:
        self.known, self.vocabulary = known, vocabulary
        self.inputs: tuple[Tensor | None, ...] = (known.log_probs, known.log_tail)

    def fill(self, tile: Tensor, a: int, b: int, student: Tensor, transform: Transform) -> None:
        """Write the rows a to b.

        Args:
            tile: written, [b − a, V].
            a: first row.
            b: behind the last row.
            student: the student's products of the same rows, [b − a, V].
            transform: scale and soft-cap that make logits of them.
        """
        scale, cap = transform
        torch.mul(student, scale, out=tile)
        if cap is not None:
            tile.div_(cap).tanh_().mul_(cap)
        ids = self.known.ids[a:b].long()
        tile.scatter_(-1, ids, -torch.inf)
        tile += (self.known.log_tail[a:b] - tile.logsumexp(-1)).unsqueeze(-1)
        tile.scatter_(-1, ids, self.known.log_probs[a:b].to(tile.dtype))


def check_lower_bound(divergence: Divergence, monitors: Mapping[str, Divergence] | None = None) -> None:
    """Check that k + 1 outcomes give a lower bound of an objective and of every monitor.

    Raises:
        ValueError: a component is not an f-divergence; the message names it.
    """
    for part in (divergence, *(monitors or {}).values()):
        name = part.not_f_divergence()
        if name is not None:
            raise ValueError(
                f"{name} cannot be computed from a teacher's top-k log-probabilities: only f-divergences are lower "
                "bounds there (forward and reverse KL, JSD, total variation, α-divergence, skewed KL, and your own "
                "classes with is_f_divergence = True): cache hidden states instead (--kind hidden)"
            )
