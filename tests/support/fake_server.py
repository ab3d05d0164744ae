"""An OpenAI-compatible server in this process, with faults on demand."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, bytes]
Fault = Callable[[int, str, Any], Answer | None]


def chat(text: Any, reason: str = "stop") -> Answer:
    """An answer as such servers give it."""
    choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text}}
    body = {"choices": [choice], "usage": {"completion_tokens": 3}}
    return 200, json.dumps(body).encode()


def stable_port() -> int:
    """A free port that no outgoing connection is given, so that a server can return to it."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class _QuietServer(ThreadingHTTPServer):
    """Does not print that a client has gone: one whose process was ended leaves its connections open."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class FakeServer:
    """Echoes the last message.

    Args:
        fault: called with the number of the question, its path and its body; what it gives is answered; None: the echo.
        delay: seconds that an answer takes.
        port: 0: a free one.
    """

    def __init__(self, fault: Fault | None = None, delay: float = 0.0, port: int = 0) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most = self._now = 0
        self._lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(None)

            def do_POST(self) -> None:
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def answer(self, body: Any) -> None:
                with fake._lock:
                    number = len(fake.bodies)
                    if body is not None:
                        fake.bodies.append(body)
                        fake.headers.append(dict(self.headers))
                    fake._now += 1
                    fake.most = max(fake.most, fake._now)
                time.sleep(delay)
                found = fault(number, self.path, body) if fault is not None else None
                status, content = found or fake.plain(self.path, body)
                with fake._lock:
                    fake._now -= 1
                if status == 0:  # hangs up in the middle
                    self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
                    return
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = _QuietServer(("127.0.0.1", port), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})

    @staticmethod
    def plain(path: str, body: Any) -> Answer:
        """What a healthy server says."""
        if path == "/v1/models":
            return 200, json.dumps({"data": [{"id": "parrot"}]}).encode()
        if path == "/v1/completions":
            return 200, json.dumps({"choices": [{"text": f"on: {body['prompt']}", "finish_reason": "length"}]}).encode()
        return chat(f"{body['messages'][-1]['content']}!")

    def __enter__(self) -> FakeServer:
        self._thread.start()
        return self

    def __exit__(self, *args: Any) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()
