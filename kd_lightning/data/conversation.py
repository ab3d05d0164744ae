"""What a row may look like, and what it means: a conversation, or a prompt with its completion."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

Message = dict[str, Any]
FORMS = "'instruction' (with an optional 'input') and 'output'; 'prompt' and 'completion'; or 'messages'"


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A row, whatever its form: turns with roles, or a plain prompt and completion.

    Args:
        messages: the turns; empty where the row is plain text.
        prompt: the plain prompt, where there are no turns.
        completion: the plain completion, where there are no turns.
        first: the number of the first turn whose words may count (the turns before it are the prompt).
        tools: what the `tools` column hands to the chat template.
        template_kwargs: what the row itself hands to the chat template.
    """

    messages: list[Message] = dataclasses.field(default_factory=list)
    prompt: str = ""
    completion: str = ""
    first: int = 0
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] | None = None

    @property
    def answer_turns(self) -> list[int]:
        """Numbers of the turns in which the assistant says something that counts."""
        return [n for n, message in enumerate(self.messages) if n >= self.first and _speaks(message)]

    @property
    def empty(self) -> bool:
        """Whether there is no answer to learn from."""
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
        """As a line of JSON, for `load`."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, default=str)

    @classmethod
    def load(cls, line: str) -> Conversation:
        """The conversation that `dump` wrote."""
        return cls(**json.loads(line))


def parse_row(row: Mapping[str, Any], place: str) -> Conversation:
    """What a row says.

    Args:
        row: the fields; null stands for a field that is not there, fields of no meaning are left alone.
        place: where the row lies, for the message of an error.

    Raises:
        ValueError: the row has none of the accepted forms, or a field of a wrong type.
    """
    fields = {name: value for name, value in row.items() if value is not None}
    extras = extras_of(fields, place)
    if "messages" in fields:
        return Conversation(messages=messages_of(fields, "messages", place), **extras)
    if "prompt" in fields and "completion" in fields:
        if isinstance(fields["prompt"], list):
            prompt = messages_of(fields, "prompt", place)
            completion = messages_of(fields, "completion", place)
            return Conversation(messages=prompt + completion, first=len(prompt), **extras)
        prompt_text, completion_text = (typed(fields, name, str, place) for name in ("prompt", "completion"))
        return Conversation(prompt=prompt_text or "", completion=completion_text or "", **extras)
    if "instruction" in fields and "output" in fields:
        instruction, given, output = (typed(fields, name, str, place) for name in ("instruction", "input", "output"))
        question = f"{instruction}\n{given}" if given else instruction
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
        return Conversation(messages=turns, first=1, **extras)
    names = ", ".join(repr(name) for name in fields) or "no field at all"
    raise ValueError(f"{place}: a row needs {FORMS}; this one has {names}")


def extras_of(fields: Mapping[str, Any], place: str) -> dict[str, Any]:
    """What a row hands to the chat template beside its turns."""
    return {
        "tools": _tools(fields.get("tools"), place),
        "template_kwargs": typed(fields, "chat_template_kwargs", dict, place),
    }


def text_of(message: Message) -> str:
    """The words of a turn; its text parts joined where the content is a list of parts."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content)
    return content or ""


def is_plain(message: Message) -> bool:
    """Whether a turn is its content alone, without tool calls or thoughts in fields of their own."""
    return not any(value for name, value in message.items() if name not in ("role", "content"))


def _speaks(message: Message) -> bool:
    return message["role"] == "assistant" and bool(text_of(message).strip() or not is_plain(message))


def typed(fields: Mapping[str, Any], name: str, kind: type, place: str) -> Any:
    """A field, or None where it is not there; a ValueError where it is of another type."""
    value = fields.get(name)
    if value is not None and not isinstance(value, kind):
        names: dict[Any, str] = {str: "a string", list: "a list", dict: "an object"}
        raise ValueError(f"{place}: field {name!r} must be {names[kind]}, got {type(value).__name__}")
    return value


def messages_of(fields: Mapping[str, Any], name: str, place: str) -> list[Message]:
    """A field that holds turns; a ValueError where they are not well formed."""
    messages = []
    for number, message in enumerate(typed(fields, name, list, place), start=1):
        where = f"{place}: field {name!r}, message {number}"
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
        raise ValueError(f"{place}: field {name!r} must hold at least one message")
    return messages


def _tools(value: Any, place: str) -> list[Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: field 'tools' is broken JSON: {error.msg}") from None
    if value is not None and not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        raise ValueError(f"{place}: field 'tools' must be a list of objects, got {type(value).__name__}")
    return value or None
