"""Requests in a process of their own, so that HTTP and JSON do not take Python's interpreter lock from a training step.

The process reads requests from its standard input, one JSON line each, and answers in any order: a JSON line, followed
by the bytes of the three arrays of `NamedTokens`. It ends with its input.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from array import array
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import redirect_stderr, suppress
from dataclasses import asdict
from typing import IO, Any

from kd_lightning.models.openai_client import OpenAIClient, RequestRefusedError, ServerError
from kd_lightning.models.scoring.dialects import NamedTokens
from kd_lightning.models.scoring.exchange import PromptRequest


class ClientProcess:
    """A process that sends requests; threads can share it. It ends with this object, or with the program.

    Args:
        client: has the settings.
    """

    def __init__(self, client: OpenAIClient) -> None:
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import main; main()"
        self._process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests: IO[bytes] = self._process.stdin
        self._lock = threading.Lock()
        self._number = 0
        self._answers = _Answers(f"server {client.url}: the process of its requests has ended; {client.advice}")
        self._stop = weakref.finalize(self, _stop, self._process)
        threading.Thread(target=self._answers.receive, args=(self._process.stdout,), daemon=True).start()
        self._write(
            {
                "url": client.url,
                "patience": client.patience,
                "timeout": client.timeout,
                "api_key_env": client.key.variable,
                "advice": client.advice,
            }
        )

    @property
    def outages(self) -> int:
        """How often a request has succeeded after it had failed."""
        return self._answers.outages

    def named_tokens(self, request: PromptRequest) -> NamedTokens:
        """The tokens that the server names.

        Raises:
            RequestRefusedError: the server has refused the request.
            ServerError: it does not answer, or with other tokens or another model than was asked for.
        """
        with self._lock:
            self._number += 1
            future = self._answers.expect(self._number)
            self._write({"number": self._number, "request": {**asdict(request), "names": [*request.names]}})
        return future.result()

    def close(self) -> None:
        """End the process: requests that wait fail."""
        self._stop()

    def _write(self, message: Mapping[str, Any]) -> None:
        with suppress(OSError, ValueError):  # the process has ended: `receive` says so to all who wait
            self._requests.write(json.dumps(message).encode() + b"\n")
            self._requests.flush()


class _Answers:
    """The answers that a process writes, by number of the request; it outlives no one who waits.

    Args:
        ended: what is raised for all of them when the process has ended.
    """

    def __init__(self, ended: str) -> None:
        self.outages = 0
        self._ended = ended
        self._pending: dict[int, Future[NamedTokens]] = {}
        self._lock = threading.Lock()
        self._open = True

    def expect(self, number: int) -> Future[NamedTokens]:
        """The answer to a request, or its error."""
        future: Future[NamedTokens] = Future()
        with self._lock:
            if self._open:
                self._pending[number] = future
            else:
                future.set_exception(ServerError(self._ended))
        return future

    def receive(self, stream: IO[bytes]) -> None:
        """Read answers until the process ends."""
        with stream, suppress(OSError, ValueError):
            while line := stream.readline():
                self._take(json.loads(line), stream)
        with self._lock:
            self._open = False
            for future in self._pending.values():
                future.set_exception(ServerError(self._ended))
            self._pending.clear()

    def _take(self, header: Mapping[str, Any], stream: IO[bytes]) -> None:
        if "printed" in header:
            sys.stderr.write(header["printed"])
            return
        self.outages = max(self.outages, header["outages"])
        with self._lock:
            future = self._pending.pop(header["number"])
        if "status" in header:
            future.set_exception(RequestRefusedError(header["error"], header["status"]))
        elif "error" in header:
            future.set_exception(ServerError(header["error"]))
        else:
            found = NamedTokens()
            ids, values, lengths = header["sizes"]
            found.ids.frombytes(stream.read(ids))
            found.values.frombytes(stream.read(values))
            found.lengths.frombytes(stream.read(lengths))
            future.set_result(found)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdin is not None:
        with suppress(OSError):  # what was not sent
            process.stdin.close()


# ------------------------------------------------------------------------------------------------------ in the process
class _Output(io.TextIOBase):
    """Writes frames; as a text stream, frames of what is printed."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__()
        self._stream = stream
        self._lock = threading.Lock()

    def send(self, header: Mapping[str, Any], *arrays: array[int] | array[float]) -> None:
        """One frame; if no one reads, the process ends."""
        try:
            with self._lock:
                self._stream.write(json.dumps(header).encode() + b"\n" + b"".join(map(bytes, arrays)))
                self._stream.flush()
        except OSError:
            os._exit(0)

    def write(self, text: str) -> int:
        """Have the other process print it."""
        self.send({"printed": text})
        return len(text)


def main() -> None:
    """Send requests until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group, and the other process decides
    output = _Output(sys.stdout.buffer)
    with redirect_stderr(output):
        client = OpenAIClient(**json.loads(sys.stdin.buffer.readline()))
        for line in sys.stdin.buffer:
            threading.Thread(target=_answer, args=(client, json.loads(line), output), daemon=True).start()
    os._exit(0)


def _answer(client: OpenAIClient, message: Mapping[str, Any], output: _Output) -> None:
    """Send one request and write its answer."""
    header: dict[str, Any] = {"number": message["number"]}
    try:
        found = PromptRequest(**message["request"]).named_tokens(client, _no_texts)
    except RequestRefusedError as error:
        output.send({**header, "outages": client.outages, "error": str(error), "status": error.status})
    except Exception as error:
        output.send({**header, "outages": client.outages, "error": str(error) or type(error).__name__})
    else:
        arrays = (found.ids, found.values, found.lengths)
        sizes = [values.itemsize * len(values) for values in arrays]
        output.send({**header, "outages": client.outages, "sizes": sizes}, *arrays)


def _no_texts(text: str) -> int:
    raise ValueError(f"token {text!r} has no id")
