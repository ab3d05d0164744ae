"""The forms of a row: a conversation, or a prompt with its completion."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

Message = dict[str, Any]
FORMS = "'instruction' (with an optional 'input') and 'output'; 'prompt' and 'completion'; or 'messages'"


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A row of any form: turns with roles, or a plain prompt and completion.

    Args:
        messages: the turns; empty if the row is plain text.
        prompt: the plain prompt, if there are no turns.
        completion: the plain completion, if there are no turns.
        first: index of the first turn that may have labels (the turns before it are the prompt).
        tools: the `tools` column, passed to the chat template.
        template_kwargs: variables of this row for the chat template.
    """

    messages: list[Message] = dataclasses.field(default_factory=list)
    prompt: str = ""
    completion: str = ""
    first: int = 0
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] | None = None

    @property
    def answer_turns(self) -> list[int]:
        """Indices of the assistant's turns that have labels."""
        return [n for n, message in enumerate(self.messages) if n >= self.first and _speaks(message)]

    @property
    def empty(self) -> bool:
        """Whether there is no answer to train on."""
        return not (self.answer_turns if self.messages else self.completion.strip())

    @property
    def answer(self) -> str:
        """Text of the last answer."""
        if not self.messages:
            return self.completion
        turns = self.answer_turns
        return text_of(self.messages[turns[-1]]) if turns else ""

    @property
    def question(self) -> list[Message]:
        """The turns before the last answer."""
        turns = self.answer_turns
        return self.messages[: turns[-1]] if turns else self.messages

    def dump(self) -> str:
        """One line of JSON, for `load`."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, default=str)

    @classmethod
    def load(cls, line: str) -> Conversation:
        """The conversation from the output of `dump`."""
        return cls(**json.loads(line))


def parse_row(row: Mapping[str, Any], location: str) -> Conversation:
    """Parse a row of any form.

    Args:
        row: the fields; null stands for a missing field, unknown fields are ignored.
        location: file and line of the row, for error messages.

    Raises:
        ValueError: the row has none of the accepted forms, or a field of a wrong type.
    """
    fields = {name: value for name, value in row.items() if value is not None}
    extras = extras_of(fields, location)
    if "messages" in fields:
        return Conversation(messages=messages_of(fields, "messages", location), **extras)
    if "prompt" in fields and "completion" in fields:
        if isinstance(fields["prompt"], list):
            prompt = messages_of(fields, "prompt", location)
            completion = messages_of(fields, "completion", location)
            return Conversation(messages=prompt + completion, first=len(prompt), **extras)
        prompt_text, completion_text = (typed(fields, name, str, location) for name in ("prompt", "completion"))
        return Conversation(prompt=prompt_text or "", completion=completion_text or "", **extras)
    if "instruction" in fields and "output" in fields:
        instruction, given, output = (typed(fields, name, str, location) for name in ("instruction", "input", "output"))
        question = f"{instruction}\n{given}" if given else instruction
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
        return Conversation(messages=turns, first=1, **extras)
    names = ", ".join(repr(name) for name in fields) or "no fields"
    raise ValueError(f"{location}: a row needs {FORMS}; this one has {names}")


def extras_of(fields: Mapping[str, Any], location: str) -> dict[str, Any]:
    """What a row passes to the chat template in addition to its turns."""
    return {
        "tools": _tools(fields.get("tools"), location),
        "template_kwargs": typed(fields, "chat_template_kwargs", dict, location),
    }


def text_of(message: Message) -> str:
    """The text of a turn; its text parts joined if the content is a list of parts."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content)
    return content or ""


def is_plain(message: Message) -> bool:
    """Whether a turn is its content alone, without tool calls or reasoning in other fields."""
    return not any(value for name, value in message.items() if name not in ("role", "content"))


def _speaks(message: Message) -> bool:
    return message["role"] == "assistant" and bool(text_of(message).strip() or not is_plain(message))


def typed(fields: Mapping[str, Any], name: str, kind: type, location: str) -> Any:
    """A field, or None if it is missing; a ValueError if it has another type."""
    value = fields.get(name)
    if value is not None and not isinstance(value, kind):
        names: dict[Any, str] = {str: "a string", list: "a list", dict: "an object"}
        raise ValueError(f"{location}: field {name!r} must be {names[kind]}, got {type(value).__name__}")
    return value


def messages_of(fields: Mapping[str, Any], name: str, location: str) -> list[Message]:
    """A field that holds turns; a ValueError if they are not well formed."""
    messages = []
    for number, message in enumerate(typed(fields, name, list, location), start=1):
        where = f"{location}: field {name!r}, message {number}"
        if not isinstance(message, dict):
            raise ValueError(f"{where}: must be an object with 'role' and 'content', got {type(message).__name__}")
        message = {key: value for key, value in message.items() if value is not None}
        if not isinstance(message.get("role"), str):
            raise ValueError(f"{where}: 'role' must be a string, got {message.get('role')!r}")
        content = message.get("content", "")
        parts = isinstance(content, list) and all(isinstance(part, dict) for part in content)
        if not isinstance(content, str) and not parts:
            raise ValueError(f"{where}: 'content' must be a string or a list of parts, got {type(content).__name__}")
        messages.append(message)
    if not messages:
        raise ValueError(f"{location}: field {name!r} must hold at least one message")
    return messages


def _tools(value: Any, location: str) -> list[Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{location}: field 'tools' is broken JSON: {error.msg}") from None
    if value is not None and not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        raise ValueError(f"{location}: field 'tools' must be a list of objects, got {type(value).__name__}")
    return value or None
