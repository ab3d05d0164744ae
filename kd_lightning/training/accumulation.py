"""Sums over the micro-batches of one optimizer step, on all ranks, and the one division that makes means of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kd_lightning.constants import SOURCES
from kd_lightning.engine.label_mask import next_token_mask
from kd_lightning.losses import LossParts


class AccumulationWindow:
    """What was accumulated since the last optimizer step; nothing in it waits for the device.

    A window knows what was really accumulated, also where the last one of an epoch is shorter.

    Args:
        reduction: `token_mean`, `sequence_mean` or `sum`, as the loss has it.
    """

    def __init__(self, reduction: str) -> None:
        self.reduction = reduction
        self._sums: dict[str, Tensor] = {}

    def add(
        self,
        batch: dict[str, Tensor],
        parts: LossParts,
        notes: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """Add the sums of one micro-batch.

        Args:
            batch: what was trained on.
            parts: its loss.
            notes: more sums, each with the number it is to be divided by.
        """
        sums = {name: (value * parts.weights).sum(dtype=torch.float32) for name, value in parts.values.items()}
        for name, (total, number) in {**parts.by_response, **parts.components, **(notes or {})}.items():
            sums[f"sum of {name}"], sums[f"number of {name}"] = total.float(), number.float()
        sums["divisor"] = parts.divisor.float()
        counted = next_token_mask(batch["labels"])
        sums["counted"] = counted.sum().float()
        source = batch.get("source")
        by_student = source == SOURCES.index("student") if source is not None else counted.new_zeros(len(counted))
        sums["by_student"] = (counted & by_student.bool().view(-1, 1)).sum().float()
        for name, value in sums.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def close(self, reduce: Callable[[Tensor], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Start anew, and give what the window held.

        Args:
            reduce: sums one tensor over the ranks, by one call.

        Returns:
            The divisor of the sums (never 0), and the means by name (those over responses are nan where there was none)
            with `student_share`, the share of counted tokens that the student wrote.
        """
        names = sorted(self._sums)
        totals = reduce(torch.stack([self._sums[name] for name in names]))
        total = dict(zip(names, totals.unbind(), strict=True))
        self._sums = {}
        divisor, counted, by_student = (total.pop(name) for name in ("divisor", "counted", "by_student"))
        divisor = torch.ones_like(divisor) if self.reduction == "sum" else divisor.clamp_min(1)
        responses = {name.removeprefix("sum of ") for name in total if name.startswith("sum of ")}
        over_responses = {name: total.pop(f"sum of {name}") / total.pop(f"number of {name}") for name in responses}
        means = {name: value / divisor for name, value in total.items()} | over_responses
        means["student_share"] = by_student / counted.clamp_min(1)
        return divisor, means


class NonFiniteLossCheck:
    """Stops a run whose loss is not finite; asked one step late, so that no step waits for the device."""

    def __init__(self) -> None:
        self._unchecked: tuple[int, Tensor | None, Tensor] | None = None
        self._arrived: torch.cuda.Event | None = None

    def remember(self, step: int, row_ids: Tensor | None, loss: Tensor) -> None:
        """Keep the loss of one micro-batch until it is asked for."""
        self._unchecked = (step, row_ids, loss.detach().to("cpu", non_blocking=loss.is_cuda))
        if loss.is_cuda:  # asking the tensor itself would wait for all that was queued since; not yet run on a GPU
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def check(self, places: Callable[[list[int]], str]) -> None:
        """Look at the loss that was kept.

        Args:
            places: file and line of rows, in words.

        Raises:
            ValueError: it is NaN or inf; with the step and the rows.
        """
        if self._unchecked is None:
            return
        step, row_ids, loss = self._unchecked
        self._unchecked = None
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        if not torch.isfinite(loss):
            rows = "" if row_ids is None else f", on rows {places(row_ids.tolist())}"
            raise ValueError(f"the loss is {loss.item()} at step {step}{rows}; checkpoints written before it are kept")
