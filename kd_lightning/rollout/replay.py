"""A buffer of generated responses, and DistiLLM's adaptive use of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kd_lightning.constants import TEACHER_FIELDS, teacher_view
from kd_lightning.distributed.checkpoint_io import ResizableState
from kd_lightning.engine.label_mask import next_token_mask
from kd_lightning.engine.validation import check_count
from kd_lightning.models.generate import Sampling
from kd_lightning.rollout.base import ResponseSource, RolloutContext
from kd_lightning.rollout.batches import Batch, gather_rows, pad_rows
from kd_lightning.rollout.served import served_writer
from kd_lightning.schedules import Linear, Weight, check_number, check_weight, value
from kd_lightning.serving.server import Server


class ReplayBuffer(nn.Module, ResizableState):
    """Rows of batches, first in, first out; its tensors are part of the `state_dict` and grow as they fill.

    Args:
        capacity: largest number of rows, at least 1; None: unlimited until `clear`.

    Raises:
        ValueError: the capacity is below 1.
    """

    pushed: Tensor

    def __init__(self, capacity: int | None) -> None:
        super().__init__()
        if capacity is not None:
            check_count("capacity", capacity)
        self.capacity = capacity
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))

    @property
    def columns(self) -> dict[str, Tensor]:
        """The stored columns by name."""
        return {name: buffer for name, buffer in self.named_buffers() if name != "pushed"}

    @property
    def filled(self) -> int:
        """Number of stored rows."""
        return int(self.pushed) if self.capacity is None else min(int(self.pushed), self.capacity)

    def clear(self) -> None:
        """Remove all rows."""
        for name in self.columns:
            del self._buffers[name]
        self.pushed.zero_()

    def push(self, batch: Batch) -> None:
        """Store the rows that have a label."""
        labeled = next_token_mask(batch["labels"]).any(1)
        rows = {name: column[labeled] for name, column in batch.items()}
        count, before = int(labeled.sum()), int(self.pushed)
        slots = torch.arange(before, before + count, device=labeled.device)
        if self.capacity is not None:
            rows, slots = {n: c[-self.capacity :] for n, c in rows.items()}, slots[-self.capacity :] % self.capacity
        height = min(before + count, self.capacity or before + count)
        for name, column in rows.items():
            column = column.int() if column.dtype == torch.int64 else column
            kept = self.columns.get(name, column.new_empty((0, *column.shape[1:])))
            width = max(kept.shape[-1], column.shape[-1])
            if len(kept) < height or (column.ndim == 2 and kept.shape[1] < width):
                kept = pad_rows(kept, max(height, len(kept)), width, name)
                self.register_buffer(name, kept)
            kept[slots] = pad_rows(column, len(column), kept.shape[-1], name)
        self.pushed += count

    def rows(self, index: Tensor) -> Batch:
        """The rows at `index` as a batch, as wide as the longest of them."""
        found = {name: column[index.to(column.device)] for name, column in self.columns.items()}
        width, own = (int(mask["attention_mask"].sum(1).max()) for mask in (found, teacher_view(found)))
        widths = dict.fromkeys(found, width) | dict.fromkeys(TEACHER_FIELDS.values(), own)
        found = {name: column[:, : widths[name]] if column.ndim == 2 else column for name, column in found.items()}
        return {name: column.long() if column.dtype == torch.int32 else column for name, column in found.items()}

    def resize_to(self, state: Mapping[str, Tensor]) -> None:
        """Allocate columns with the names and shapes of a state that will be loaded."""
        for name in self.columns:
            del self._buffers[name]
        for name, tensor in state.items():
            if name != "pushed":
                self.register_buffer(name, torch.empty_like(tensor, device=self.pushed.device))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a state of any number of rows."""
        self.resize_to({key.removeprefix(prefix): x for key, x in state_dict.items() if key.startswith(prefix)})
        super()._load_from_state_dict(state_dict, prefix, *args)


