"""A client of OpenAI-compatible servers: several requests under way, outages survived, errors in one line."""

from __future__ import annotations

import http.client
import json
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any
from urllib.parse import urlsplit

from kd_lightning.data.conversation import Conversation
from kd_lightning.generation.response_file import Response
from kd_lightning.seeding import derive_seed

FIRST_WAIT, LONGEST_WAIT = 0.5, 15.0
FIRST_PATIENCE = 10.0
"""Seconds for which a server that has not answered once is asked: an address may be misspelt."""
PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
"""States of HTTP that may be others when asked again."""
LARGEST = 1 << 26
TRIES = 3
"""So often a server may answer nonsense."""
REASONS = {"stop": "eos", "length": "length"}


class Server:
    """An OpenAI-compatible server, and how it is to write.

    `OPENAI_API_KEY` is sent where it is set.

    Args:
        url: its address, with or without `/v1`.
        model: the name it knows the model by; None: the only one there is.
        sampling: `max_new_tokens`, `temperature`, `top_p` and `seed`.
        patience: seconds for which it is asked again where it does not answer.
        timeout: seconds for which one answer is waited for.

    Raises:
        ValueError: the address is none, nobody answers there, or the model must be named.
    """

    def __init__(
        self, url: str, model: str | None, sampling: Mapping[str, Any], patience: float = 180.0, timeout: float = 600.0
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"server must be an address such as http://localhost:8000/v1, got {url!r}")
        self.url = url.rstrip("/") + ("" if parts.path.strip("/") else "/v1")
        self.sampling = dict(sampling)
        self.timeout = timeout
        self._stop = threading.Event()
        self._told = False
        self.patience = min(patience, FIRST_PATIENCE)
        found = self._models()
        self.patience = patience
        if model is None and len(found) != 1:
            names = ", ".join(found[:5]) or "none"
            raise ValueError(f"model must be the name of one that {self.url} serves ({names}), got None")
        self.model = model or found[0]

    def _models(self) -> list[str]:
        def read(answer: Any) -> list[str]:
            return [str(model["id"]) for model in answer["data"]]

        try:
            found: list[str] = self._ask("models", None, read, "the question for its models")
        except RefusedError as error:
            if error.status not in (404, 405, 501):  # some servers do not know the question
                raise
            found = []
        return found

    def respond(self, question: Conversation, number: int) -> Response:
        """The response to one prompt.

        Args:
            question: the prompt.
            number: of the row, which decides its samples and is named in errors.

        Raises:
            ValueError: the server refuses, is gone, or answers nonsense.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.sampling["max_new_tokens"],
            "temperature": self.sampling["temperature"],
            "top_p": self.sampling["top_p"],
            "seed": derive_seed(self.sampling["seed"], number) % 2**31,
        }
        if question.messages:
            path = "chat/completions"
            body["messages"] = question.messages
            extras = {"tools": question.tools, "chat_template_kwargs": question.template_kwargs}
            body |= {name: value for name, value in extras.items() if value}
        else:
            path, body["prompt"] = "completions", question.prompt
        found: Response = self._ask(path, body, _read, f"row {number + 1}")
        return found

    def answers(
        self, questions: Sequence[Conversation], start: int = 0, requests: int = 8
    ) -> Iterator[tuple[int, Response]]:
        """Responses with the numbers of their rows, as they come.

        Args:
            questions: all prompts.
            start: the first that is asked.
            requests: under way at the same time, at least 1.
        """
        todo = iter(range(start, len(questions)))
        under_way: dict[Future[Response], int] = {}
        pool = ThreadPoolExecutor(requests)
        try:
            while True:
                for number in todo:
                    under_way[pool.submit(self.respond, questions[number], number)] = number
                    if len(under_way) >= 2 * requests:
                        break
                if not under_way:
                    return
                ready, _ = wait(under_way, return_when=FIRST_COMPLETED)
                failed = None
                for future in ready:
                    number = under_way.pop(future)
                    if future.exception() is None:
                        yield number, future.result()
                    else:
                        failed = future
                if failed is not None:
                    failed.result()
        finally:
            self._stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------------------------------------------- helpers
    def _ask(self, path: str, body: Any, read: Any, what: str) -> Any:
        """One question, asked again while there is hope; `read` takes what is wanted out of the answer."""
        failing, pause, nonsense = None, FIRST_WAIT, 0
        while True:
            pause_asked = 0.0
            try:
                content = self._send(path, body)
            except urllib.error.HTTPError as error:
                reason = _reason(error)
                if error.code not in PASSING:
                    raise RefusedError(f"server {self.url} refuses {what}: {reason}", error.code) from None
                pause_asked = _retry_after(error)
            except (OSError, http.client.HTTPException) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            else:
                try:
                    return read(json.loads(content))
                except (ValueError, KeyError, TypeError, IndexError, AttributeError):
                    nonsense += 1
                    reason = f"nonsense: {_short(content)}"
                    if nonsense == TRIES:
                        raise ValueError(f"server {self.url} answers {what} with {reason}") from None
            now = time.monotonic()
            failing = now if failing is None else failing
            if now - failing >= self.patience:
                raise ValueError(
                    f"server {self.url} is gone: no answer to {what} for {now - failing:.0f} s ({reason}); "
                    "what was answered is written, and the same command goes on"
                )
            self._tell(reason)
            left = max(self.patience - (now - failing), 0.01)
            if self._stop.wait(min(max(pause, pause_asked), left)):
                raise ValueError(f"server {self.url}: {what} was given up")
            pause = min(2 * pause, LONGEST_WAIT)

    def _send(self, path: str, body: Any) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, {"Content-Type": "application/json"})
        if key := os.environ.get("OPENAI_API_KEY"):
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        with urllib.request.urlopen(request, timeout=self.timeout) as answer:
            content: bytes = answer.read(LARGEST)
        return content

    def _tell(self, reason: str) -> None:
        """Say once that there is trouble."""
        if not self._told:
            self._told = True
            print(f"server {self.url}: {reason}; asked again for up to {self.patience:.0f} s", file=sys.stderr)


class RefusedError(ValueError):
    """The server understands and says no.

    Args:
        text: of the error.
        status: of HTTP.
    """

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


def _read(answer: Any) -> Response:
    """What an answer says; KeyError, TypeError, IndexError where it is none."""
    (choice, *_) = answer["choices"]
    text = choice["message"].get("content") if "message" in choice else choice["text"]
    if text is not None and not isinstance(text, str):
        raise TypeError
    reason = str(choice["finish_reason"])
    tokens = (answer.get("usage") or {}).get("completion_tokens") or 0
    whole = (text or "").encode("utf-8", "replace").decode()  # JSON can hold half a character, a file cannot
    return Response(whole, REASONS.get(reason, reason), int(tokens))


def _reason(error: urllib.error.HTTPError) -> str:
    """The state of HTTP and what the server says of it."""
    try:
        content = error.read(LARGEST)
    except (OSError, http.client.HTTPException):
        content = b""
    return f"HTTP {error.code} {_short(content) if content else error.reason}"


def _short(content: bytes) -> str:
    text = " ".join(content.decode("utf-8", "replace").split())
    return text if len(text) <= 200 else text[:199] + "…"


def _retry_after(error: urllib.error.HTTPError) -> float:
    """Seconds that the server asks to wait for."""
    try:
        return max(0.0, min(float(error.headers.get("Retry-After", 0)), 60.0))
    except ValueError:
        return 0.0
