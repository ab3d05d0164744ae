"""The forms of a turn that a chat template expects: content as a string or as parts, and what no content is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from kd_lightning.data.conversation import Message, text_of, with_objects
from kd_lightning.data.text.rendering import EndlessTemplateError

PROBE = "qzProbeInzq"
_PART_AS_TEXT = re.compile(r"""["']type["']\s*:\s*["']text["']""")


class MessageForms:
    """Adapts turns to one chat template.

    A list of text parts becomes one string, unless the template reads parts; a string becomes a part if the template
    reads parts alone. Arguments of tool calls are objects. A turn without content has an empty string:
    many templates concatenate it, and `apply_chat_template` takes None for an absent field.

    Args:
        render: renders turns with the template; a ValueError if it refuses them.
    """

    def __init__(self, render: Callable[[list[Message]], str]) -> None:
        self._render = render
        self._reads: dict[tuple[str, bool], bool] = {}

    def __call__(self, messages: list[Message]) -> list[Message]:
        """The same turns as the template expects them.

        Raises:
            ValueError: the arguments of a tool call are not a JSON object.
        """
        return [self._adapt(with_objects(message)) for message in messages]

    def _adapt(self, message: Message) -> Message:
        content = message.get("content")
        if content is None:
            return {**message, "content": ""}
        role, is_list = message["role"], isinstance(content, list)
        if is_list and not self._reads_content(role, parts=True):
            return {**message, "content": text_of(message)}
        if content and not is_list and not self._reads_content(role, parts=False):
            return {**message, "content": as_parts(content)} if self._reads_content(role, parts=True) else message
        return message

    def _reads_content(self, role: str, parts: bool) -> bool:
        """Whether the template prints the content of a turn of this role, given as a string or as parts."""
        if (role, parts) not in self._reads:
            turn = {"role": role, "content": as_parts(PROBE) if parts else PROBE}
            question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
            around = {"user": ([], []), "system": ([], [question]), "assistant": ([question], [])}
            before, after = around.get(role, ([question, answer], []))
            try:
                text = self._render([*before, turn, *after])
            except EndlessTemplateError:
                raise
            except ValueError:  # unknown: then a string is the usual form
                text = "" if parts else PROBE
            self._reads[role, parts] = PROBE in text and not _PART_AS_TEXT.search(text)
        return self._reads[role, parts]


def as_parts(text: str) -> list[dict[str, str]]:
    """A string as a list with one text part."""
    return [{"type": "text", "text": text}]


def with_argument_texts(messages: list[Message]) -> list[Message]:
    """The turns with the arguments of their tool calls as JSON text, for a template that refuses objects."""
    return [
        {**message, "tool_calls": [_argument_text(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _argument_text(call: dict[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _argument_text(call["function"])}
    arguments = call.get("arguments")
    return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)} if isinstance(arguments, dict) else call
