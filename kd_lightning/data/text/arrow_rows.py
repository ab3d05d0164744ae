"""Rows of Arrow tables as Python objects, with the row and the column of a value that cannot be read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from kd_lightning.data.text.json_text import check_depth

# pyarrow raises whatever the conversion of a value does: dates out of range, bytes that are not UTF-8, lost pages
ERRORS = (ValueError, OSError, OverflowError, LookupError, TypeError, MemoryError, ArithmeticError, RuntimeError)


class RowError(ValueError):
    """A row that cannot be read; the message names it."""


def arrow_errors() -> tuple[type[BaseException], ...]:
    """What reading a damaged file may raise."""
    import pyarrow as pa  # type: ignore[import-untyped]

    return (*ERRORS, pa.ArrowException)


def rows_of_batches(batches: Iterable[Any], source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of record batches, with their numbers from 1.

    Args:
        batches: `pyarrow.RecordBatch`es.
        source: name of the file, for error messages.

    Raises:
        RowError: a value cannot be read; the message has the row and the column.
    """
    count = 0
    for batch in batches:
        try:
            rows = batch.to_pylist()
        except arrow_errors():
            rows = _one_by_one(batch, source, count)
        for row in rows:
            count += 1
            try:
                check_depth(row)
            except ValueError as error:
                raise RowError(f"{source}: row {count}: {error}") from None
            yield count, row


def _one_by_one(batch: Any, source: str, count: int) -> Iterator[dict[str, Any]]:
    for n in range(batch.num_rows):
        row = {}
        for name in batch.schema.names:
            try:
                row[name] = batch.column(name)[n].as_py()
            except arrow_errors() as error:
                raise RowError(f"{source}: row {count + n + 1}: field {name!r} {reason(error)}") from None
        yield row


def reason(error: BaseException) -> str:
    """Why a value or a file cannot be read, in one line."""
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8: byte 0x{error.object[error.start]:02x} at byte {error.start + 1}"
    return f"cannot be read: {' '.join(str(error).split())[:200] or type(error).__name__}"
