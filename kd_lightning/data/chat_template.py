"""Chat templates: conversations -> text, and where in it the assistant speaks."""

from __future__ import annotations

import dataclasses
import re
from os.path import commonprefix
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from kd_lightning.data.conversation import Conversation, Message

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For tokenizers that have no template: `User: … Assistant: …`, each answer ended by the end-of-sequence token."""

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_STAND_IN = "qzStandInzq"


@dataclasses.dataclass(frozen=True)
class Located:
    """A conversation as text, with the spans of characters that count.

    Args:
        text: the whole conversation.
        spans: (start, end) of the assistant's words with their end of turn, in order.
        unlocated: number of turns whose words could not be found for certain.
        open: whether the text ends right after an answer, without any end of turn.
    """

    text: str
    spans: list[tuple[int, int]]
    unlocated: int = 0
    open: bool = False


class ChatTemplate:
    """Renders conversations, and finds the assistant's words in them by what is certain.

    The words of a turn are what lies between the two parts of the text that stay the same when a stand-in takes the
    turn's place. So nothing is assumed of a template: it may drop the thoughts of earlier turns, trim, or add text of
    its own. Where the turn is no such insertion (thoughts laid out anew), the words run from the generation prompt to
    the end of the turn, if the conversation truly goes on from that prompt. Else they are not located.

    Args:
        tokenizer: its own template is used where `template` is None.
        template: a Jinja chat template.
        template_kwargs: variables for the template, the same for every row.
    """

    def __init__(
        self, tokenizer: Any, template: str | None = None, template_kwargs: dict[str, Any] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.template_kwargs = template_kwargs or {}
        specials = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} - {tokenizer.bos_token, ""}
        longest_first = sorted(specials, key=len, reverse=True)
        self._special = re.compile("|".join(re.escape(token) for token in longest_first) or "$^")

    def prompt(self, conversation: Conversation) -> str:
        """The text a model answers: everything before the last answer, with the generation prompt.

        Raises:
            ValueError: the template refuses the conversation.
        """
        return self._render(conversation, conversation.question, ask=True)

    def written(self, conversation: Conversation) -> str | None:
        """The text of all turns; None where the template refuses the conversation."""
        return self._try(conversation, conversation.messages)

    def locate(self, conversation: Conversation) -> Located:
        """The text, and where the answers are.

        Raises:
            ValueError: the template refuses the conversation.
        """
        messages = conversation.messages
        marked = self._marked(conversation)
        if marked is not None:
            return marked
        text = self._render(conversation, messages)
        found = [self._find(conversation, turn, text) for turn in conversation.answer_turns]
        spans = [span for span in found if span is not None]
        is_open = bool(found) and found[-1] is not None and self._is_open(text, found[-1])
        is_open = is_open and not self._tail(conversation, conversation.answer_turns[-1]).strip()
        return Located(text, spans, unlocated=len(found) - len(spans), open=is_open)

    # ------------------------------------------------------------------------------------------------------- helpers
    def _render(self, conversation: Conversation, messages: list[Message], ask: bool = False) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tools=conversation.tools,
                    chat_template=self.template,
                    add_generation_prompt=ask,
                    tokenize=False,
                    **self._variables(conversation),
                )
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise ValueError(f"the chat template refuses this row: {' '.join(str(error).split())}") from None

    def _variables(self, conversation: Conversation) -> dict[str, Any]:
        return {**self.template_kwargs, **(conversation.template_kwargs or {})}

    def _try(self, conversation: Conversation, messages: list[Message], ask: bool = False) -> str | None:
        try:
            return self._render(conversation, messages, ask) if messages else ""
        except ValueError:  # a template may refuse a part of a conversation that it takes as a whole
            return None

    def _around(self, conversation: Conversation, messages: list[Message], turn: int) -> tuple[str, str] | None:
        """The text before and after the words of a turn, when a stand-in says them."""
        content: Any = messages[turn].get("content")
        content = [{"type": "text", "text": _STAND_IN}] if isinstance(content, list) else _STAND_IN
        stand_in = [*messages[:turn], {"role": "assistant", "content": content}, *messages[turn + 1 :]]
        text = self._try(conversation, stand_in)
        if text is None or text.count(_STAND_IN) != 1:
            return None
        before, _, after = text.partition(_STAND_IN)
        return before, after

    def _tail(self, conversation: Conversation, turn: int) -> str:
        """What the template writes after the words of a turn that is the last one."""
        around = self._around(conversation, conversation.messages[: turn + 1], turn)
        return around[1] if around else ""

    def _find(self, conversation: Conversation, turn: int, text: str) -> tuple[int, int] | None:
        messages = conversation.messages
        around = self._around(conversation, messages, turn)
        if around is not None:
            before, after = around
            end = len(text) - len(after)
            if text.startswith(before) and text.endswith(after) and text[len(before) : end].strip():
                return len(before), end + self._end_of_turn(self._tail(conversation, turn), after)
        prompt = self._try(conversation, messages[:turn], ask=True)
        if prompt is None or not text.startswith(prompt):
            prompt = around[0] if around and text.startswith(around[0]) else None
        if prompt is None:
            return None
        if around is not None and text.endswith(around[1]) and len(prompt) < len(text) - len(around[1]):
            end = len(text) - len(around[1])
            return len(prompt), end + self._end_of_turn(self._tail(conversation, turn), around[1])
        whole = self._try(conversation, messages[: turn + 1])
        if whole is None or not text.startswith(whole) or not self._special.sub("", whole[len(prompt) :]).strip():
            return None  # the end of a turn alone is nothing that was said
        return len(prompt), len(whole.rstrip())

    def _end_of_turn(self, tail: str, rest: str) -> int:
        """How many characters of `rest` (all that follows the words of a turn) still belong to the turn's end.

        `tail` is what follows the words when nothing else is said: the end of turn is what the two have in common, up
        to its last special token, or without trailing blanks where it has none.
        """
        common = tail if rest.startswith(tail) else commonprefix([tail, rest])  # noqa: RUF071 - characters are meant
        ends = [match.end() for match in self._special.finditer(common)]
        if ends:
            return ends[-1]
        return len(tail.rstrip()) if rest.startswith(tail.rstrip()) else 0

    def _is_open(self, text: str, span: tuple[int, int]) -> bool:
        """Whether nothing follows the last answer, and nothing in it ends the turn."""
        return not text[span[1] :].strip() and not self._ends_turn(text[slice(*span)])

    def _ends_turn(self, span: str) -> bool:
        return any(match.end() == len(span.rstrip()) for match in self._special.finditer(span.rstrip()))

    def _marked(self, conversation: Conversation) -> Located | None:
        """By the template's own marks, `{% generation %}`; None where it has none, or they do not fit the turns."""
        template = self.tokenizer.get_chat_template(self.template, conversation.tools)
        if not _MARKS.search(template):
            return None
        variables = {**self.tokenizer.special_tokens_map, **self._variables(conversation)}
        try:
            rendered: Any = render_jinja_template(
                conversations=[conversation.messages],
                tools=conversation.tools,
                chat_template=template,
                return_assistant_tokens_mask=True,
                **variables,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise ValueError(f"the chat template refuses this row: {' '.join(str(error).split())}") from None
        text, marks = str(rendered[0][0]), rendered[1]
        spans = [(int(start), int(end)) for start, end in marks[0] if text[int(start) : int(end)].strip()]
        turns = conversation.answer_turns
        speakers = [n for n, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        if len(spans) == len(speakers):
            spans = [span for span, turn in zip(spans, speakers, strict=True) if turn in turns]
        elif len(turns) != len(speakers):
            return None
        tail = self._tail(conversation, speakers[-1])
        closed = []
        for start, end in spans:
            if not self._ends_turn(text[start:end]):
                end += self._end_of_turn(tail, text[end:])
            closed.append((start, end))
        is_open = bool(closed) and self._is_open(text, closed[-1])
        return Located(text, closed, unlocated=max(0, len(turns) - len(closed)), open=is_open)
