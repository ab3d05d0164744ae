"""Log-probabilities of labels under both models, over the tokens that both have."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import final

from torch import Tensor

from kd_lightning.engine.head import Head
from kd_lightning.label_losses import LabelLoss


def cut_head(head: Head, vocabulary: int | None) -> Head:
    """The head with the first tokens of its vocabulary only; None: with all."""
    if vocabulary is None or head.vocabulary <= vocabulary or head.group is not None:
        return head  # a head that is split over ranks keeps its padding, which has next to no mass
    bias = None if head.bias is None else head.bias[:vocabulary]
    return dataclasses.replace(head, weight=head.weight[:vocabulary], bias=bias)


@final
class LogProb(LabelLoss):
    """The label's log-probability itself, at the loss's temperature."""

    temperature = None
    columns = ()

    def forward(self, log_q_label: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """The log-probability."""
        return log_q_label
