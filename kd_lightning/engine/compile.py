"""A function that is compiled where that saves time, and otherwise runs eagerly with the same results.

It is compiled if the first call with a gradient has at least `BREAK_EVEN` entries (tokens × vocabulary).

Measured by `benchmarks/break_even.py` (AMD EPYC with AVX-512, 2 threads, CPU seconds; the same for calls of 1e6 and of
1e7 entries): a compilation costs 19 s, or 5 s with torch's cache on disk. An entry then takes 11 ns instead of 26
(forward KL), 14 instead of 54 (JSD), 18 instead of 99 (AMiD with α-β). The compilation has paid off after 1e9 entries,
2e8 with the cache (forward KL), 5e8 and 1e8 (JSD), 3e8 and 5e7 (AMiD): after at most a hundred steps of 1e7 entries, or
a thousand of 1e6.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

BREAK_EVEN = 10_000_000  # so that a run of a few hundred steps is faster with the compilation than without

logger = logging.getLogger("kd_lightning")


F = TypeVar("F", bound=Callable[..., Any])


def opaque_to_compile(function: F) -> F:
    """Decorator: `torch.compile` of a training step leaves the function alone; the loss compiles its own blocks."""

    @functools.wraps(function)
    def uncompiled(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)  # type: ignore[no-untyped-call]
        return function(*args, **kwargs)

    return uncompiled  # type: ignore[return-value]


class Compiled:
    """A function of tensors that is compiled as one graph or not at all.

    The choice is made once, before the first call with a gradient: compiled and eager results differ in the last bits,
    so that a change in the middle of a run would make it irreproducible.

    Args:
        function: the function.
        chosen: whether it is compiled; None: not chosen yet, and it runs eagerly until `choose` is called.
    """

    def __init__(self, function: Callable[..., Any], chosen: bool | None) -> None:
        self.function = function
        self.chosen = chosen
        self._compiled: Callable[..., Any] | None = None

    def choose(self, compiled: bool) -> None:
        """Choose whether the function is compiled."""
        self.chosen = compiled

    def __call__(self, *args: Any) -> Any:
        """Call the function, compiled if that was chosen."""
        if not self.chosen:
            return self.function(*args)
        first = self._compiled is None
        if self._compiled is None:
            logger.info("compiling the loss: the first step takes longer")
            # isolate_recompiles: every objective has its own graphs and its own limit of recompilations
            self._compiled = torch.compile(  # type: ignore[call-overload]
                self.function, fullgraph=True, dynamic=False, isolate_recompiles=True
            )
        try:
            return self._compiled(*args)
        except _failures() as error:
            result = self.function(*args)  # an error in the user's code is raised here with its own message
            self.chosen = False
            when = "does not compile" if first else "does not recompile"
            reason = " ".join(str(error).split("\n")[:2])
            warnings.warn(f"the loss {when} and runs eagerly, which is slower, from now on: {reason}", stacklevel=2)
            return result

    def __getstate__(self) -> dict[str, Any]:
        """State without the compiled function: a copy compiles again."""
        return {**self.__dict__, "_compiled": None}


def _failures() -> tuple[type[BaseException], ...]:
    """Exceptions of a failed compilation (imported late, because the import takes a second)."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    return TorchDynamoException, FailOnRecompileLimitHit, CppCompileError, InvalidCxxCompiler
