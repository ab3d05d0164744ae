"""Rows of CSV files: the first line names the fields."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kd_lightning.data.files.text_files import decode_line

DELIMITERS = {".csv": ",", ".tsv": "\t"}
"""What separates the cells of a line, by suffix."""
LONGEST_CELL = 2**31 - 1  # characters; the limit of the module `csv`, 131,072 unless set, is too low for documents


def read_csv(source: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows as (location, row); a location is the file and the line on which the row begins.

    Cells in double quotes may have separators and line breaks, and `""` stands for a quote. An empty cell is a missing
    field. Blank lines are skipped.

    Args:
        source: name of the file, for messages.
        path: of the file; its suffix is one of `DELIMITERS`.

    Raises:
        ValueError: the file is not UTF-8, a quote does not end, or a line has another number of cells than the first.
    """
    csv.field_size_limit(LONGEST_CELL)
    delimiter = DELIMITERS[path.suffix]
    with path.open("rb") as file:
        lines = (decode_line(line, f"{source}:{number}") for number, line in enumerate(file, start=1))
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        names: list[str] = []
        while True:
            location = f"{source}:{reader.line_num + 1}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise ValueError(f"{location}: broken CSV: {error}") from None
            if cells is None:
                return
            if not any(cell.strip() for cell in cells) and len(cells) < 2:
                continue
            if not names:
                names = _field_names(cells, delimiter, location)
                continue
            if len(cells) != len(names):
                raise ValueError(
                    f"{location}: a row must have {len(names)} cells, one for each name in the first line, got "
                    f"{len(cells)}: put cells with separators, quotes or line breaks in double quotes"
                )
            yield location, {name: cell or None for name, cell in zip(names, cells, strict=True)}


def _field_names(cells: list[str], delimiter: str, location: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len(names) == 1 and delimiter == "," and (";" in names[0] or "\t" in names[0]):
        raise ValueError(
            f"{location}: the cells of a .csv file must be separated by commas, and those of a .tsv file by tabs, got "
            f"{names[0]!r} as the names of the fields"
        )
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(
            f"{location}: the first line must name each field once, got {', '.join(repr(name) for name in names)}"
        )
    return names
