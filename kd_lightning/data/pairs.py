"""Two responses to one prompt: what a row of pairs may look like, and how two files of responses become pairs."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from typing import Any

from kd_lightning.data.conversation import Conversation, Message, extras_of, messages_of, parse_row, typed
from kd_lightning.data.sources import read_rows

FIELDS = (("teacher_response", "student_response"), ("chosen", "rejected"))
FORMS = (
    "a prompt ('prompt', 'messages', or 'instruction' with an optional 'input') with 'teacher_response' and "
    "'student_response', or with 'chosen' and 'rejected'"
)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two responses to one prompt.

    Args:
        teacher: prompt and the teacher's response; without an answer where that is missing.
        student: the same with the student's.
        dropped: why it cannot be learned from: "side_missing", "prompt_differs", "no_partner", or "" where it can.
    """

    teacher: Conversation
    student: Conversation
    dropped: str = ""


def is_pair(row: Mapping[str, Any]) -> bool:
    """Whether a row has a field of one side at least."""
    return any(row.get(name) is not None for names in FIELDS for name in names)


def parse_pair(row: Mapping[str, Any], place: str) -> Pair:
    """What a row of pairs says.

    Args:
        row: the fields; null stands for a field that is not there.
        place: where the row lies, for the message of an error.

    Raises:
        ValueError: the row has no field of any side, no prompt, or a field of a wrong type.
    """
    for names in FIELDS:
        there = [name for name in names if row.get(name) is not None]
        if len(there) == 1:
            (name,) = there
            half = parse_response(row, name, place)
            other = with_answer(half, None)
            halves = (half, other) if name == names[0] else (other, half)
            return Pair(*halves, "side_missing")
        if there:
            teacher, student = (parse_response(row, name, place) for name in names)
            return Pair(teacher, student, "" if prompt_key(teacher) == prompt_key(student) else "prompt_differs")
    raise ValueError(f"{place}: a pair needs {FORMS}; this one has {_names(row)}")


def parse_response(row: Mapping[str, Any], name: str, place: str) -> Conversation:
    """Prompt and response of a row.

    Args:
        row: the fields.
        name: the field that holds the response: a text, or a list of messages, which may repeat the prompt.
        place: where the row lies, for the message of an error.

    Raises:
        ValueError: there is no prompt, or a field is of a wrong type.
    """
    fields = {key: value for key, value in row.items() if value is not None}
    if isinstance(fields.get(name), list):
        turns = messages_of(fields, name, place)
        if turns[0]["role"] == "assistant":
            question = parse_prompt(fields, place)
            lead = question.messages or [{"role": "user", "content": question.prompt}]
            return dataclasses.replace(question, messages=lead + turns, first=len(lead), prompt="")
        first = max(n for n, turn in enumerate(turns) if n == 0 or turn["role"] == "user") + 1
        return Conversation(messages=turns, first=first, **extras_of(fields, place))
    return with_answer(parse_prompt(fields, place), typed(fields, name, str, place))


def parse_prompt(row: Mapping[str, Any], place: str) -> Conversation:
    """A row's prompt alone: of `messages` all turns but the last answer.

    Raises:
        ValueError: there is none, or a field is of a wrong type.
    """
    fields = {key: value for key, value in row.items() if value is not None}
    if isinstance(fields.get("prompt"), str):
        return Conversation(prompt=fields["prompt"], **extras_of(fields, place))
    if "prompt" in fields or "messages" in fields:
        turns = messages_of(fields, "prompt" if "prompt" in fields else "messages", place)
        while len(turns) > 1 and turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        return Conversation(messages=turns, first=len(turns), **extras_of(fields, place))
    if "instruction" in fields:
        whole = parse_row({**fields, "output": ""}, place)
        return dataclasses.replace(whole, messages=whole.messages[:1])
    raise ValueError(f"{place}: a pair needs {FORMS}; this one has {_names(row)}")


def with_answer(conversation: Conversation, answer: str | None) -> Conversation:
    """The same prompt with another answer; None: with none."""
    if not conversation.messages:
        return dataclasses.replace(conversation, completion=answer or "")
    turns: list[Message] = [] if answer is None else [{"role": "assistant", "content": answer}]
    return dataclasses.replace(conversation, messages=conversation.messages[: conversation.first] + turns)


def prompt_key(conversation: Conversation) -> str:
    """A text that is the same for two responses to one prompt, and for no others."""
    parts = [conversation.messages[: conversation.first], conversation.prompt]
    return json.dumps([*parts, conversation.tools, conversation.template_kwargs], sort_keys=True, default=str)


# ------------------------------------------------------------------------------------------------------ reading files
def read_pairs(split: str, sources: tuple[str, ...], student: tuple[str, ...], late: bool) -> Iterator[dict[str, Any]]:
    """Columns of each pair: `row`, `conversation` (the teacher's), `student`, `place`, `row_id` and `dropped`.

    Args:
        split: which split of a folder or name.
        sources: files of pairs; or, with `student`, of the teacher's responses.
        student: files of the student's responses to the same prompts.
        late: a response may come later; a row may be a prompt alone.
    """
    pairs = _joined(split, sources, student) if student else _given(split, sources, late)
    for number, (place, row, pair) in enumerate(pairs):
        yield {
            "row": json.dumps(row, ensure_ascii=False, default=str),
            "conversation": pair.teacher.dump(),
            "student": pair.student.dump(),
            "place": place,
            "row_id": number,
            "dropped": pair.dropped,
        }


def read_answers(split: str, sources: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Rows of instructions, as for plain instruction tuning; of a pair the teacher's response."""
    rows = (found for source in sources for found in read_rows(source, split))
    for number, (place, row) in enumerate(rows):
        conversation = parse_pair(row, place).teacher if is_pair(row) else parse_row(row, place)
        text = json.dumps(row, ensure_ascii=False, default=str)
        yield {"row": text, "conversation": conversation.dump(), "place": place, "row_id": number}


def _given(split: str, sources: tuple[str, ...], late: bool) -> Iterator[tuple[str, dict[str, Any], Pair]]:
    for source in sources:
        for place, row in read_rows(source, split):
            if late and not is_pair(row):
                prompt = parse_prompt(row, place)
                yield place, row, Pair(prompt, prompt, "side_missing")
            else:
                yield place, row, parse_pair(row, place)


def _joined(
    split: str, sources: tuple[str, ...], student: tuple[str, ...]
) -> Iterator[tuple[str, dict[str, Any], Pair]]:
    """The teacher's rows in their order, each with the next unused row of its prompt; then the student's left over."""
    waiting: dict[str, deque[tuple[str, dict[str, Any], Conversation]]] = defaultdict(deque)
    for place, row, half in _responses(split, student):
        waiting[prompt_key(half)].append((place, row, half))
    for place, row, half in _responses(split, sources):
        partners = waiting[prompt_key(half)]
        if not partners:
            yield place, row, Pair(half, with_answer(half, None), "no_partner")
            continue
        _, other_row, other = partners.popleft()
        missing = row["response"] is None or other_row["response"] is None
        yield place, row, Pair(half, other, "side_missing" if missing else "")
    for partners in waiting.values():
        for place, row, half in partners:
            yield place, row, Pair(with_answer(half, None), half, "no_partner")


def _responses(split: str, sources: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any], Conversation]]:
    for source in sources:
        for place, row in read_rows(source, split):
            if "response" not in row:
                raise ValueError(
                    f"{place}: a row needs 'response' beside its prompt to be joined; this one has {_names(row)}"
                )
            yield place, row, parse_response(row, "response", place)


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(repr(name) for name, value in row.items() if value is not None) or "no field at all"
