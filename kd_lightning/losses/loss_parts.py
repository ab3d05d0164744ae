"""The result of a loss on one batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

from kd_lightning.engine.sequence_stats import Mean


@dataclass
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
            "teacher_nll" is 0. The mean over aligned tokens is Σ weights·value / Σ weights·aligned. With a map, full
            logits of the teacher and the `diagnostics` also "shared_mass_teacher" and "shared_mass_student", the
            probability that each model gives to the tokens of both, at temperature 1.
        by_response: means over responses if a schedule reads extra inputs per token: "gap", "teacher_gap" and
            "student_gap" (by the column `source`), and "schedule/PATH" for each such schedule.
        components: means over tokens of the components of the objective, where they were measured.
        token_weights: sums over tokens by the path of each `Weighted` in the objective, for its `update`: the sum of
            the weights, the tokens with a weight above 0, the tokens, and a histogram if the weight needs one.
        reduction: of the loss, which says what the divisor counts.

    Examples:
        >>> import torch
        >>> from kd_lightning import DistillationLoss, ForwardKL
        >>> student, teacher = torch.tensor([[[0.25, 0.75]] * 3, [[0.5, 0.5]] * 3]).log()
        >>> parts = DistillationLoss(ForwardKL()).from_logits(student, teacher, torch.tensor([0, 1, -100]))
        >>> parts.loss, parts.divisor, parts.mean
        (tensor(0.2877), tensor(2.), tensor(0.1438))
    """

    loss: Tensor
    divisor: Tensor
    weights: Tensor
    values: dict[str, Tensor]
    by_response: dict[str, Mean] = field(default_factory=dict)
    components: dict[str, Mean] = field(default_factory=dict)
    token_weights: dict[str, Tensor] = field(default_factory=dict)
    reduction: str = "token_mean"

    @property
    def mean(self) -> Tensor:
        """The divided loss; 0 without labels."""
        return self.loss / self.divisor.clamp_min(1)

    def divided(self, by: Tensor | float | None = None, group: dist.ProcessGroup | None = None) -> Tensor:
        """The loss of a training step of another loop, whose gradients add up to those of the mean over all its tokens.

        Args:
            by: labeled tokens of the whole step: of all micro-batches, and of all ranks if there are several (Hugging
                Face's `num_items_in_batch`). None: the divisor of this batch.
            group: ranks whose gradients are averaged, as DDP does. The divisor of this batch is summed over them (`by`
                is that sum already), and the loss is multiplied by their number. All of them must call. None: one
                process.

        Raises:
            ValueError: `by` is not above 0, or is given although the divisor is not the number of labeled tokens; the
                reduction is "none".

        Examples:
            >>> import torch
            >>> from kd_lightning import DistillationLoss, ForwardKL
            >>> loss, logits = DistillationLoss(ForwardKL(), ce_weight=1), torch.zeros(3, 4)
            >>> parts = [loss.from_logits(logits[:n], None, torch.arange(n)) for n in (1, 2)]  # two micro-batches
            >>> sum(part.divided(by=3) for part in parts)  # log 4: the mean over all three tokens
            tensor(1.3863)
        """
        if self.reduction == "none":
            raise ValueError("divided needs a loss that is one number: reduction must not be 'none'")
        if by is not None and self.reduction != "token_mean":
            raise ValueError(
                f"by is a number of tokens, and reduction {self.reduction!r} does not divide by that: use "
                "reduction='token_mean', or divide by the sum of `divisor` over the batches of the step"
            )
        if by is not None and not isinstance(by, Tensor) and not by > 0:
            raise ValueError(f"by must be above 0, the number of labeled tokens, got {by}")
        divisor = self.divisor if by is None else by
        if group is None:
            return self.loss / (divisor.clamp_min(1) if isinstance(divisor, Tensor) else divisor)
        if by is None and self.reduction != "sum":
            divisor = self.divisor.detach().clone()
            dist.all_reduce(divisor, group=group)
        ranks = dist.get_world_size(group)
        return self.loss * ranks / (divisor.clamp_min(1) if isinstance(divisor, Tensor) else divisor)


OF_ALL_TOKENS = ("loss", "kd", "ce", "student_nll", "aligned", "gap")
"""Values whose mean is over all tokens with a label, whether the teacher's input has a partner of them or not."""


def measured_tokens(values: Mapping[str, Tensor], name: str) -> Tensor | None:
    """The tokens over which the mean of a value is taken, 1 or 0 each, [N]; None: all of them.

    With two tokenizers a divergence is measured where both models have read the same text, and the teacher's NLL where
    besides the label has a partner.

    Args:
        values: of a `LossParts`.
        name: of the value.
    """
    if name in OF_ALL_TOKENS or "aligned" not in values:
        return None
    return values["label_aligned" if name == "teacher_nll" else "aligned"]
