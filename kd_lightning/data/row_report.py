"""Which rows can be trained on, and the report about the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NOTES = {
    "empty": "dropped without an answer to train on",
    "cut_away": "dropped with no answer within max_length={max_length}",
    "truncated": "truncated to max_length={max_length}",
    "unlocated": "answers not found in the rendered chat template, without labels",
}
"""The message for each count of the report."""
EXTRA_NOTES = {
    "excluded": "assistant turns without labels, as the rows say (weight 0, train false, …)",
}
"""The same for counts that a report has only if they are not 0."""


def usable_rows(rows: Any, max_length: int) -> tuple[list[int], dict[str, int]]:
    """Indices of the rows that have a label within `max_length`, and the counts of the report.

    Args:
        rows: a `datasets.Dataset` with the columns of `TextTokenizer.tokenize`.
        max_length: longest sequence in tokens.
    """
    columns = {name: rows[name][:] for name in ("empty", "first_label", "full_length", "unlocated", *EXTRA_NOTES)}
    first, empty = columns["first_label"], columns["empty"]
    kept = [n for n in range(len(rows)) if not empty[n] and 0 <= first[n] < max_length]
    return kept, {
        "rows": len(rows),
        "kept": len(kept),
        "empty": sum(empty),
        "truncated": sum(columns["full_length"][n] > max_length for n in kept),
        "cut_away": sum(not e and f >= max_length for e, f in zip(empty, first, strict=True)),
        "unlocated": sum(columns["unlocated"]),
        **{name: total for name in EXTRA_NOTES if (total := sum(columns[name]))},
    }


def report_line(split: str, counts: dict[str, int], max_length: int) -> str:
    """The counts of a split in one line."""
    texts = {**NOTES, **EXTRA_NOTES}
    notes = [
        f", {counts[name]} {text.format(max_length=max_length)}" for name, text in texts.items() if counts.get(name)
    ]
    return f"{split}: {counts['kept']} of {counts['rows']} rows" + "".join(notes)


def no_usable_rows(sources: Sequence[str], rows: Any, max_length: int) -> ValueError:
    """The error for a split without any row that can be trained on."""
    names, empty, first = ", ".join(sources), rows["empty"][:], rows["first_label"][:]
    if all(empty):
        return ValueError(f"{names}: {_why_empty(rows)}: training needs at least one row with an answer")
    needed = min((f + 1 for e, f in zip(empty, first, strict=True) if not e and f >= 0), default=0)
    if needed > max_length:
        return ValueError(f"{names}: no answer begins within max_length={max_length}: it must be at least {needed}")
    return ValueError(
        f"{names}: no answer was found in the rendered chat template, so no token has a label: pass another "
        "chat_template"
    )


def _why_empty(rows: Any) -> str:
    if excluded := sum(rows["excluded"][:]):
        return f"every answer is empty or excluded by its row ({excluded} with weight 0, train false or the like)"
    return "every answer is empty"
