"""A column of batches that numbers the values of a field of the rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SHOWN = 3  # rows whose file and line are in a message


@dataclass(frozen=True)
class IndexColumn:
    """The index of each row's field among known values.

    Args:
        name: of the column in a batch.
        field: of the rows; a text.
        values: the known texts.
        default: the value of rows without the field, or with another value; None: such rows are refused.
    """

    name: str
    field: str
    values: Sequence[str]
    default: str | None = None

    def indices(self, fields: Mapping[int, Any], locate: Callable[[list[int]], list[str]]) -> dict[int, int]:
        """The index of every row.

        Args:
            fields: the field of every row by `row_ids`; None: the row does not have it.
            locate: file and line of rows.

        Raises:
            ValueError: a row has no field or another value, and there is no default; the message has file and line.
        """
        known = {value: number for number, value in enumerate(self.values)}
        wrong = [row for row, value in fields.items() if not isinstance(value, str) or value not in known]
        if self.default is None and wrong:
            value = fields[wrong[0]]
            given = "it is missing" if value is None else f"got {json.dumps(value, ensure_ascii=False)}"
            rows = locate(wrong[:SHOWN])
            more = f" ({len(wrong)} rows: {', '.join(rows)}{', …' if len(wrong) > SHOWN else ''})"
            raise ValueError(
                f"{rows[0]}: field {self.field!r} must be one of {', '.join(self.values)}, {given}"
                f"{more if len(wrong) > 1 else ''}"
            )
        other = 0 if self.default is None else known[self.default]
        return {row: known.get(value, other) if isinstance(value, str) else other for row, value in fields.items()}
