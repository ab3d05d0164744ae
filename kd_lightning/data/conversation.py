"""The forms of a row: a conversation, or a prompt with its completion."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from kd_lightning.data.text.json_text import parse_json

Message = dict[str, Any]
FORMS = "'instruction' (with an optional 'input') and 'output'; 'prompt' and 'completion'; 'messages'; or 'text'"
TURNS = ("conversations", "conversation")
"""Names of `messages` in ShareGPT files."""
ROLES: dict[str, str | None] = {
    **dict.fromkeys(("system", "developer", "user", "assistant", "tool", "function", "ipython")),
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "model", "bot", "chatgpt"), "assistant"),
    **dict.fromkeys(("observation", "function_response", "tool_response"), "tool"),
}
"""Known roles in lower case, and the role of a chat template that each stands for; None: the same."""
CALLS = ("function_call", "tool_call", "tool_calls")
"""Roles of ShareGPT files for an assistant's turn that is a call of tools: its text is the call, as JSON."""
LEARNED = ("weight", "train", "trainable", "training", "loss_mask", "loss")
"""Fields of a turn that say whether it is learned: 0 or false, 1 or true."""

_template_roles: ContextVar[frozenset[str]] = ContextVar("template_roles", default=frozenset())


@contextmanager
def template_roles(names: Iterable[str]) -> Iterator[None]:
    """While it is entered, rows may have these roles too: those that the chat template names."""
    token = _template_roles.set(frozenset(names))
    try:
        yield
    finally:
        _template_roles.reset(token)


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A row of any form: turns with roles, a plain prompt and completion, or a document.

    Args:
        messages: the turns; empty if the row is plain text.
        prompt: the plain prompt, if there are no turns.
        completion: the plain completion, if there are no turns; the text of a document.
        first: index of the first turn that may have labels (the turns before it are the prompt).
        tools: the `tools` column, passed to the chat template.
        template_kwargs: variables of this row for the chat template.
        unlearned: indices of the assistant's turns that the row excludes from the labels.
        document: whether the row is a document: a raw text without a prompt, all of which is learned.
    """

    messages: list[Message] = dataclasses.field(default_factory=list)
    prompt: str = ""
    completion: str = ""
    first: int = 0
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] | None = None
    unlearned: list[int] = dataclasses.field(default_factory=list)
    document: bool = False

    @classmethod
    def of(cls, messages: list[Message], first: int = 0, **extras: Any) -> Conversation:
        """A conversation from the turns of `messages_of`, without their fields of `LEARNED`."""
        unlearned = [n for n, message in enumerate(messages) if message.get("weight") == 0]
        turns = [{name: value for name, value in message.items() if name != "weight"} for message in messages]
        return cls(messages=turns, first=first, unlearned=unlearned, **extras)

    @property
    def answer_turns(self) -> list[int]:
        """Indices of the assistant's turns that have labels."""
        turns = enumerate(self.messages)
        return [n for n, turn in turns if n >= self.first and n not in self.unlearned and _speaks(turn)]

    @property
    def excluded(self) -> int:
        """Number of the assistant's turns that the row excludes from the labels."""
        return sum(n >= self.first and _speaks(self.messages[n]) for n in self.unlearned)

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
    fields = without_nulls(row)
    extras = extras_of(fields, location)
    if "messages" in fields:
        return Conversation.of(messages_of(fields, "messages", location), **extras)
    if "prompt" in fields and "completion" in fields:
        if isinstance(fields["prompt"], list):
            prompt = messages_of(fields, "prompt", location)
            completion = messages_of(fields, "completion", location)
            return Conversation.of(prompt + completion, first=len(prompt), **extras)
        prompt_text, completion_text = (typed(fields, name, str, location) for name in ("prompt", "completion"))
        return Conversation(prompt=prompt_text or "", completion=completion_text or "", **extras)
    if "instruction" in fields and "output" in fields:
        instruction, given, output = (typed(fields, name, str, location) for name in ("instruction", "input", "output"))
        question = f"{instruction}\n{given}" if given else instruction
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
        return Conversation(messages=turns, first=1, **extras)
    if turns := shared_turns(fields, location):
        return Conversation.of(turns, **extras)
    if "text" in fields and not {"prompt", "instruction"} & fields.keys():
        return Conversation(completion=typed(fields, "text", str, location), document=True)
    names = ", ".join(repr(name) for name in fields) or "no fields"
    raise ValueError(f"{location}: a row needs {FORMS}; this one has {names}")