class AdaptiveReplay(ResponseSource):
    r"""DistiLLM's adaptive off-policy schedule: on-policy samples in a replay buffer, used more as validation worsens.

    A random number u per step, the same on all ranks: below \(\phi\,s\) (or below φ until the buffer is full) the
    student generates responses, which are stored; otherwise below φ the step trains on random rows of the buffer; else
    on the data. φ increases by `rise` whenever the cross entropy of validation is at least `tolerance` above that of
    the last increase (at first: above the first validation); s, the share of fresh responses, decreases during the run.
    A validation before step 0, as in the authors' code, is `trainer.num_sanity_val_steps=-1`. All ranks keep the rows
    of all ranks.

    Args:
        threshold: initial φ, in [0, 1].
        rise: added to φ, which stays at most 1; > 0.
        tolerance: ≥ 0.
        capacity: rows of the buffer, at least 1.
        fresh_share: s in [0, 1], or a schedule; None: `Linear(1, 0)`.
        max_new_tokens: longest response, at least 1.
        temperature: of sampling, ≥ 0.
        top_p: of sampling, in (0, 1].
        writer: a server that generates the responses with the student's weights, those of the next batch while a step
            trains; None: they are generated in this process.
        max_staleness: largest number of optimizer steps between the weights that generate a response and those that are
            trained on it first, at least 0; 0: as in this process.

    Raises:
        ValueError: an argument is out of its range.

    Reference: Ko et al., arXiv 2402.03898.

    Examples:
        >>> from kd_lightning import AdaptiveReplay
        >>> source = AdaptiveReplay(threshold=0.5)
        >>> source.validated(2.0, step=0)
        >>> source.validated(2.5, step=100)  # worse: the threshold rises
        >>> source.threshold, source.decide(0.3), source.decide(0.7)
        (tensor(0.6000), 'write', 'data')
    """

    sampling: Sampling
    columns = ()
    uses_data = True
    replays = True
    threshold: Tensor
    previous: Tensor
    heard: Tensor

    def __init__(
        self,
        threshold: float = 0.0,
        rise: float = 0.1,
        tolerance: float = 0.1,
        capacity: int = 1000,
        fresh_share: Weight | None = None,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
        writer: Server | None = None,
        max_staleness: int = 0,
    ) -> None:
        super().__init__()
        check_number("threshold", threshold, 0, 1)
        check_number("rise", rise, 0, 1, "(]")
        check_number("tolerance", tolerance, 0)
        check_count("capacity", capacity)
        self.fresh_share: Weight = Linear(1.0, 0.0) if fresh_share is None else fresh_share
        check_weight("fresh_share", self.fresh_share, per_row=False)
        self.rise, self.tolerance = rise, tolerance
        self.sampling = Sampling(max_new_tokens, temperature, top_p)
        self.served = served_writer(writer, max_staleness)
        self.capacity, self.memory = capacity, ReplayBuffer(capacity)
        self.register_buffer("threshold", torch.tensor(float(threshold)))
        self.register_buffer("previous", torch.tensor(torch.nan))  # no validation yet
        self.register_buffer("heard", torch.tensor(-1))  # the step of the last validation
        self._decided: tuple[int, str] = (-1, "data")

    def forward(self, batch: Batch, context: RolloutContext) -> Batch:
        """The batch of the data, new responses, or stored ones."""
        if self._decided[0] != context.step:  # one decision per step, also if the buffer fills within it
            self._decided = (context.step, self.decide(context.coin()))
        choice = self._decided[1]
        if choice == "write":
            batch = context.respond(batch, self.sampling, served=self.served)
            self.memory.push(gather_rows(batch, context.ranks))
        elif choice == "replay":
            order = context.order(self.memory.filled, context.batch)
            index = context.rank + context.ranks * torch.arange(len(batch["labels"]))
            batch = self.memory.rows(order[index % len(order)])
        following = context.upcoming
        if self.served is not None and following is not None and self.decide(context.coin(following.step)) == "write":
            context.respond_ahead(self.sampling, self.served)
        context.note("replay_fill", self.memory.pushed.clamp_max(self.capacity) / self.capacity)
        context.note("replay_threshold", self.threshold)
        return batch

    def decide(self, coin: float) -> Literal["data", "write", "replay"]:
        """What a step trains on, by its random number."""
        threshold, full = float(self.threshold), self.memory.filled == self.capacity
        if coin >= threshold:
            return "data"
        return "write" if not full or coin < threshold * float(value(self.fresh_share)) else "replay"

    def waits(self, step: int) -> bool:
        """Whether the result of the validation at this step is missing."""
        return int(self.heard) != step

    def validated(self, loss: float, step: int = 0) -> None:
        """Increase the threshold if the loss has increased."""
        self.heard.fill_(step)
        if self.previous.isnan():
            self.previous.fill_(loss)
        elif loss >= float(self.previous) + self.tolerance:
            self.threshold.add_(self.rise).clamp_max_(1.0)
            self.previous.fill_(loss)
