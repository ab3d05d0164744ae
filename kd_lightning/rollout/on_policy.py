"""On-policy responses (GKD)."""

from __future__ import annotations

from kd_lightning.models.generate import Sampling
from kd_lightning.rollout.base import ResponseSource, RolloutContext
from kd_lightning.rollout.batches import Batch
from kd_lightning.schedules import Weight, check_weight, value


class OnPolicy(ResponseSource):
    r"""GKD's mix: a share of the steps trains on what the student itself writes to the prompts of the data.

    A coin per step decides, the same on all ranks and for all micro-batches of the step. No gradient goes through the
    sampling. A conversation of several turns is answered once, at its first counted turn.

    Args:
        share: λ in [0, 1], or a schedule.
        max_new_tokens: longest response, at least 1.
        temperature: of sampling, ≥ 0; 0: the likeliest token each time.
        top_p: of sampling, in (0, 1].

    Raises:
        ValueError: an argument is out of its range.

    Reference: Agarwal et al., arXiv 2306.13649.
    """

    sampling: Sampling

    def __init__(
        self, share: Weight = 0.5, max_new_tokens: int = 128, temperature: float = 1.0, top_p: float = 1.0
    ) -> None:
        super().__init__()
        check_weight("share", share, per_row=False)
        self.share = share
        self.sampling = Sampling(max_new_tokens, temperature, top_p)
        self._decided = (-1, False)

    def forward(self, batch: Batch, author: RolloutContext) -> Batch:
        """The student's responses where the coin says so, otherwise the data's."""
        if self._decided[0] != author.step:  # a schedule is asked once a step: reading it waits for the device
            self._decided = (author.step, author.coin() < float(value(self.share)))
        return author.respond(batch, self.sampling) if self._decided[1] else batch
