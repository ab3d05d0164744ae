"""Control tokens inside data: found in the turns of a row, and followed through the chat template."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from kd_lightning.data.conversation import Conversation, Message, text_of

_FIRST_MARK = 0xF0000  # a plane of private characters, in which no text is written
Units = set[tuple[int, str]]


@dataclasses.dataclass(frozen=True)
class Marked:
    """A conversation whose control tokens are single private characters.

    Args:
        conversation: the same turns, with a private character instead of each control token.
        tokens: the token of each private character.
    """

    conversation: Conversation
    tokens: dict[str, str]

    def restore(self, text: str, spans: list[tuple[int, int]]) -> tuple[str, list[tuple[int, int]], list[Any]]:
        """The rendered text with the control tokens, the spans in it, and the ranges of these tokens."""
        pieces, ranges, shifts = [], [], []
        grown = end = 0
        for match in re.finditer(f"[{''.join(self.tokens)}]", text):
            token = self.tokens[match.group()]
            pieces += [text[end : match.start()], token]
            ranges.append((match.start() + grown, match.start() + grown + len(token)))
            end = match.end()
            grown += len(token) - 1
            shifts.append((end, grown))
        moved = [tuple(edge + max((g for at, g in shifts if at <= edge), default=0) for edge in span) for span in spans]
        return "".join([*pieces, text[end:]]), [(start, stop) for start, stop in moved], ranges


class ControlTokens:
    """The special tokens of a tokenizer: in data they are words, only those of the chat template are tokens.

    Args:
        tokenizer: a Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._names = sorted({*special, *tokenizer.all_special_tokens} - {""}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self._names)) or "$^")

    def ranges(self, text: str) -> list[tuple[int, int]]:
        """(start, end) of each control token in a plain text."""
        return [match.span() for match in self._pattern.finditer(text)]

    def mark(self, conversation: Conversation, render: Callable[[Conversation], str]) -> Marked | None:
        """Replace the control tokens in the turns; None if there are none.

        A token of an assistant's turn that the template itself reads (it splits answers at `</think>`) stays one.

        Args:
            conversation: turns.
            render: the text of a conversation; a ValueError if the template refuses it.

        Raises:
            ValueError: the template renders another text without a token of another turn.
        """
        units = self._units(conversation)
        if not units:
            return None
        first = _FIRST_MARK
        words = conversation.dump()
        while any(chr(first + number) in words for number in range(len(self._names))):
            first += len(self._names)
        marks = {name: chr(first + number) for number, name in enumerate(self._names)}
        tokens = {mark: name for name, mark in marks.items()}
        expected = render(conversation)

        def same(chosen: Units) -> bool:
            try:
                text = render(self._replaced(conversation, chosen, marks))
            except ValueError:
                return False
            return "".join(tokens.get(character, character) for character in text) == expected

        if not same(units):
            speaks = {n for n, turn in enumerate(conversation.messages) if turn["role"] == "assistant"}
            units = {unit for unit in units if unit[0] not in speaks or same({unit})}
            if not same(units):
                names = ", ".join(sorted({name for _, name in units}))
                raise ValueError(
                    f"the chat template reads the control tokens {names} in a turn that is not the assistant's: "
                    "remove them, or allow them with data.allow_special_tokens=true"
                )
        return Marked(self._replaced(conversation, units, marks), tokens) if units else None

    def _units(self, conversation: Conversation) -> Units:
        """Index of the turn (-1: tools and variables) and name of the control tokens in it."""
        turns = enumerate([_joined(message) for message in conversation.messages])
        inside = [*turns, (-1, conversation.tools), (-1, conversation.template_kwargs)]
        return {(n, name) for n, value in inside for text in _texts(value) for name in self._pattern.findall(text)}

    def _replaced(self, conversation: Conversation, units: Units, marks: dict[str, str]) -> Conversation:
        def replaced(value: Any, turn: int) -> Any:
            chosen = {name for n, name in units if n == turn}
            return _mapped(value, lambda text: self._pattern.sub(lambda match: _mark(match, chosen, marks), text))

        turns = [
            replaced(_joined(message), n) if any(n == turn for turn, _ in units) else message
            for n, message in enumerate(conversation.messages)
        ]
        tools, variables = replaced(conversation.tools, -1), replaced(conversation.template_kwargs, -1)
        return dataclasses.replace(conversation, messages=turns, tools=tools, template_kwargs=variables)


def _mark(match: re.Match[str], chosen: set[str], marks: dict[str, str]) -> str:
    return marks[match.group()] if match.group() in chosen else match.group()


def _joined(message: Message) -> Message:
    """The turn with its text parts as one, since a token may begin in one part and end in the next."""
    content = message.get("content")
    if not isinstance(content, list) or len(content) < 2:
        return message
    return {**message, "content": [{"type": "text", "text": text_of(message)}]}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(name): _mapped(inner, change) for name, inner in value.items()}
    return [_mapped(inner, change) for inner in value] if isinstance(value, list) else value
