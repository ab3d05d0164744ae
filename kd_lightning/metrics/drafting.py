"""How good a student is as the draft model of its teacher in speculative decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_lightning.constants import IGNORE_INDEX

DRAFT = 4
"""Tokens that the draft model proposes at a time."""


def accepted_length(acceptance: Tensor, labels: Tensor, draft: int = DRAFT) -> Tensor:
    r"""Expected number of tokens that one verification by the teacher gives, at each labeled token.

    \(1 + \sum_{j=1}^{k} \prod_{m=1}^{j} a_m\), where \(a_1, a_2, …\) are the acceptances of this token and the next
    ones of the same response, and k = `draft`, or less where the response has fewer tokens left: a proposal is kept up
    to the first token that is rejected, and the teacher adds one of its own.

    Args:
        acceptance: \(\sum\min(p, q) = 1 - \mathrm{TV}\) of each labeled token, [N].
        labels: shifted, [B, T]; `IGNORE_INDEX`: not labeled. Neighboring labels are of one response.
        draft: number of proposed tokens, at least 1.

    Returns:
        [N], from 1 to 1 + `draft`.

    Raises:
        ValueError: `draft` is below 1.

    Reference: Leviathan et al., arXiv 2211.17192.
    """
    if draft < 1:
        raise ValueError(f"draft must be at least 1, got {draft}")
    labeled = labels != IGNORE_INDEX
    accepted = torch.zeros(labels.shape, dtype=acceptance.dtype, device=acceptance.device)
    accepted[labeled] = acceptance
    product, total = accepted, 1 + accepted
    for step in range(1, min(draft, labels.shape[1])):
        later = torch.zeros_like(accepted)
        later[:, :-step] = accepted[:, step:]
        product = product * later
        total = total + product
    return total[labeled]
