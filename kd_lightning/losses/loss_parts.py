"""The result of a loss on one batch."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from kd_lightning.engine.sequence_stats import Mean


@dataclass(frozen=True)
class LossParts:
    """A loss that is not divided yet, so that sums over batches and ranks are exact.

    Args:
        loss: weighted sum of the tokens' losses, 0-d, with gradient; with reduction "none" the losses themselves, in
            the shape of the labels, 0 for tokens without a label.
        divisor: 0-d: number of labels for "token_mean", of responses with a label for "sequence_mean", else 1.
        weights: [N], of each token with a label: 1 / the number of labels of its response for "sequence_mean", else 1.
        values: per token by name, [N], without gradient: "loss", "ce" (the label loss), with a teacher "kd" (the
            divergence as in the loss, T² included), every monitor, the `diagnostics`, and "gap" if a schedule reads the
            responses' log-probabilities: exp(teacher) − exp(student) of the token's response. With a map of two
            vocabularies or with `teacher_positions` also "aligned", 1 for a token with a partner in the teacher's input
            and 0 otherwise, where "kd" (but for `ChunkLikelihood`), the monitors and "agreement" are 0; and
            "label_aligned", 1 where besides the label has a partner in the teacher's vocabulary and 0 otherwise, where
            "teacher_nll" is 0. The mean over aligned tokens is Σ weights·value / Σ weights·aligned.
        by_response: means over responses if a schedule reads extra inputs per token: "gap", "teacher_gap" and
            "student_gap" (by the column `source`), and "schedule/PATH" for each such schedule.
        components: means over tokens of the components of the objective, where they were measured.
        token_weights: sums over tokens by the path of each `Weighted` in the objective, for its `update`: the sum of
            the weights, the tokens with a weight above 0, the tokens, and a histogram if the weight needs one.
    """

    loss: Tensor
    divisor: Tensor
    weights: Tensor
    values: dict[str, Tensor]
    by_response: dict[str, Mean] = field(default_factory=dict)
    components: dict[str, Mean] = field(default_factory=dict)
    token_weights: dict[str, Tensor] = field(default_factory=dict)

    @property
    def mean(self) -> Tensor:
        """The divided loss; 0 without labels."""
        return self.loss / self.divisor.clamp_min(1)
