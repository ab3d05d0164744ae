"""A file of responses that grows in the order of its rows, and that is gone on with after a kill."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from kd_lightning.atomic_io import first_unused_path

OURS = ("model", "sampling", "finish_reason", "response")


@dataclass(frozen=True)
class Response:
    """What a model said.

    Args:
        text: its words.
        finish_reason: "eos": it ended them itself; "length": it was cut at `max_new_tokens`; a server may say more.
        tokens: how many there were, the end among them.
    """

    text: str
    finish_reason: str
    tokens: int


class OtherResponsesError(ValueError):
    """The file holds something else than what would be written into it."""


class ResponseFile:
    """Lines of JSON, one a row: all of its fields, then `model`, `sampling`, `finish_reason` and `response`.

    A line begins with what is known before the response is: that is how each line that is there already is recognised,
    and the half of one that a kill may leave. Anything else in the file is refused and left as it is. Used as a context
    manager; a lock keeps a second process out.

    Args:
        path: the file; one that is there is gone on with.
        rows: fields of the rows.
        model: what wrote the responses: the same text for the same weights.
        sampling: how they were written.
        anew: begin anew where the file holds anything else, in place of refusing it; what it holds goes to a file
            beside it, `….earlier-1.jsonl`.

    Attributes:
        done: rows that are in the file.
        responses: of these.

    Raises:
        ValueError: a row has a field of one of the four names.
        OtherResponsesError: on entering, the file holds anything else, and it is not begun `anew`.
    """

    def __init__(
        self,
        path: str | Path,
        rows: Sequence[Mapping[str, Any]],
        model: str,
        sampling: Mapping[str, Any],
        anew: bool = False,
    ) -> None:
        self.path = Path(path)
        self.rows = rows
        self.model = model
        self.sampling = dict(sampling)
        self.anew = anew
        self.responses: list[Response] = []
        self._waiting: dict[int, Response] = {}
        self._file: BinaryIO
        for number, row in enumerate(rows, start=1):
            if taken := [name for name in OURS if name in row]:
                raise ValueError(f"row {number} has a field {taken[0]!r} already, which would be lost: rename it")

    @property
    def done(self) -> int:
        """Rows that are in the file."""
        return len(self.responses)

    def __enter__(self) -> ResponseFile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("r+b" if self.path.exists() else "x+b")
        try:
            _lock(self._file)
            self._recognise()
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"{self.path} is being written by another process") from None
        except OtherResponsesError:
            if not self.anew:
                self._file.close()
                raise
            self.responses.clear()
            self._file.seek(0)
            beside = first_unused_path(lambda n: self.path.with_name(f"{self.path.stem}.earlier-{n}.jsonl"))
            beside.write_bytes(self._file.read())
            self._file.seek(0)
            self._file.truncate()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, number: int, response: Response) -> None:
        """Take the response to a row, and write it as soon as those to all rows before it are there.

        Args:
            number: of the row, from 0 on; one that is in the file already stays as it is.
            response: to it.
        """
        if number >= self.done:
            self._waiting[number] = response
        lines = []
        while (following := self._waiting.pop(self.done, None)) is not None:
            last = {"finish_reason": following.finish_reason, "response": following.text}
            lines.append(self._head(self.done) + _dump(last)[1:].encode() + b"\n")
            self.responses.append(following)
        if lines:
            self._file.write(b"".join(lines))
            self._file.flush()

    # ------------------------------------------------------------------------------------------------------- helpers
    def _head(self, number: int) -> bytes:
        """How the line of a row begins."""
        return _dump({**self.rows[number], "model": self.model, "sampling": self.sampling})[:-1].encode() + b", "

    def _recognise(self) -> None:
        """Read the lines that are there and cut off half a line."""
        whole = 0
        for number, line in enumerate(self._file):
            if number >= len(self.rows):
                raise self._refusal(f"it has more than the {len(self.rows)} rows of the data")
            head = self._head(number)
            if not line.endswith(b"\n"):
                if not (line.startswith(head) or head.startswith(line)):
                    raise self._refusal(self._difference(number, line))
                break
            if not line.startswith(head):
                raise self._refusal(self._difference(number, line))
            try:
                row = json.loads(line)
                self.responses.append(Response(row["response"], row["finish_reason"], 0))
            except (ValueError, KeyError):
                raise self._refusal(f"line {number + 1} is broken") from None
            whole += len(line)
        if self._file.seek(0, os.SEEK_END) > whole:
            self._file.truncate(whole)
        self._file.seek(whole)

    def _refusal(self, reason: str) -> OtherResponsesError:
        return OtherResponsesError(f"{self.path} cannot be gone on with: {reason}; it was left as it is")

    def _difference(self, number: int, line: bytes) -> str:
        """What another line than expected was written with."""
        try:
            row = json.loads(line)
            was, sampling = row["model"], row["sampling"]
            for name, value in self.sampling.items():
                if sampling.get(name) != value:
                    return f"line {number + 1} was written with {name} {sampling.get(name)}, not {value}"
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"line {number + 1} is not a response to row {number + 1} of the data"
        if was != self.model:
            return f"line {number + 1} was written by another model ({was}, not {self.model})"
        return f"line {number + 1} holds another row than the data"


def _lock(file: BinaryIO) -> None:
    """Keep other processes out; BlockingIOError where one is in."""
    if importlib.util.find_spec("fcntl") is not None:  # not on every system
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _dump(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False, default=str)
