"""Several requests to a server at a time, with a bound, and their answers in the order in which they finish."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TypeVar

from kd_lightning.distributed.signals import StopRequest
from kd_lightning.models.background_calls import BackgroundCalls
from kd_lightning.models.openai_client import OpenAIClient

T = TypeVar("T")


def answers(
    client: OpenAIClient,
    ask: Callable[[int], T],
    numbers: Iterable[int],
    requests: int,
    request: StopRequest | None = None,
) -> Iterator[tuple[int, T]]:
    """The answer to each number, with the number, in the order in which they finish.

    Args:
        client: that `ask` uses; it is closed if a request fails, or if not all answers are taken.
        ask: sends the request of a number and waits for its answer; called in threads.
        numbers: of the requests.
        requests: largest number of requests at a time, at least 1.
        request: to stop: the requests that are sent are finished, and no more are sent.

    Raises:
        ValueError: the first error of a request.
    """
    stop = request or StopRequest()
    remaining = stop.until_requested(numbers)
    pending: dict[Future[T], int] = {}
    calls = BackgroundCalls(requests)
    complete = False
    try:
        while True:
            for number in remaining:
                pending[calls.submit(functools.partial(ask, number))] = number
                if len(pending) >= 2 * requests:
                    break
            if stop.signal:
                pending = {future: number for future, number in pending.items() if not future.cancel()}
            if not pending:
                complete = True
                return
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            failed = None
            for future in done:
                number = pending.pop(future)
                if future.exception() is None:
                    yield number, future.result()
                else:
                    failed = future
            if failed is not None:
                failed.result()  # raises
    finally:
        if not complete:
            client.close()
        calls.cancel()
