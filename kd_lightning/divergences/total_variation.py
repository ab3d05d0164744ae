r"""Total variation distance."""

from __future__ import annotations

from typing import final

from torch import Tensor

from kd_lightning import functional
from kd_lightning.divergences.base import Divergence


@final
class TotalVariation(Divergence):
    r"""\(\frac12\sum|p-q|\), in [0, 1].

    Examples:
        >>> import torch
        >>> from kd_lightning import TotalVariation
        >>> log_p, log_q = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
        >>> TotalVariation()(log_p, log_q)
        tensor(0.2500)
    """

    is_f_divergence = True

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Divergence per token."""
        return functional.total_variation(log_p, log_q)
