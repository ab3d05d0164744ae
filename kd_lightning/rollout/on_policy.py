"""On-policy responses (GKD)."""

from __future__ import annotations

from kd_lightning.models.generate import Sampling
from kd_lightning.rollout.base import ResponseSource, RolloutContext
from kd_lightning.rollout.batches import Batch
from kd_lightning.rollout.served import served_writer
from kd_lightning.schedules import Weight, check_weight, value
from kd_lightning.serving.server import Server


class OnPolicy(ResponseSource):
    r"""GKD's mix: a share of the steps trains on responses of the student to the prompts of the data.

    The choice is random per step, the same on all ranks and for all micro-batches of the step. No gradient flows
    through the sampling. In a conversation of several turns, the first turn with labels is generated.

    Args:
        share: λ in [0, 1], or a schedule.
        max_new_tokens: longest response, at least 1.
        temperature: of sampling, ≥ 0; 0: greedy.
        top_p: of sampling, in (0, 1].
        writer: a server that generates the responses with the student's weights, those of the next batch while a step
            trains; None: they are generated in this process.
        max_staleness: largest number of optimizer steps between the weights that generate a response and those that are
            trained on it, at least 0; 0: as in this process.

    Raises:
        ValueError: an argument is out of its range.

    Reference: Agarwal et al., arXiv 2306.13649.

    Examples:
        >>> from kd_lightning import DistillationModule, OnPolicy
        >>> module = DistillationModule("asset:student", "asset:teacher", responses=OnPolicy(share=1.0))
        >>> module.responses.uses_data  # no step trains on the responses of the data
        False
    """

    sampling: Sampling
    columns = ()

    def __init__(
        self,
        share: Weight = 0.5,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
        writer: Server | None = None,
        max_staleness: int = 0,
    ) -> None:
        super().__init__()
        check_weight("share", share, per_row=False)
        self.share = share
        self.sampling = Sampling(max_new_tokens, temperature, top_p)
        self.served = served_writer(writer, max_staleness)
        self._decided = (-1, False)

    @property
    def uses_data(self) -> bool:
        """Whether the share is not the number 1."""
        return self.share != 1

    def forward(self, batch: Batch, context: RolloutContext) -> Batch:
        """Responses of the student or those of the data, by the random number of the step."""
        if self._decided[0] != context.step:  # read the schedule once per step: it waits for the device
            self._decided = (context.step, self._generates(context.coin()))
        if self._decided[1]:
            batch = context.respond(batch, self.sampling, served=self.served)
        following = context.upcoming
        if self.served is not None and following is not None and self._generates(context.coin(following.step)):
            context.respond_ahead(self.sampling, self.served)
        return batch

    def _generates(self, coin: float) -> bool:
        return coin < float(value(self.share))
