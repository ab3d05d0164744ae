"""Prompts alone: rows of any form, of which the answer is left out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from kd_lightning.data.pairs import parse_prompt
from kd_lightning.data.reading import read_rows
from kd_lightning.data.rows import Conversation

FORMS = "'instruction' (with an optional 'input'), 'prompt' or 'messages'"


def parse_question(row: Mapping[str, Any], place: str) -> Conversation:
    """A row's prompt; of `messages` all turns but the last answer.

    Raises:
        ValueError: there is none, or a field is of a wrong type.
    """
    if all(row.get(name) is None for name in ("instruction", "prompt", "messages")):
        names = ", ".join(repr(name) for name in row) or "no field at all"
        raise ValueError(f"{place}: a row needs {FORMS}; this one has {names}")
    return parse_prompt(row, place)


def read_prompts(split: str, sources: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Columns of each row: `row` (the fields, as JSON), `conversation` (the prompt, as JSON), `place`, `row_id`."""
    found = (pair for source in sources for pair in read_rows(source, split))
    for number, (place, row) in enumerate(found):
        text = json.dumps(row, ensure_ascii=False, default=str)
        yield {"row": text, "conversation": parse_question(row, place).dump(), "place": place, "row_id": number}