def without_nulls(value: Any) -> Any:
    """The value without null fields of its objects at any depth: Arrow writes null for every missing field."""
    if isinstance(value, Mapping):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def shared_turns(fields: Mapping[str, Any], location: str) -> list[Message]:
    """The turns of a ShareGPT row, its `system` field first; none if the row has another form."""
    for name in TURNS:
        if name in fields:
            system = typed(fields, "system", str, location)
            lead: list[Message] = [{"role": "system", "content": system}] if system else []
            turns = messages_of(fields, name, location)
            return turns if turns[0]["role"] == "system" else lead + turns
    return []


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
        messages.append(_message(without_nulls(message), where))
    if not messages:
        raise ValueError(f"{location}: field {name!r} must hold at least one message")
    return messages


def with_objects(message: Message) -> Message:
    """The turn with the arguments of its tool calls as objects; they may be JSON text.

    Raises:
        ValueError: the text is not a JSON object, or `tool_calls` is not a list of objects.
    """
    if "tool_calls" not in message:
        return message
    calls = message["tool_calls"]
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(f"'tool_calls' must be a list of objects, got {type(calls).__name__}")
    return {**message, "tool_calls": [_call_with_object(call) for call in calls]}


def _call_with_object(call: dict[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call_with_object(call["function"])}
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        found = without_nulls(parse_json(arguments or "{}"))
    except ValueError as error:
        raise ValueError(f"the arguments of the call of {call.get('name')!r} are {error}") from None
    if not isinstance(found, dict):
        raise ValueError(
            f"the arguments of the call of {call.get('name')!r} must be a JSON object, got {type(found).__name__}"
        )
    return {**call, "arguments": found}


def _message(message: Message, where: str) -> Message:
    """A turn with the names of a chat template; `weight` is 0 if it is not to be learned, else absent."""
    if "role" not in message and "from" in message:  # ShareGPT
        names = {"from": "role", "value": "content"}
        message = {names.get(name, name): value for name, value in message.items()}
    role = message.get("role")
    if not isinstance(role, str):
        raise ValueError(f"{where}: 'role' must be a string, got {role!r}")
    known = role.strip().lower()
    if known in CALLS:
        message, known = _call_turn(message, role, where), "assistant"
    own = next((name for name in (role, known) if name in _template_roles.get()), None)
    if known not in ROLES and own is None:
        raise ValueError(
            f"{where}: unknown role {role!r}: rename it to one of {', '.join(ROLES)}, or pass a chat_template that "
            "names it"
        )
    message = {**message, "role": own or ROLES[known] or known}
    flags = {name: message.pop(name) for name in LEARNED if name in message}
    for name, value in flags.items():
        if value not in (0, 1):
            raise ValueError(f"{where}: {name!r} must be 0 or 1, false or true, got {value!r}")
    if "content" in message:
        message["content"] = _content(message["content"], where)
    try:
        with_objects(message)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return {**message, "weight": 0} if any(value == 0 for value in flags.values()) else message


def _call_turn(message: Message, role: str, where: str) -> Message:
    """The turn with its text, the JSON of a call or of a list of calls, as `tool_calls`."""
    try:
        found = message.get("content")
        found = parse_json(found) if isinstance(found, str) else found
        calls = found if isinstance(found, list) else [found]
        if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
            raise ValueError("it has no name")
    except ValueError as error:
        raise ValueError(
            f"{where}: the text of role {role!r} must be JSON with 'name' and 'arguments' of a call, or a list of such "
            f"calls: {error}"
        ) from None
    others = {name: value for name, value in message.items() if name != "content"}
    return {**others, "tool_calls": [{"type": "function", "function": call} for call in calls]}


def _content(content: Any, where: str) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise ValueError(f"{where}: 'content' must be a string or a list of parts, got {type(content).__name__}")
    for number, part in enumerate(content, start=1):
        kind, text = part.get("type", "text"), part.get("text", "")
        if kind != "text":
            raise ValueError(f"{where}, part {number}: only parts of type 'text' can be read, got type {kind!r}")
        if not isinstance(text, str):
            raise ValueError(f"{where}, part {number}: 'text' must be a string, got {type(text).__name__}")
    return [{"type": "text", "text": part.get("text", "")} for part in content]


def _tools(value: Any, location: str) -> list[Any] | None:
    if isinstance(value, str):
        try:
            value = without_nulls(parse_json(value))
        except ValueError as error:
            raise ValueError(f"{location}: field 'tools' is {error}") from None
    if value is not None and not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        raise ValueError(f"{location}: field 'tools' must be a list of objects, got {type(value).__name__}")
    return value or None
