"""What a row says and its rendered text does not contain."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

from kd_lightning.data.conversation import Conversation, Message, text_of

SPOKEN = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Fields of an assistant's turn that are part of what it says."""
_BASE = ("role", "content", "tool_call_id")
_USUAL = ("user", "assistant", "system")
_BREAKS = re.compile(r"\n|<[^<>\n]{1,40}>")
Render = Callable[[Conversation], str]


def unread_fields(conversation: Conversation, render: Render) -> list[str]:
    """Names of the fields that do not change the text, once for each turn that has them; `tools`, and roles.

    Args:
        conversation: turns.
        render: the text of a conversation; a ValueError if the template refuses it.
    """
    names: dict[str, int] = {}
    for message in conversation.messages:
        for name in message.keys() - set(_BASE):
            names[name] = names.get(name, 0) + 1
    if conversation.tools:
        names["tools"] = names.get("tools", 0) + 1
    roles = {message["role"] for message in conversation.messages} - set(_USUAL)
    if not names and not roles:
        return []
    text = render(conversation)
    if names and not _is_same(conversation, set(names), render, text):
        names = {name: count for name, count in names.items() if _is_same(conversation, {name}, render, text)}
    for role in sorted(roles):
        if _is_same(conversation, {role}, render, text, as_user=True):
            names[f"role {role!r}"] = sum(message["role"] == role for message in conversation.messages)
    return [name for name, count in sorted(names.items()) for _ in range(count)]


def words_left_out(conversation: Conversation, turn: int, text: str, render: Render) -> bool:
    """Whether an answer says something that its text does not contain.

    Args:
        conversation: turns.
        turn: index of the answer.
        text: the text of this turn.
        render: as for `unread_fields`.
    """
    message = conversation.messages[turn]
    said = [text_of(message), *(value for name in SPOKEN if isinstance(value := message.get(name), str))]
    if not all(_contains(text, words) for words in said):
        return True
    if not (message.get("tool_calls") or message.get("function_call")):
        return False
    others = {name: value for name, value in message.items() if name not in ("tool_calls", "function_call")}
    turns = [*conversation.messages[:turn], others, *conversation.messages[turn + 1 :]]
    try:
        return render(dataclasses.replace(conversation, messages=turns)) == render(conversation)
    except ValueError:  # the template needs the call
        return False


def _contains(text: str, words: str) -> bool:
    """Whether the text contains all words, in order; tags and line breaks may differ."""
    if words.strip() in text:
        return True
    position = 0
    for piece in _BREAKS.split(words):
        if piece.strip():
            position = text.find(piece.strip(), position)
            if position < 0:
                return False
            position += len(piece.strip())
    return True


def _is_same(conversation: Conversation, names: set[str], render: Render, text: str, as_user: bool = False) -> bool:
    """Whether the text is the same without these fields; with `as_user`, with turns of these roles as the user's."""

    def without(message: Message) -> Message:
        if as_user:
            return {**message, "role": "user"} if message["role"] in names else message
        return {name: value for name, value in message.items() if name not in names}

    turns = [without(message) for message in conversation.messages]
    tools = None if "tools" in names else conversation.tools
    try:
        return render(dataclasses.replace(conversation, messages=turns, tools=tools)) == text
    except ValueError:  # the template needs a field
        return False
