"""Numbers and names that several packages share."""

from __future__ import annotations

SOURCES = ("dataset", "teacher", "student")
"""Who wrote a response; the column `source` holds indices into it."""

IGNORE_INDEX = -100
"""The label of a token that is not scored."""


def moves_objective(path: str) -> bool:
    """Whether a schedule at this dotted path changes what the objective measures, and not a weight beside it."""
    return path != "ce_weight" and not path.startswith("responses.")
