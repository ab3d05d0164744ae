"""Pairs of responses to one prompt: the forms of a row, and two files of responses joined by prompt."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from typing import Any

from kd_lightning.data.conversation import (
    Conversation,
    Message,
    extras_of,
    messages_of,
    parse_row,
    shared_turns,
    typed,
    without_nulls,
)
from kd_lightning.data.sources import read_rows
from kd_lightning.data.tokenization import conversation_columns

FIELDS = (("teacher_response", "student_response"), ("chosen", "rejected"))
FORMS = (
    "a prompt ('prompt', 'messages', or 'instruction' with an optional 'input') with 'teacher_response' and "
    "'student_response', or with 'chosen' and 'rejected'"
)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two responses to one prompt.

    Args:
        teacher: prompt and the teacher's response; without an answer if that is missing.
        student: the same with the student's response.
        dropped: why it cannot be trained on: "side_missing", "prompt_differs" or "no_partner"; "" if it can.
    """

    teacher: Conversation
    student: Conversation
    dropped: str = ""


def is_pair(row: Mapping[str, Any]) -> bool:
    """Whether a row has the field of at least one side."""
    return any(row.get(name) is not None for names in FIELDS for name in names)


def parse_pair(row: Mapping[str, Any], location: str) -> Pair:
    """Parse a row of pairs.

    Args:
        row: the fields; null stands for a missing field.
        location: file and line of the row, for error messages.

    Raises:
        ValueError: the row has no field of any side, no prompt, or a field of a wrong type.
    """
    for names in FIELDS:
        there = [name for name in names if row.get(name) is not None]
        if len(there) == 1:
            (name,) = there
            half = parse_response(row, name, location)
            other = with_answer(half, None)
            halves = (half, other) if name == names[0] else (other, half)
            return Pair(*halves, "side_missing")
        if there:
            teacher, student = (parse_response(row, name, location) for name in names)
            return Pair(teacher, student, "" if prompt_key(teacher) == prompt_key(student) else "prompt_differs")
    raise ValueError(f"{location}: a pair needs {FORMS}; this one has {_names(row)}")


def parse_response(row: Mapping[str, Any], name: str, location: str) -> Conversation:
    """Prompt and response of a row.

    Args:
        row: the fields.
        name: the field that holds the response: a text, or a list of messages, which may repeat the prompt.
        location: file and line of the row, for error messages.

    Raises:
        ValueError: there is no prompt, or a field is of a wrong type.
    """
    fields = without_nulls(row)
    if isinstance(fields.get(name), list):
        turns = messages_of(fields, name, location)
        if turns[0]["role"] == "assistant":
            question = parse_prompt(fields, location)
            lead = question.messages or [{"role": "user", "content": question.prompt}]
            extras = extras_of(fields, location)
            return Conversation.of(lead + turns, first=len(lead), **extras)
        first = max(n for n, turn in enumerate(turns) if n == 0 or turn["role"] == "user") + 1
        return Conversation.of(turns, first=first, **extras_of(fields, location))
    return with_answer(parse_prompt(fields, location), typed(fields, name, str, location))


def parse_prompt(row: Mapping[str, Any], location: str) -> Conversation:
    """A row's prompt alone: of `messages`, all turns except the last answer.

    Raises:
        ValueError: there is none, or a field is of a wrong type.
    """
    fields = without_nulls(row)
    if isinstance(fields.get("prompt"), str):
        return Conversation(prompt=fields["prompt"], **extras_of(fields, location))
    if "prompt" in fields or "messages" in fields:
        return _question(
            messages_of(fields, "prompt" if "prompt" in fields else "messages", location), fields, location
        )
    if "instruction" in fields:
        whole = parse_row({**fields, "output": ""}, location)
        return dataclasses.replace(whole, messages=whole.messages[:1])
    if turns := shared_turns(fields, location):
        return _question(turns, fields, location)
    raise ValueError(f"{location}: a pair needs {FORMS}; this one has {_names(row)}")


