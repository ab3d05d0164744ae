"""Stops a run whose loss is not finite."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class NonFiniteLossCheck:
    """Stops a run whose loss is NaN or infinite; checked one step late, so that no step waits for the device."""

    def __init__(self) -> None:
        self._unchecked: tuple[int, Tensor | None, Tensor] | None = None
        self._arrived: torch.cuda.Event | None = None

    def remember(self, step: int, row_ids: Tensor | None, loss: Tensor) -> None:
        """Keep the loss of one micro-batch until `check`."""
        self._unchecked = (step, row_ids, loss.detach().to("cpu", non_blocking=loss.is_cuda))
        if loss.is_cuda:  # reading the tensor would wait for everything queued since; not yet run on a GPU
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def check(self, locations: Callable[[list[int]], str]) -> None:
        """Check the loss that was kept.

        Args:
            locations: file and line of rows, for the message.

        Raises:
            ValueError: it is NaN or infinite; the message has the step and the rows.
        """
        if self._unchecked is None:
            return
        step, row_ids, loss = self._unchecked
        self._unchecked = None
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        if not torch.isfinite(loss):
            rows = "" if row_ids is None else f", on rows {locations(row_ids.tolist())}"
            raise ValueError(
                f"the loss is {loss.item()} at step {step}{rows}; checkpoints written before it are kept: lower the "
                "learning rate, clip gradients, or check these rows, and resume"
            )
