"""Which rows can be trained on, and the report about the others."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
    "left_out": "answers with words or tool calls that the chat template leaves out",
    "teacher_cut": "shortened or dropped, as the teacher's input is longer than max_length",
    "teacher_difference": "dropped with an answer that the teacher's chat template writes otherwise",
    "spelled_otherwise": "with answers that the two tokenizers spell differently, without pairs of tokens there",
    "no_pairs": "without any label at which both models have read the same bytes",
    "labels": "labels",
    "aligned_labels": "of them where both models have read the same bytes",
    "documents": "documents cut into rows",
    "control_tokens": "control tokens inside rows, encoded as words (allow_special_tokens=true makes them tokens)",
}
"""The same for counts that a report has only if they are not 0."""
PLAIN_COUNTS = ("labels", "aligned_labels", "documents")
"""Those of them that are no problem of the rows."""
SHOWN = 3  # rows whose file and line are in a message
UNREAD = "unread "
"""Begins the name of a count of turns with a field (or of rows with `tools`) that the chat template does not read."""


def extra_counts(rows: Any) -> dict[str, int]:
    """The counts of `EXTRA_NOTES`, and of the fields that the template does not read, if they are not 0.

    Args:
        rows: a `datasets.Dataset` with the columns of `TextTokenizer.tokenize`.
    """
    known = [name for name in EXTRA_NOTES if name in rows.column_names]
    sums = {name: sum(x if isinstance(x, int) else bool(x) for x in rows[name][:]) for name in known}
    unread = Counter(name for names in rows["unread"][:] for name in names)
    return {name: count for name, count in sums.items() if count} | {
        f"{UNREAD}{name}": count for name, count in unread.most_common()
    }


def extra_notes(counts: dict[str, int]) -> list[str]:
    """Those counts in words."""
    found = [f"{count} {EXTRA_NOTES[name]}" for name, count in counts.items() if name in EXTRA_NOTES]
    unread = {name.removeprefix(UNREAD): count for name, count in counts.items() if name.startswith(UNREAD)}
    fields = ", ".join(f"{name!r} ({count})" for name, count in unread.items())
    return [*found, f"fields that the chat template does not read: {fields}"] if unread else found


def usable_rows(rows: Any, max_length: int) -> tuple[list[int], dict[str, int]]:
    """Indices of the rows that have a label within `max_length`, and the counts of the report.

    Args:
        rows: a `datasets.Dataset` with the columns of `TextTokenizer.tokenize`.
        max_length: longest sequence in tokens.
    """
    columns = {name: rows[name][:] for name in ("empty", "first_label", "full_length", "unlocated")}
    first, empty = columns["first_label"], columns["empty"]
    differs = differences_of(rows)
    kept = [n for n in range(len(rows)) if not empty[n] and 0 <= first[n] < max_length and not differs[n]]
    return kept, {
        "rows": len(rows),
        "kept": len(kept),
        "empty": sum(empty),
        "truncated": sum(columns["full_length"][n] > max_length for n in kept),
        "cut_away": sum(not e and f >= max_length for e, f in zip(empty, first, strict=True)),
        "unlocated": sum(columns["unlocated"]),
        **extra_counts(rows),
    }


def differences_of(rows: Any) -> list[str]:
    """How the teacher's template writes the answer of each row otherwise; "": it does not."""
    name = "teacher_difference"
    return rows[name][:] if name in rows.column_names else [""] * len(rows)


def report_line(split: str, counts: dict[str, int], max_length: int) -> str:
    """The counts of a split in one line."""
    texts = NOTES | ({"empty": "dropped without text"} if "documents" in counts else {})
    notes = [f"{counts[name]} {text.format(max_length=max_length)}" for name, text in texts.items() if counts[name]]
    return f"{split}: {counts['kept']} of {counts['rows']} rows" + "".join(
        f", {note}" for note in [*notes, *extra_notes(counts)]
    )


def no_usable_rows(sources: Sequence[str], rows: Any, max_length: int) -> ValueError:
    """The error for a split without any row that can be trained on."""
    names, empty, first = ", ".join(sources), rows["empty"][:], rows["first_label"][:]
    if all(empty):
        if "documents" in rows.column_names:
            return ValueError(f"{names}: every text is empty: training needs at least one document with text")
        return ValueError(
            f"{names}: {_why_empty(rows)}: training needs at least one row with an answer; `kd-lightning generate "
            "--data FILE --output OUT.jsonl` generates responses to prompts without answers"
        )
    if differing := [n for n, text in enumerate(differences_of(rows)) if text]:
        return ValueError(
            f"{rows['location'][differing[0]]}: the teacher's chat template writes the answer as "
            f"{differences_of(rows)[differing[0]]}, in {len(differing)} of {len(rows)} rows: the labels must be the "
            "same tokens, so pass a teacher_chat_template that ends the answer as the student's does"
        )
    if "teacher_cut" in rows.column_names and any(rows["teacher_cut"][:]):
        return ValueError(f"{names}: no answer fits max_length={max_length} after the teacher's prompt: increase it")
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
