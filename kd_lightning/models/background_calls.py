"""Calls in background threads, with a bound."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class BackgroundCalls:
    """Calls in daemon threads: a program that ends does not wait for a server.

    Args:
        limit: largest number of calls at a time.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._waiting: deque[tuple[Future[object], Callable[[], object]]] = deque()
        self._running = 0
        self._lock = threading.Lock()

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Call a function as soon as fewer than `limit` calls are running."""
        future: Future[T] = Future()
        with self._lock:
            self._waiting.append((future, function))  # type: ignore[arg-type]
            start = self._running < self.limit
            self._running += start
        if start:
            threading.Thread(target=self._work, daemon=True).start()
        return future

    def cancel(self) -> None:
        """Cancel all calls that have not begun."""
        with self._lock:
            while self._waiting:
                self._waiting.popleft()[0].cancel()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._running -= 1
                    return
                future, function = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:  # raised where the result is read
                    future.set_exception(error)
