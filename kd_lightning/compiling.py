"""One function that runs compiled where that pays, and eagerly, with the same numbers, where it cannot."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch

# Entries (rows × vocabulary) of the first call from which compiling is worth its seconds. A compilation costs 5 to 25 s
# and saves 2 to 60 ns per entry (least for the KL divergences, most for mixtures), so it is won back after 1e8 to 5e9
# entries: within some hundred steps of this size.
BREAK_EVEN = 10_000_000

logger = logging.getLogger("kd_lightning")


class Compiled:
    """A function of tensors, compiled whole or not at all.

    Whoever owns it sets `chosen` once, at the start: compiled and eager differ in the last bits, so a change in the
    middle of a run would break its repetition. None counts as no.

    Args:
        function: what is called.
        chosen: whether it is compiled.
    """

    def __init__(self, function: Callable[..., Any], chosen: bool | None) -> None:
        self.function = function
        self.chosen = chosen
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        """Call the function, compiled where that was chosen."""
        if not self.chosen:
            return self.function(*args)
        first = self._compiled is None
        if self._compiled is None:
            logger.info("compiling the loss: the first step takes longer")
            # isolate_recompiles: every objective has graphs of its own, and none counts against another's limit
            self._compiled = torch.compile(  # type: ignore[call-overload]
                self.function, fullgraph=True, dynamic=False, isolate_recompiles=True
            )
        try:
            return self._compiled(*args)
        except _failures() as error:
            result = self.function(*args)  # a fault in the user's code shows here in its own words
            self.chosen = False
            when = "does not compile" if first else "does not compile again"
            reason = " ".join(str(error).split("\n")[:2])
            warnings.warn(f"the loss {when} and runs eagerly, slower, from now on: {reason}", stacklevel=2)
            return result

    def __getstate__(self) -> dict[str, Any]:
        """A copy or another process compiles for itself."""
        return {**self.__dict__, "_compiled": None}


def _failures() -> tuple[type[BaseException], ...]:
    """What a compilation raises when it cannot be done (imported late: this takes a second)."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    return TorchDynamoException, FailOnRecompileLimitHit, CppCompileError, InvalidCxxCompiler
