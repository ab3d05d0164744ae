"""One function that runs compiled where that pays, and eagerly, with the same numbers, where it cannot.

The rule: compiled where the first call that takes a gradient has at least `BREAK_EVEN` entries (rows × vocabulary).

Measured by `benchmarks/break_even.py` (AMD EPYC with AVX-512, 2 threads, CPU seconds; calls of 1e6 and of 1e7 entries
say the same): a compilation costs 19 s, or 5 s where torch's cache on disk has it. An entry then takes 11 ns in the
place of 26 (forward KL), 14 in the place of 54 (JSD), 18 in the place of 99 (AMiD over α-β). That is won back after 1e9
entries, 2e8 with the cache (forward KL), 5e8 and 1e8 (JSD), 3e8 and 5e7 (AMiD): after a hundred steps of 1e7 entries at
most, after a thousand of 1e6.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

BREAK_EVEN = 10_000_000  # so that a run of a few hundred steps wins it back

logger = logging.getLogger("kd_lightning")


F = TypeVar("F", bound=Callable[..., Any])


def opaque_to_compile(function: F) -> F:
    """Called as it is inside a step that a user compiles; what is worth compiling in it compiles itself."""

    @functools.wraps(function)
    def alone(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)  # type: ignore[no-untyped-call]
        return function(*args, **kwargs)

    return alone  # type: ignore[return-value]


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
