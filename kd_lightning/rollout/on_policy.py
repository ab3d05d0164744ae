"""On-policy responses (GKD)."""

from __future__ import annotations

from kd_lightning.models.generate import Sampling
from kd_lightning.rollout.base import ResponseSource, RolloutContext
from kd_lightning.rollout.batches import Batch
from kd_lightning.schedules import Weight, check_weight, value


class OnPolicy(ResponseSource):
    r"""GKD's mix: a share of the steps trains on responses of the student to the prompts of the data.

    The choice is random per step, the same on all ranks and for all micro-batches of the step. No gradient flows
    through the sampling. In a conversation of several turns, the first turn with labels is generated.

    Args:
        share: λ in [0, 1], or a schedule.
        max_new_tokens: longest response, at least 1.
        temperature: of sampling, ≥ 0; 0: greedy.
        top_p: of sampling, in (0, 1].

    Raises:
        ValueError: an argument is out of its range.

    Reference: Agarwal et al., arXiv 2306.13649.
    """

    sampling: Sampling
    columns = ()

    def __init__(
        self, share: Weight = 0.5, max_new_tokens: int = 128, temperature: float = 1.0, top_p: float = 1.0
    ) -> None:
        super().__init__()
        check_weight("share", share, per_row=False)
        self.share = share
        self.sampling = Sampling(max_new_tokens, temperature, top_p)
        self._decided = (-1, False)

    @property
    def uses_data(self) -> bool:
        """Whether the share is not the number 1."""
        return self.share != 1

    def forward(self, batch: Batch, context: RolloutContext) -> Batch:
        """Responses of the student or those of the data, by the random number of the step."""
        if self._decided[0] != context.step:  # read the schedule once per step: it waits for the device
            self._decided = (context.step, context.coin() < float(value(self.share)))
        return context.respond(batch, self.sampling) if self._decided[1] else batch
