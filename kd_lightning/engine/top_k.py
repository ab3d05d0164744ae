r"""Teachers of which only k tokens and the total mass of all others are known: k + 1 outcomes.

Divergences on k + 1 outcomes are computed from full rows. The teacher's remaining mass P is distributed over the other
tokens in proportion to the student's probabilities there, which sum to Q: \(p_v = q_v P/Q\). Every f-divergence of such
a row equals the one on the k + 1 outcomes, because the ratio that f reads is the same for all other tokens. So does its
gradient with p held fixed:

.. math:: \frac{\partial}{\partial q_v} q_v f\Big(\frac{p_v}{q_v}\Big) = f\Big(\frac PQ\Big)
          - \frac PQ f'\Big(\frac PQ\Big) = \frac{\partial}{\partial Q} Q f\Big(\frac PQ\Big) .

Merging outcomes cannot increase an f-divergence: the value is a lower bound of the one on all tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kd_lightning.divergences import Divergence, described
from kd_lightning.engine.head import FLOATS, Transform, apply_transform
from kd_lightning.engine.label_mask import INTEGERS
from kd_lightning.engine.logit_source import LogitSource
from kd_lightning.engine.vocabulary_map import VocabularyMap


@dataclass(frozen=True)
class TopK:
    """A teacher's top-k log-probabilities at temperature 1.

    Args:
        ids: k different tokens, integers [..., k].
        log_probs: their log-probabilities, [..., k].
        log_tail: logarithm of the total mass of all other tokens, [...].
        vocabulary: size of the teacher's vocabulary.

    Raises:
        ValueError: an argument is of another type or shape.
    """

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor
    vocabulary: int

    def __post_init__(self) -> None:
        for name, tensor in (("ids", self.ids), ("log_probs", self.log_probs), ("log_tail", self.log_tail)):
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{name} of a TopK must be a torch.Tensor, got {described(tensor)}")
            if (tensor.dtype in INTEGERS) != (name == "ids") or (name != "ids" and tensor.dtype not in FLOATS):
                kind = "integers" if name == "ids" else "floating point"
                raise ValueError(f"{name} of a TopK must be {kind}, got {tensor.dtype}")
        if self.ids.shape != self.log_probs.shape or self.ids.shape[:-1] != self.log_tail.shape or not self.ids.ndim:
            given = ", ".join(str(list(x.shape)) for x in (self.ids, self.log_probs, self.log_tail))
            raise ValueError(f"a TopK must have ids [..., k], log_probs [..., k] and log_tail [...], got {given}")
        if not isinstance(self.vocabulary, int) or isinstance(self.vocabulary, bool) or self.vocabulary < 1:
            raise ValueError(f"vocabulary of a TopK must be an integer ≥ 1, got {described(self.vocabulary)}")

    @property
    def shape(self) -> torch.Size:
        """Shape without the dimension of the k tokens."""
        return self.log_tail.shape

    def __getitem__(self, index: Any) -> TopK:
        """Index the dimensions of `shape`; any index that a tensor accepts."""
        return TopK(self.ids[index], self.log_probs[index], self.log_tail[index], self.vocabulary)

    def select(self, index: Tensor) -> TopK:
        """Flatten the dimensions of `shape` and select tokens, index [N]."""
        ids, log_probs = (x.reshape(-1, x.shape[-1]).index_select(0, index) for x in (self.ids, self.log_probs))
        return TopK(ids, log_probs, self.log_tail.reshape(-1).index_select(0, index), self.vocabulary)


def top_k(logits: Tensor, labels: Tensor, k: int) -> TopK:
    """The k most probable tokens; the label replaces the last one where it is not among them.

    Args:
        logits: [N, V], V > k.
        labels: [N]; the log-probability of each is always included.
        k: at least 1.
    """
    log_p = torch.log_softmax(logits.float(), -1)
    ids = log_p.topk(k, dim=-1).indices
    missing = (ids != labels.unsqueeze(1)).all(1)
    ids[:, -1] = torch.where(missing, labels, ids[:, -1])
    rest = log_p.scatter(-1, ids, -torch.inf)
    return TopK(ids, log_p.gather(-1, ids), rest.logsumexp(-1), logits.shape[-1])


class TopKLogits(LogitSource):
    """A teacher's logits from its top k and the student's distribution over all other tokens.

    Args:
        known: the top k of the tokens with a label, [N].
        some: whether any of them are known, [N]; None: always. Where not, all of the mass is spread, and the ids may
            repeat one token.
    """

    def __init__(self, known: TopK, some: Tensor | None = None) -> None:
        self.known, self.vocabulary, self.some = known, known.vocabulary, some
        self.transform = (1.0, None)
        self.inputs = (known.log_probs, known.log_tail)

    def fill(self, chunk: Tensor, start: int, stop: int, student: tuple[Tensor, Transform] | None = None) -> None:
        """Write the logits of the tokens start to stop."""
        assert student is not None
        products, transform = student
        apply_transform(products, transform, out=chunk)
        ids, log_probs = self.known.ids[start:stop].long(), self.known.log_probs[start:stop].to(chunk.dtype)
        if self.some is None:
            chunk.scatter_(-1, ids, -torch.inf)
        else:
            some = self.some[start:stop].unsqueeze(-1)
            chunk.scatter_(-1, ids, torch.where(some, -torch.inf, chunk.gather(-1, ids)))
        chunk += (self.known.log_tail[start:stop] - chunk.logsumexp(-1)).unsqueeze(-1)
        if self.some is not None:
            log_probs = torch.where(some, log_probs, chunk.gather(-1, ids))
        chunk.scatter_(-1, ids, log_probs)

    def without_label(self) -> TopKLogits:
        """The top k − 1: the least probable known token is the k-th, or the label instead of it; it joins the rest."""
        known = self.known
        last = known.log_probs.argmin(-1, keepdim=True)
        order = torch.arange(known.ids.shape[-1] - 1, device=last.device)
        kept = order + (order >= last)  # all but the last
        ids, log_probs = known.ids.gather(-1, kept), known.log_probs.gather(-1, kept)
        log_tail = torch.logaddexp(known.log_tail, known.log_probs.gather(-1, last).squeeze(-1))
        return TopKLogits(TopK(ids, log_probs, log_tail, known.vocabulary))


def mapped_top_k(known: TopK, vocabulary_map: VocabularyMap) -> TopKLogits:
    """The logits of a teacher with another vocabulary; known tokens without a partner join all others.

    Args:
        known: the top k of the tokens with a label, [N], in the teacher's vocabulary.
        vocabulary_map: the tokens that both models share, on the same device.
    """
    partners, ids = vocabulary_map.student_of_teacher, known.ids.long()
    inside = (ids >= 0) & (ids < vocabulary_map.teacher_size)
    ids = torch.where(inside, partners[torch.where(inside, ids, 0)], -1)
    shared = ids >= 0
    others = torch.where(shared, -torch.inf, known.log_probs)
    log_tail = torch.cat([known.log_tail.unsqueeze(-1), others], -1).logsumexp(-1)
    # Entries without a partner repeat the first one with a partner, so that the shapes do not depend on the data.
    first = shared.byte().argmax(-1, keepdim=True)
    ids = torch.where(shared, ids, ids.gather(-1, first)).clamp_min(0)
    log_probs = torch.where(shared, known.log_probs, known.log_probs.gather(-1, first))
    return TopKLogits(TopK(ids, log_probs, log_tail, vocabulary_map.student_size), shared.any(-1))


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
