"""The signals that ask a process to stop: SIGTERM, which schedulers send, and SIGINT, which is Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

T = TypeVar("T")
Handler = Callable[[int, FrameType | None], object] | int | None

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(SystemExit):
    """SIGTERM ended the process: the exit status is 143.

    Args:
        message: a line for the user; empty if it was reported already.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(128 + signal.SIGTERM)
        self.message = message


def stop(number: int) -> BaseException:
    """The exception that ends the process after a signal."""
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated()


def exit_status(error: BaseException) -> int:
    """The exit status of a process that one of these exceptions ended."""
    return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)


class SignalHandlers:
    """A handler of signals, until the previous handlers are restored.

    Python accepts handlers in the main thread only: in another thread, nothing is installed. Processes that are forked
    later, such as the workers of a data loader, ignore the signals that this process handles.

    Args:
        handler: is called with the signal and the present frame.
        signals: the signals.

    Attributes:
        previous: the previous handlers by signal, also after they were restored.
    """

    def __init__(self, handler: Callable[[int, FrameType | None], object], signals: Iterable[int] = SIGNALS) -> None:
        self._handler = handler
        self._signals = tuple(signals)
        self.previous: dict[int, Handler] = {}
        self._process = 0  # in which the handler is installed

    def install(self) -> None:
        """Install the handler."""
        if threading.current_thread() is not threading.main_thread():
            return
        self.restore()
        self._process = os.getpid()
        for number in self._signals:
            previous = signal.signal(number, self._handle)
            self.previous[number] = signal.SIG_DFL if previous is None else previous

    def restore(self) -> None:
        """Restore the previous handlers."""
        if self._process != os.getpid():
            return
        self._process = 0
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._process:
            self._handler(number, frame)


class StopRequest:
    """Whether a signal has asked this process to stop.

    Attributes:
        signal: the signal; 0: none has arrived.
    """

    def __init__(self) -> None:
        self.signal = 0

    def until_requested(self, items: Iterable[T]) -> Iterator[T]:
        """The items up to the request."""
        for item in items:
            if self.signal:
                return
            yield item


@contextmanager
def finish_on_signal(message: str) -> Iterator[StopRequest]:
    """Within the block, the first signal is only recorded, and reported; a second one has its usual effect.

    Args:
        message: the report, one line.
    """
    request = StopRequest()

    def record(number: int, frame: FrameType | None) -> None:
        handlers.restore()
        request.signal = number
        print(message, file=sys.stderr)

    handlers = SignalHandlers(record)
    handlers.install()
    try:
        yield request
    finally:
        handlers.restore()


@contextmanager
def end_on_sigterm(message: str) -> Iterator[None]:
    """Within the block, SIGTERM raises `Terminated`, so that files are closed and locks are released.

    Args:
        message: of the exception.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated(message)

    handlers = SignalHandlers(end, (signal.SIGTERM,))
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:  # a program that calls this one may have its own
        handlers.install()
    try:
        yield
    finally:
        handlers.restore()
