"""One HTTP request and its answer: with a deadline for the whole answer, a size limit, and no redirect of a POST."""

from __future__ import annotations

import functools
import http.client
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import urljoin

MAX_BYTES = 1 << 26


class AnswerTooLargeError(ValueError):
    """An answer has more than `MAX_BYTES` bytes."""


class SlowAnswerError(Exception):
    """An answer has not arrived in full in time."""


class StatusError(Exception):
    """An answer whose HTTP status is an error.

    Args:
        code: HTTP status code.
        reason: text of the status line.
        content: the body, as far as it arrived.
        retry_after: seconds that the server asks to wait, at most 60.
        location: address that a redirect names; None for other errors.
    """

    def __init__(self, code: int, reason: str, content: bytes, retry_after: float, location: str | None) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
        self.content = content
        self.retry_after = retry_after
        self.location = location


class HTTPExchange:
    """A request and its answer, in a thread of its own: the timeout of a socket starts again at each byte.

    Args:
        request: sent once; a redirect is followed if it is a GET request.
        timeout: seconds for all of it.
        seconds: for the answer to arrive in full after its first byte.
    """

    def __init__(self, request: urllib.request.Request, timeout: float, seconds: float) -> None:
        self._request = request
        self._timeout = timeout
        self._seconds = seconds
        self._deadline = time.monotonic() + timeout
        self._done = threading.Event()
        self._content = b""
        self._error: Exception | None = None

    def content(self, canceled: threading.Event) -> bytes | None:
        """Send the request and wait for the body of the answer; None if the exchange was canceled meanwhile.

        Args:
            canceled: gives the answer up when it is set.

        Raises:
            StatusError: the HTTP status is an error.
            SlowAnswerError: the answer did not arrive in time.
            AnswerTooLargeError: it is larger than `MAX_BYTES`.
            OSError: the connection failed, also as `urllib.error.URLError`.
            http.client.HTTPException: the answer is not HTTP.
        """
        threading.Thread(target=self._run, daemon=True).start()
        while not self._done.wait(0.2):
            if canceled.is_set():
                return None
            self._check_time()
        if self._error is not None:
            raise self._error
        return self._content

    def _run(self) -> None:
        """Send and receive; `_done` is set at the end."""
        opener = urllib.request.build_opener(
            _NoRedirectOfPost, _HTTPHandler(self._begin_answer), _HTTPSHandler(self._begin_answer)
        )
        try:
            with opener.open(self._request, timeout=self._timeout) as answer:
                self._content = self._read(answer)
        except urllib.error.HTTPError as error:
            self._error = self._status_error(error)
        except Exception as error:  # raised in the thread that waits
            self._error = error
        finally:
            self._done.set()

    def _begin_answer(self) -> None:
        """From the first byte on, the answer must arrive soon."""
        self._deadline = min(self._deadline, time.monotonic() + self._seconds)

    def _check_time(self) -> None:
        if time.monotonic() > self._deadline:
            raise SlowAnswerError("the answer did not arrive in full in time")

    def _read(self, answer: Any) -> bytes:
        """The body, if it arrives in full, in time, and has at most `MAX_BYTES`."""
        content = bytearray()
        while part := answer.read1(1 << 16):
            content += part
            if len(content) > MAX_BYTES:
                raise AnswerTooLargeError(f"the answer has more than {MAX_BYTES >> 20} MiB")
            self._check_time()
        if answer.length:
            raise http.client.IncompleteRead(bytes(content), answer.length)
        return bytes(content)

    def _status_error(self, error: urllib.error.HTTPError) -> StatusError:
        location = error.headers.get("Location") if 300 <= error.code < 400 else None
        try:
            content = b"" if location else self._read(error.fp)
        except (OSError, ValueError, http.client.HTTPException, SlowAnswerError):
            content = b""
        try:
            retry_after = max(0.0, min(float(error.headers.get("Retry-After", 0)), 60.0))
        except ValueError:
            retry_after = 0.0
        target = None if location is None else urljoin(self._request.full_url, location)
        return StatusError(error.code, str(error.reason), content, retry_after, target)


class _NoRedirectOfPost(urllib.request.HTTPRedirectHandler):
    """Follows the redirect of a GET request alone: a redirected POST loses its body, and the answer is to nothing."""

    def redirect_request(self, req: urllib.request.Request, *args: Any) -> urllib.request.Request | None:
        return None if req.data is not None else super().redirect_request(req, *args)


class _Response(http.client.HTTPResponse):
    """Reports its first byte."""

    def __init__(self, *args: Any, first_byte: Callable[[], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._first_byte = first_byte

    def begin(self) -> None:
        self.fp.peek(1)  # a buffered reader
        self._first_byte()
        super().begin()


def _reporting(connection: type[http.client.HTTPConnection], first_byte: Callable[[], None]) -> Callable[..., Any]:
    def connect(*args: Any, **kwargs: Any) -> http.client.HTTPConnection:
        made = connection(*args, **kwargs)
        made.response_class = functools.partial(_Response, first_byte=first_byte)  # type: ignore[assignment]
        return made

    return connect


class _HTTPHandler(urllib.request.HTTPHandler):
    def __init__(self, first_byte: Callable[[], None]) -> None:
        super().__init__()
        self.connect: Any = _reporting(http.client.HTTPConnection, first_byte)

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self.connect, req)


class _HTTPSHandler(urllib.request.HTTPSHandler):
    def __init__(self, first_byte: Callable[[], None]) -> None:
        super().__init__()
        self.connect: Any = _reporting(http.client.HTTPSConnection, first_byte)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self.connect, req)
