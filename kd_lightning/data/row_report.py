"""Which rows can be trained on, and the report about the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NOTES = {
    "empty": "dropped without an answer",
    "cut_away": "dropped with no answer within max_length={max_length}",
    "truncated": "truncated to max_length={max_length}",
    "unlocated": "answers not found in the rendered chat template, without labels",
}
"""The message for each count of the report."""


def usable_rows(rows: Any, max_length: int) -> tuple[list[int], dict[str, int]]:
    """Indices of the rows that have a label within `max_length`, and the counts of the report.

    Args:
        rows: a `datasets.Dataset` with the columns of `TextTokenizer.tokenize`.
        max_length: longest sequence in tokens.
    """
    columns = {name: rows[name][:] for name in ("empty", "first_label", "full_length", "unlocated")}
    first, empty = columns["first_label"], columns["empty"]
    kept = [n for n in range(len(rows)) if not empty[n] and 0 <= first[n] < max_length]
    return kept, {
        "rows": len(rows),
        "kept": len(kept),
        "empty": sum(empty),
        "truncated": sum(columns["full_length"][n] > max_length for n in kept),
        "cut_away": sum(not e and f >= max_length for e, f in zip(empty, first, strict=True)),
        "unlocated": sum(columns["unlocated"]),
    }


def report_line(split: str, counts: dict[str, int], max_length: int) -> str:
    """The counts of a split in one line."""
    notes = [f", {counts[name]} {text.format(max_length=max_length)}" for name, text in NOTES.items() if counts[name]]
    return f"{split}: {counts['kept']} of {counts['rows']} rows" + "".join(notes)


def no_usable_rows(sources: Sequence[str], rows: Any, max_length: int) -> ValueError:
    """The error for a split without any row that can be trained on."""
    names, empty, first = ", ".join(sources), rows["empty"][:], rows["first_label"][:]
    if all(empty):
        return ValueError(f"{names}: every answer is empty: training needs at least one row with an answer")
    needed = min((f + 1 for e, f in zip(empty, first, strict=True) if not e and f >= 0), default=0)
    if needed > max_length:
        return ValueError(f"{names}: no answer begins within max_length={max_length}: it must be at least {needed}")
    return ValueError(
        f"{names}: no answer was found in the rendered chat template, so no token has a label: pass another "
        "chat_template"
    )
