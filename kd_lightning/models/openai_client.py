"""A client of OpenAI-compatible servers: sends one request, retries while the server fails, and reports its errors."""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

from kd_lightning.models.api_key import DEFAULT_VARIABLE, ApiKey
from kd_lightning.models.http_exchange import AnswerTooLargeError, HTTPExchange, SlowAnswerError, StatusError
from kd_lightning.reporting.redaction import print_message, redact_text

T = TypeVar("T")

FIRST_WAIT, LONGEST_WAIT = 0.5, 15.0
"""Seconds between two attempts: the first pause, which doubles each time, and its limit."""
FIRST_PATIENCE = 10.0
"""Seconds of retries until the first answer of a server: its address may be misspelled."""
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
"""HTTP status codes of errors that can pass."""
QUICK_SECONDS = 60.0
"""Seconds for an answer to a request that generates nothing, such as the list of models; less if `timeout` is."""
LEAST_SECONDS = 10.0
"""Seconds, at least, for an answer to arrive in full after its first byte; more if `patience` is."""
MAX_INVALID = 3
"""Invalid answers to one request before it fails."""


class ServerError(ValueError):
    """A server refuses, does not answer, or not with what it was asked for."""


class RequestRefusedError(ServerError):
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


class _SlowError(_TransientError):
    """An answer has not arrived in full in time: the failure began with the request."""


