"""A file of responses that is written in the order of its rows and can be resumed after an interruption."""

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

RESERVED_FIELDS = ("model", "sampling", "finish_reason", "response")


@dataclass(frozen=True)
class Response:
    """A response of a model.

    Args:
        text: without the token that ends it.
        finish_reason: "eos": the model ended it; "stop": a stop string ended it; "length": it was cut off at
            `max_new_tokens`; "unknown": the server gives none. Servers may have others.
        tokens: number of tokens, the one that ends it included.
    """

    text: str
    finish_reason: str
    tokens: int

    @property
    def finished(self) -> bool:
        """Whether it is complete: the model, or a stop string, has ended it."""
        return self.finish_reason in ("eos", "stop")


class OtherResponsesError(ValueError):
    """The file was written with other settings, another model or other data."""


class ResponseFile:
    """JSON lines, one per row: all of its fields, then `model`, `sampling`, `finish_reason` and `response`.

    The beginning of a line is known before its response is. An existing line is recognized by it, and so is an
    incomplete last line after an interruption. A file with other lines is refused and left unchanged. Use it as a
    context manager; a lock keeps other processes out.

    Args:
        path: the file; an existing one is resumed.
        rows: fields of the rows.
        model: identifies the model: the same text for the same weights.
        sampling: settings of generation.
        start_over: start from scratch if an existing file has other lines, instead of an error. The old file is kept
            next to it as `….earlier-1.jsonl`.

    Attributes:
        done: number of rows in the file.
        responses: of these rows.

    Raises:
        ValueError: a row has a field with one of the four names; on entering, another process writes the file.
        OtherResponsesError: on entering, the file has other lines, and `start_over` is False.
    """

    def __init__(
        self,
        path: str | Path,
        rows: Sequence[Mapping[str, Any]],
        model: str,
        sampling: Mapping[str, Any],
        start_over: bool = False,
    ) -> None:
        self.path = Path(path)
        self.rows = rows
        self.model = model
        self.sampling = dict(sampling)
        self.start_over = start_over
        self.responses: list[Response] = []
        self._out_of_order: dict[int, Response] = {}
        self._file: BinaryIO
        for number, row in enumerate(rows, start=1):
            if taken := [name for name in RESERVED_FIELDS if name in row]:
                raise ValueError(
                    f"row {number} has a field {taken[0]!r}, which is reserved in files of responses: rename the field"
                )

    @property
    def done(self) -> int:
        """Number of rows in the file."""
        return len(self.responses)

    def __enter__(self) -> ResponseFile:
        check_output(self.path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("r+b" if self.path.exists() else "x+b")
        except OSError as error:
            raise ValueError(f"output {self.path} cannot be written to: {error.strerror}") from None
        try:
            _lock(self._file)
            self._read_existing()
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"{self.path} is being written by another process") from None
        except OtherResponsesError:
            if not self.start_over:
                self._file.close()
                raise
            self.responses.clear()
            self._file.seek(0)
            archive = first_unused_path(lambda n: self.path.with_name(f"{self.path.stem}.earlier-{n}.jsonl"))
            archive.write_bytes(self._file.read())
            self._file.seek(0)
            self._file.truncate()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, number: int, response: Response) -> None:
        """Add a response; it is written when the responses to all rows before it are there.

        Args:
            number: of the row, from 0; a row that is already in the file is skipped.
            response: to the row.
        """
        if number >= self.done:
            self._out_of_order[number] = response
        lines = []
        while (following := self._out_of_order.pop(self.done, None)) is not None:
            last = {"finish_reason": following.finish_reason, "response": following.text}
            lines.append(self._prefix(self.done) + _dump(last)[1:].encode() + b"\n")
            self.responses.append(following)
        if lines:
            try:
                self._file.write(b"".join(lines))
                self._file.flush()
            except OSError as error:  # the disk is full, for example; Python leaves the path out
                raise OSError(error.errno, error.strerror, str(self.path)) from error

    def _prefix(self, number: int) -> bytes:
        """The beginning of the line of a row."""
        return _dump({**self.rows[number], "model": self.model, "sampling": self.sampling})[:-1].encode() + b", "

    def _read_existing(self) -> None:
        """Read the existing lines and cut off an incomplete one."""
        complete = 0
        for number, line in enumerate(self._file):
            if number >= len(self.rows):
                raise self._error(f"it has more than the {len(self.rows)} rows of the data")
            prefix = self._prefix(number)
            if not line.endswith(b"\n"):
                if not (line.startswith(prefix) or prefix.startswith(line)):
                    raise self._error(self._mismatch(number, line))
                break
            if not line.startswith(prefix):
                raise self._error(self._mismatch(number, line))
            try:
                row = json.loads(line)
                self.responses.append(Response(row["response"], row["finish_reason"], 0))
            except (ValueError, KeyError):
                raise self._error(f"line {number + 1} is corrupt") from None
            complete += len(line)
        if self._file.seek(0, os.SEEK_END) > complete:
            self._file.truncate(complete)
        self._file.seek(complete)

    def _error(self, reason: str) -> OtherResponsesError:
        return OtherResponsesError(
            f"cannot resume {self.path}: {reason} (the file is unchanged: choose another output, or delete it)"
        )

    def _mismatch(self, number: int, line: bytes) -> str:
        """Why a line is not the expected one."""
        try:
            row = json.loads(line)
            was, sampling = row["model"], row["sampling"]
            for name in {**self.sampling, **sampling}:
                old, new = sampling.get(name), self.sampling.get(name)
                if old != new:
                    return f"line {number + 1} was written with {name} {old}, not {new}"
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"line {number + 1} is not a response to row {number + 1} of the data"
        if was != self.model:
            return f"line {number + 1} was written by another model ({was}, not {self.model})"
        return f"line {number + 1} belongs to another row than in the data"


def check_output(path: Path) -> None:
    """Check, before any response is generated, that a file can be written; changes nothing.

    Args:
        path: of the file; missing folders above it are allowed, as they are created later.

    Raises:
        ValueError: it is a folder, a link to nothing, or not writable; it names what must change.
    """
    if path.is_symlink() and not path.exists():
        raise ValueError(
            f"output {path} is a link to {os.readlink(path)}, which does not exist: delete the link, or choose another "
            "output"
        )
    if path.is_dir():
        raise ValueError(f"output {path} is a folder: pass the name of a file")
    folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not folder.is_dir():
        raise ValueError(f"output {path}: {folder} is not a folder: choose another output")
    try:
        if path.exists():
            path.open("r+b").close()
        else:
            probe = folder / f".writable.{os.getpid()}"
            probe.touch()
            probe.unlink()
    except OSError as error:
        raise ValueError(f"output {path} cannot be written to: {error.strerror}: choose another output") from None


def _lock(file: BinaryIO) -> None:
    """Keep other processes out; BlockingIOError if another one has the lock."""
    if importlib.util.find_spec("fcntl") is not None:  # not available on Windows
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _dump(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False, default=str)
