"""Whether a chat template asks for an answer in the way in which answers are trained, and which variable mends it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from os.path import commonprefix

from kd_lightning.data.conversation import Conversation
from kd_lightning.data.text.text_tokenizer import TextTokenizer

COMPARED = 20
"""Conversations that are looked at."""
_SHOWN = 60  # characters of a prompt in the message
_NAME = re.compile(r"\b[a-z_][a-z0-9_]*\b")
_ANSWER = {"role": "assistant", "content": "yes"}


def prompt_notice(text: TextTokenizer, conversations: Sequence[Conversation]) -> str | None:
    """How the generation prompt differs from what stands before the answers in training; None if it does not.

    Args:
        text: how rows become tokens.
        conversations: the first `COMPARED` are looked at; those without an answer get a short one.
    """
    turns = [_answered(conversation) for conversation in conversations[:COMPARED] if conversation.messages]
    differing = [(turn, found) for turn in turns if (found := _difference(text, turn)) is not None]
    if not differing:
        return None
    trained, asked = differing[0][1]
    notice = (
        f"{len(differing)} of {len(turns)} answers stand behind {trained!r} in training, where the generation prompt "
        f"has {asked!r}: rows with an answer are asked with the former, but `generate` and servers use the latter"
    )
    mended = _mending_variable(text, [turn for turn, _ in differing])
    if mended is None:
        return f"{notice}: pass another data.chat_template if they must agree"
    return f"{notice}: set data.chat_template_kwargs.{mended}, and pass the same chat_template_kwargs to them"


def _answered(conversation: Conversation) -> Conversation:
    if not conversation.empty:
        return conversation
    messages = [*conversation.messages, _ANSWER]
    return dataclasses.replace(conversation, messages=messages, first=len(messages) - 1, unlearned=[])


def _difference(text: TextTokenizer, conversation: Conversation) -> tuple[str, str] | None:
    """The ends of the two prompts, from the first character that differs."""
    try:
        asked, _ = text.chat.prompt(conversation)
        found = text.trained_prompt(conversation, asked)
    except ValueError:  # a template may refuse a part of a conversation, or the short answer
        return None
    if found is None:
        return None
    common = len(commonprefix([found[0], asked]))  # noqa: RUF071 - characters are meant
    return found[0][common:][-_SHOWN:], asked[common:][-_SHOWN:]


def _mending_variable(text: TextTokenizer, conversations: Sequence[Conversation]) -> str | None:
    """`NAME=VALUE` of a variable of the template with which the two prompts agree."""
    source = str(text.chat_template or text.tokenizer.chat_template)
    given = text.template_kwargs or {}
    names = [name for name in dict.fromkeys(_NAME.findall(source)) if "think" in name or "reason" in name]
    others = [name for name in dict.fromkeys(_NAME.findall(source)) if f"{name} is defined" in source]
    for name in dict.fromkeys([*names, *others]):
        for value in (False, True):
            changed = dataclasses.replace(text, template_kwargs={**given, name: value})
            if all(_agrees(changed, conversation) for conversation in conversations):
                return f"{name}={str(value).lower()}"
    return None


def _agrees(text: TextTokenizer, conversation: Conversation) -> bool:
    try:
        asked, _ = text.chat.prompt(conversation)
        return text.trained_prompt(conversation, asked) is None and text.chat.locate(conversation).last
    except ValueError:
        return False