class OpenAIClient:
    """HTTP client of an OpenAI-compatible server. Threads can share it.

    Args:
        url: address of the server, with or without `/v1`.
        patience: seconds of retries while the server does not answer.
        timeout: seconds for one answer, from the connection to its last byte.
        api_key_env: name of the environment variable that holds the key; `OPENAI_API_KEY` may be unset.
        advice: what to do when the server does not answer, the end of that error's message.

    Attributes:
        outages: how often a request has succeeded after it had failed.

    Raises:
        ValueError: `url` is not an address, or holds a password or a key; the variable of the key is not set, or its
            value cannot be sent.
    """

    def __init__(
        self,
        url: str,
        patience: float = 180.0,
        timeout: float = 600.0,
        api_key_env: str = DEFAULT_VARIABLE,
        advice: str = "finished responses are saved: run the same command again to resume",
    ) -> None:
        parts = _split(url)
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError(
                f"server must be an address without a password and without ?arguments, got one at {parts.hostname!r}: "
                f"remove them, and set the environment variable {DEFAULT_VARIABLE} to the key"
            )
        self.key = ApiKey(api_key_env)
        self.url = url.rstrip("/") + ("" if parts.path.strip("/") else "/v1")
        self.patience = patience
        self.timeout = timeout
        self.advice = advice
        self.outages = 0
        self._closed = threading.Event()
        self._parsing = threading.Lock()  # parsing is Python: threads that take turns within it only cost time
        self._warned = False

    def models(self) -> list[str]:
        """Names of the models that are served; empty if the server does not list them.

        Raises:
            ValueError: the server refuses or does not answer.
        """
        return self._listed(lambda answer: [valid_string(model["id"]) for model in answer["data"]], [])

    def max_length(self, model: str) -> int | None:
        """The longest sequence that a served model reads, in tokens (`max_model_len`); None: the server does not say.

        Raises:
            ValueError: the server refuses or does not answer.
        """

        def parse(answer: Any) -> int | None:
            return next((entry.get("max_model_len") for entry in answer["data"] if entry["id"] == model), None)

        return self._listed(parse, None)

    def aliases(self, model: str) -> frozenset[str]:
        """All names of a served model: those with the same weights (`root`).

        Raises:
            ValueError: the server refuses or does not answer.
        """

        def parse(answer: Any) -> frozenset[str]:
            roots = {valid_string(entry["id"]): entry.get("root") for entry in answer["data"]}
            root = roots.get(model)
            return frozenset({model, *(name for name, other in roots.items() if root and other == root)})

        return self._listed(parse, frozenset({model}))

    def _listed(self, parse: Callable[[Any], T], otherwise: T) -> T:
        """What is taken from the list of models; `otherwise` if the server has no such list."""
        try:
            return self.request("models", None, parse, "the list of models", min(self.patience, FIRST_PATIENCE))
        except RequestRefusedError as error:
            if error.status not in (404, 405, 501):  # not implemented by some servers
                raise
            return otherwise

    def select_model(self, name: str | None) -> str:
        """The name of a served model; None: the only one that is served, apart from adapters of it.

        Raises:
            ValueError: the server refuses or does not answer, or `name` is None and there is not exactly one model.
        """

        def parse(answer: Any) -> list[str]:
            return [valid_string(entry["id"]) for entry in answer["data"] if not entry.get("parent")]

        none: list[str] = []
        found = self._listed(parse, none)
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
        text: bool = False,
    ) -> T:
        """Send one request, and again while it fails in a way that can pass.

        Args:
            path: below `/v1`, such as `completions`; with a leading slash: below the server's root.
            body: sent as JSON; None: a GET request.
            parse: takes the result from the decoded answer; KeyError, TypeError, IndexError, AttributeError,
                ArithmeticError or ValueError: the answer is invalid.
            what: the request in error messages, such as `row 3`.
            patience: seconds of retries; None: those of the client.
            text: the answer is any text, which `parse` takes instead of decoded JSON.

        Raises:
            RequestRefusedError: the server has refused the request.
            ServerError: the server does not answer, or not with a valid answer; the client is closed.
        """
        patience = self.patience if patience is None else patience
        failing_since, pause, invalid = None, FIRST_WAIT, 0
        while True:
            retry_after, started = 0.0, time.monotonic()
            try:
                content = self._attempt(path, body, what, max(patience, LEAST_SECONDS))
            except _TransientError as error:
                reason, retry_after = str(error), error.retry_after
                if failing_since is None and isinstance(error, _SlowError):
                    failing_since = started
            else:
                try:
                    with self._parsing:
                        found = parse(content.decode("utf-8", "replace") if text else _decoded(content))
                    self.outages += failing_since is not None
                    return found
                except (ValueError, KeyError, TypeError, IndexError, AttributeError, ArithmeticError, RecursionError):
                    invalid += 1
                    reason = f"invalid answer: {self.key.shortened(content)}"
                    if invalid == MAX_INVALID:
                        raise ServerError(f"server {self.url}, {what}: {reason}") from None
            now = time.monotonic()
            failing_since = now if failing_since is None else failing_since
            left = patience - (now - failing_since)
            if left <= 0:
                raise ServerError(
                    f"server {self.url} does not answer: {what} failed for {now - failing_since:.0f} s ({reason}); "
                    f"{self.advice}"
                )
            self._warn(reason, patience)
            if self._closed.wait(min(max(pause, retry_after), max(left, 0.01))):
                raise ServerError(f"server {self.url}: {what} was canceled")
            pause = min(2 * pause, LONGEST_WAIT)

    def close(self) -> None:
        """Cancel the retries of other threads. The client must not be used afterwards."""
        self._closed.set()

    def _attempt(self, path: str, body: Mapping[str, Any] | None, what: str, seconds: float) -> bytes:
        """Send a request once; `_TransientError` if it fails in a way that can pass.

        Args:
            path: below `/v1`, or below the root.
            body: sent as JSON.
            what: the request in error messages.
            seconds: for the answer to arrive in full after its first byte.
        """
        try:
            timeout = min(self.timeout, QUICK_SECONDS) if body is None else self.timeout
            content = HTTPExchange(self._request(path, body), timeout, seconds).content(self._closed)
        except StatusError as error:
            reason = self._status_reason(error)
            if error.code not in RETRIED:
                raise RequestRefusedError(f"server {self.url} refused {what}: {reason}", error.code) from None
            raise _TransientError(reason, error.retry_after) from None
        except SlowAnswerError as error:
            raise _SlowError(str(error)) from None
        except AnswerTooLargeError as error:
            raise ServerError(f"server {self.url}, {what}: {error}") from None
        except urllib.error.URLError as error:
            raise _TransientError(self.key.one_line(str(error.reason)) or type(error).__name__) from None
        except (OSError, http.client.HTTPException) as error:
            raise _TransientError(self.key.one_line(str(error)) or type(error).__name__) from None
        if content is None:
            raise ServerError(f"server {self.url}: {what} was canceled")
        return self.key.mask(content)

    def _request(self, path: str, body: Mapping[str, Any] | None) -> urllib.request.Request:
        data = None if body is None else json.dumps(body).encode()
        base = f"{self.url.removesuffix('/v1')}{path}" if path.startswith("/") else f"{self.url}/{path}"
        request = urllib.request.Request(base, data, {"Content-Type": "application/json"})
        if key := self.key.read():
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        return request

    def _status_reason(self, error: StatusError) -> str:
        """Status code and text of an HTTP error, or where it redirects to."""
        if error.location is not None:
            text = f"it redirects to {error.location}, which would lose the request: pass the address of that server"
            return f"HTTP {error.code}: {self.key.one_line(text)}"
        text = self.key.shortened(error.content) if error.content else self.key.one_line(error.reason)
        hint = f" (the key is read from the environment variable {self.key.variable})" if error.code == 401 else ""
        return f"HTTP {error.code} {text}{hint}"

    def _warn(self, reason: str, patience: float) -> None:
        """Print the first failure."""
        if not self._warned:
            self._warned = True
            text = f"server {self.url}: {reason}; retrying for up to {patience:.0f} s"
            print_message(text, sys.stderr)


def valid_string(value: object) -> str:
    """A text in an answer, as a file can hold it; TypeError for any other value."""
    if not isinstance(value, str):
        raise TypeError
    return value.encode("utf-8", "replace").decode()  # JSON can hold half a surrogate pair


def _split(url: str) -> SplitResult:
    """The parts of a server's address.

    Raises:
        ValueError: it is not one.
    """
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port):
            return parts
    except ValueError:  # such as a port that is no number
        pass
    shown = redact_text(url if "://" in url else f"://{url}").removeprefix("://")
    raise ValueError(f"server must be an address such as http://localhost:8000/v1, got {shown!r}")


def _decoded(content: bytes) -> Any:
    """The decoded JSON of an answer; ValueError or RecursionError if it is none."""
    return json.loads(content, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
