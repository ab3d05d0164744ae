"""A server in this process that writes raw bytes, for answers that no healthy server gives."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

Write = Callable[[socket.socket, str], None]
"""Called with the connection and the first line and headers of the request."""


def answer(body: bytes, status: str = "200 OK", headers: str = "") -> bytes:
    """An answer as HTTP."""
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


@contextlib.contextmanager
def raw_server(write: Write) -> Iterator[str]:
    """The address of a server; each request is answered in a thread of its own, and then hung up on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ended = threading.Event()

        def serve(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                head = b""
                while b"\r\n\r\n" not in head:
                    head += connection.recv(65536) or b"\r\n\r\n"
                begin, _, body = head.partition(b"\r\n\r\n")
                length = int(begin.lower().partition(b"content-length: ")[2].split(b"\r\n")[0] or 0)
                while len(body) < length:  # closing a connection with unread bytes resets it
                    body += connection.recv(65536) or bytes(length)
                write(connection, begin.decode("latin-1"))

        def accept() -> None:
            with contextlib.suppress(OSError):
                while not ended.is_set():
                    threading.Thread(target=serve, args=(listening.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            ended.set()
            listening.shutdown(socket.SHUT_RDWR)
