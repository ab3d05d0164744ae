"""A client of OpenAI-compatible servers: sends one request, retries while the server fails, and reports its errors."""

from __future__ import annotations

import http.client
import json
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")

FIRST_WAIT, LONGEST_WAIT = 0.5, 15.0
"""Seconds between two attempts: the first pause, which doubles each time, and its limit."""
FIRST_PATIENCE = 10.0
"""Seconds of retries until the first answer of a server: its address may be misspelled."""
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
"""HTTP status codes of errors that can pass."""
MAX_BYTES = 1 << 26
MAX_INVALID = 3
"""Invalid answers to one request before it fails."""


class RequestRefusedError(ValueError):
    """The server has refused a request, and would refuse it again.

    Args:
        message: of the error.
        status: HTTP status code.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _TransientError(Exception):
    """A failure that can pass, and the seconds that the server asks to wait."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class OpenAIClient:
    """HTTP client of an OpenAI-compatible server. Threads can share it.

    The environment variable `OPENAI_API_KEY`, if set, is sent as the key.

    Args:
        url: address of the server, with or without `/v1`.
        patience: seconds of retries while the server does not answer.
        timeout: seconds to wait for one answer.

    Raises:
        ValueError: `url` is not an address.
    """

    def __init__(self, url: str, patience: float = 180.0, timeout: float = 600.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"server must be an address such as http://localhost:8000/v1, got {url!r}")
        self.url = url.rstrip("/") + ("" if parts.path.strip("/") else "/v1")
        self.patience = patience
        self.timeout = timeout
        self._closed = threading.Event()
        self._warned = False

    def models(self) -> list[str]:
        """Names of the models that are served; empty if the server does not list them.

        Raises:
            ValueError: the server refuses or does not answer.
        """

        def parse(answer: Any) -> list[str]:
            return [str(model["id"]) for model in answer["data"]]

        try:
            return self.request("models", None, parse, "the list of models", min(self.patience, FIRST_PATIENCE))
        except RequestRefusedError as error:
            if error.status not in (404, 405, 501):  # not implemented by some servers
                raise
            return []

    def max_length(self, model: str) -> int | None:
        """The longest sequence that a served model reads, in tokens (`max_model_len`); None: the server does not say.

        Raises:
            ValueError: the server refuses or does not answer.
        """

        def parse(answer: Any) -> int | None:
            return next((entry.get("max_model_len") for entry in answer["data"] if entry["id"] == model), None)

        try:
            return self.request("models", None, parse, "the list of models", min(self.patience, FIRST_PATIENCE))
        except RequestRefusedError as error:
            if error.status not in (404, 405, 501):  # not implemented by some servers
                raise
            return None

    def select_model(self, name: str | None) -> str:
        """The name of a served model; None: the only one that is served.

        Raises:
            ValueError: the server refuses or does not answer, or `name` is None and there is not exactly one model.
        """
        found = self.models()
        if name is None and len(found) != 1:
            names = ", ".join(found[:5]) or "none"
            raise ValueError(f"model must be the name of one that {self.url} serves ({names}), got None")
        return name or found[0]

    def request(
        self,
        path: str,
        body: Mapping[str, Any] | None,
        parse: Callable[[Any], T],
        what: str,
        patience: float | None = None,
    ) -> T:
        """Send one request, and again while it fails in a way that can pass.

        Args:
            path: below `/v1`, such as `completions`.
            body: sent as JSON; None: a GET request.
            parse: takes the result from the decoded answer; KeyError, TypeError, IndexError, AttributeError or
                ValueError: the answer is invalid.
            what: the request in error messages, such as `row 3`.
            patience: seconds of retries; None: those of the client.

        Raises:
            RequestRefusedError: the server has refused the request.
            ValueError: the server does not answer, or not with a valid answer; the client is closed.
        """
        patience = self.patience if patience is None else patience
        failing_since, pause, invalid = None, FIRST_WAIT, 0
        while True:
            retry_after = 0.0
            try:
                content = self._attempt(path, body, what)
            except _TransientError as error:
                reason, retry_after = str(error), error.retry_after
            else:
                try:
                    return parse(json.loads(content))
                except (ValueError, KeyError, TypeError, IndexError, AttributeError):
                    invalid += 1
                    reason = f"invalid answer: {_shorten(content)}"
                    if invalid == MAX_INVALID:
                        raise ValueError(f"server {self.url}, {what}: {reason}") from None
            now = time.monotonic()
            failing_since = now if failing_since is None else failing_since
            left = patience - (now - failing_since)
            if left <= 0:
                raise ValueError(
                    f"server {self.url} does not answer: {what} failed for {now - failing_since:.0f} s ({reason}); "
                    "finished responses are saved: run the same command again to resume"
                )
            self._warn(reason, patience)
            if self._closed.wait(min(max(pause, retry_after), max(left, 0.01))):
                raise ValueError(f"server {self.url}: {what} was canceled")
            pause = min(2 * pause, LONGEST_WAIT)

    def close(self) -> None:
        """Cancel the retries of other threads. The client must not be used afterwards."""
        self._closed.set()

    def _attempt(self, path: str, body: Mapping[str, Any] | None, what: str) -> bytes:
        """Send a request once; `_TransientError` if it fails in a way that can pass."""
        try:
            return self._send(path, body)
        except urllib.error.HTTPError as error:
            reason = _http_reason(error)
            if error.code not in RETRIED:
                raise RequestRefusedError(f"server {self.url} refused {what}: {reason}", error.code) from None
            raise _TransientError(reason, _retry_after(error)) from None
        except urllib.error.URLError as error:
            raise _TransientError(str(error.reason) or type(error).__name__) from None
        except (OSError, http.client.HTTPException) as error:
            raise _TransientError(str(error) or type(error).__name__) from None

    def _send(self, path: str, body: Mapping[str, Any] | None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, {"Content-Type": "application/json"})
        if key := os.environ.get("OPENAI_API_KEY"):
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        with urllib.request.urlopen(request, timeout=self.timeout) as answer:
            content: bytes = answer.read(MAX_BYTES)
        return content

    def _warn(self, reason: str, patience: float) -> None:
        """Print the first failure."""
        if not self._warned:
            self._warned = True
            print(f"server {self.url}: {reason}; retrying for up to {patience:.0f} s", file=sys.stderr)


def _http_reason(error: urllib.error.HTTPError) -> str:
    """Status code and text of an HTTP error."""
    try:
        content = error.read(MAX_BYTES)
    except (OSError, http.client.HTTPException):
        content = b""
    return f"HTTP {error.code} {_shorten(content) if content else error.reason}"


def _shorten(content: bytes) -> str:
    text = " ".join(content.decode("utf-8", "replace").split())
    return text if len(text) <= 200 else text[:199] + "…"


def _retry_after(error: urllib.error.HTTPError) -> float:
    """Seconds that the server asks to wait, at most 60."""
    try:
        return max(0.0, min(float(error.headers.get("Retry-After", 0)), 60.0))
    except ValueError:
        return 0.0
