"""Rows of a data set as prompts with their reference answers."""

from __future__ import annotations

import json
from typing import Any

from kd_lightning.data.base import GenerationRow
from kd_lightning.data.conversation import Conversation
from kd_lightning.data.text.text_tokenizer import TextTokenizer


def generation_rows_of(rows: Any, tokenizer: TextTokenizer, first: int | None) -> list[GenerationRow]:
    """Prompt and reference answer of rows.

    Args:
        rows: a `datasets.Dataset` with the columns `row`, `conversation` and `row_id`.
        tokenizer: how rows become token ids.
        first: only the first rows, at most this many; None: all rows.
    """
    rows = rows.select_columns(["row", "conversation", "row_id"])
    found: list[GenerationRow] = []
    for row in rows if first is None else rows.select(range(min(first, len(rows)))):
        conversation = Conversation.load(row["conversation"])
        text, ids = tokenizer.prompt(conversation)
        fields = json.loads(row["row"])
        found.append(
            GenerationRow(prompt_ids=ids, prompt=text, answer=conversation.answer, row=fields, index=row["row_id"])
        )
    return found