def _question(turns: list[Message], fields: Mapping[str, Any], location: str) -> Conversation:
    while len(turns) > 1 and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    return Conversation.of(turns, first=len(turns), **extras_of(fields, location))


def with_answer(conversation: Conversation, answer: str | None) -> Conversation:
    """The same prompt with another answer; None: without an answer."""
    if not conversation.messages:
        return dataclasses.replace(conversation, completion=answer or "")
    turns: list[Message] = [] if answer is None else [{"role": "assistant", "content": answer}]
    messages = conversation.messages[: conversation.first] + turns
    return dataclasses.replace(conversation, messages=messages, unlearned=[])


def prompt_key(conversation: Conversation) -> str:
    """A text that is equal for two responses to the same prompt, and only for those."""
    parts = [conversation.messages[: conversation.first], conversation.prompt]
    return json.dumps([*parts, conversation.tools, conversation.template_kwargs], sort_keys=True, default=str)


# ------------------------------------------------------------------------------------------------------ reading files
def read_pairs(split: str, sources: tuple[str, ...], student: tuple[str, ...], late: bool) -> Iterator[dict[str, Any]]:
    """Columns of each pair: `row`, `conversation` (the teacher's), `student`, `location`, `row_id` and `dropped`.

    Args:
        split: which split of a folder or name.
        sources: files of pairs; or, with `student`, of the teacher's responses.
        student: files of the student's responses to the same prompts.
        late: responses may be added later; a row may be a prompt alone.
    """
    pairs = _joined(split, sources, student) if student else _given(split, sources, late)
    for number, (location, row, pair) in enumerate(pairs):
        yield {
            "row": json.dumps(row, ensure_ascii=False, default=str),
            "conversation": pair.teacher.dump(),
            "student": pair.student.dump(),
            "location": location,
            "row_id": number,
            "dropped": pair.dropped,
        }


def read_teacher_answers(split: str, sources: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Rows as for plain instruction tuning; of a pair, the teacher's response is the answer."""
    rows = (found for source in sources for found in read_rows(source, split))
    yield from conversation_columns(
        (location, row, parse_pair(row, location).teacher if is_pair(row) else parse_row(row, location))
        for location, row in rows
    )


def _given(split: str, sources: tuple[str, ...], late: bool) -> Iterator[tuple[str, dict[str, Any], Pair]]:
    for source in sources:
        for location, row in read_rows(source, split):
            if late and not is_pair(row):
                prompt = parse_prompt(row, location)
                yield location, row, Pair(prompt, prompt, "side_missing")
            else:
                yield location, row, parse_pair(row, location)


def _joined(
    split: str, sources: tuple[str, ...], student: tuple[str, ...]
) -> Iterator[tuple[str, dict[str, Any], Pair]]:
    """The teacher's rows in file order, each with the next row of its prompt; then the student's unused rows."""
    waiting: dict[str, deque[tuple[str, dict[str, Any], Conversation]]] = defaultdict(deque)
    for location, row, half in _responses(split, student):
        waiting[prompt_key(half)].append((location, row, half))
    for location, row, half in _responses(split, sources):
        partners = waiting[prompt_key(half)]
        if not partners:
            yield location, row, Pair(half, with_answer(half, None), "no_partner")
            continue
        _, other_row, other = partners.popleft()
        missing = row["response"] is None or other_row["response"] is None
        yield location, row, Pair(half, other, "side_missing" if missing else "")
    for partners in waiting.values():
        for location, row, half in partners:
            yield location, row, Pair(with_answer(half, None), half, "no_partner")


def _responses(split: str, sources: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any], Conversation]]:
    for source in sources:
        for location, row in read_rows(source, split):
            if "response" not in row:
                raise ValueError(
                    f"{location}: a row needs 'response' and its prompt to be joined; this one has {_names(row)}"
                )
            yield location, row, parse_response(row, "response", location)


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(repr(name) for name, value in row.items() if value is not None) or "no fields"
