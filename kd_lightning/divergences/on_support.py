r"""A divergence on the teacher's most probable tokens alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from kd_lightning import functional
from kd_lightning.divergences.base import Composite, Divergence, check_divergence, evaluate


@final
class OnSupport(Composite):
    r"""\(D(\hat p, \hat q)\), both renormalized on the k most probable tokens of the teacher.

    Reduces to D for k ≥ V. 0 also where the models differ only in how much mass they give to these tokens together, or
    outside of them: nothing outside of the k tokens is trained.

    Args:
        divergence: D, any divergence.
        k: number of tokens, at least 1.

    Raises:
        ValueError: an argument is out of range.

    Reference: local support matching, arXiv 2603.25562 (reverse KL).

    Examples:
        >>> import torch
        >>> from kd_lightning import ForwardKL, OnSupport
        >>> log_p, log_q = torch.tensor([[0.4, 0.4, 0.2], [0.2, 0.6, 0.2]]).log()
        >>> OnSupport(ForwardKL(), k=2)(log_p, log_q)  # of (½, ½) and (¼, ¾)
        tensor(0.1438)
    """

    def __init__(self, divergence: Divergence, k: int) -> None:
        super().__init__()
        check_divergence("divergence", divergence)
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise ValueError(f"k must be a number of tokens ≥ 1, got {k!r}")
        self.divergence = divergence
        self.k = k

    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """Divergence per token."""
        return evaluate(self.divergence, *self._restricted(log_p, log_q), rows)

    def _restricted(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """Both distributions on the support, [..., k]."""
        if self.k >= log_p.shape[-1]:
            return log_p, log_q
        ids = log_p.detach().topk(self.k, dim=-1).indices
        a, b = (_renormalized(x.gather(-1, ids)) for x in (log_p, log_q))
        return a, b

    def not_f_divergence(self) -> str:
        """This class: the support of a teacher of which only the top k are known is not known to the loss."""
        return f"OnSupport({type(self.divergence).__name__}, k={self.k})"

    def components(self) -> dict[str, Divergence]:
        """The divergence's components, on the same support."""
        return {name: OnSupport(part, self.k) for name, part in self.divergence.components().items()}

    def token_scores(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The scores of the divergence's weights, on the support."""
        if not self.weighted():
            return {}
        return super().token_scores(*self._restricted(log_p, log_q), rows)


def _renormalized(log_probs: Tensor) -> Tensor:
    """Log-probabilities that sum to 1; a token with probability 0 stays at the floor."""
    dead = log_probs <= functional.FLOOR
    return torch.where(dead, functional.FLOOR, functional.log_softmax(log_probs))
