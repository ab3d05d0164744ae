"""Chat templates: conversations -> text, and the character spans of the assistant's answers in it."""

from __future__ import annotations

import dataclasses
import re
from contextlib import AbstractContextManager
from datetime import datetime
from os.path import commonprefix
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from kd_lightning.data.conversation import Conversation, Message
from kd_lightning.data.text.control_tokens import ControlTokens, Marked
from kd_lightning.data.text.left_out import unread_fields, words_left_out
from kd_lightning.data.text.message_forms import MessageForms, with_argument_texts
from kd_lightning.data.text.rendering import EndlessTemplateError, refusals

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For tokenizers without a template: `User: … Assistant: …`; each answer ends with the end-of-sequence token."""

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PLACEHOLDER = "qzStandInzq"


@dataclasses.dataclass(frozen=True)
class Located:
    """A conversation as text, with the character spans of the answers.

    Args:
        text: the whole conversation.
        spans: (start, end) of each answer of the assistant with its end of turn, in order.
        unlocated: number of answers whose position is not certain.
        open: whether the text ends directly after an answer, without any end of turn.
        plain: (start, end) of the control tokens that stand in the data: words, not tokens.
        last: whether the last span is that of the last answer.
        left_out: number of located answers that say something which the text does not contain.
        unread: names of the fields that do not change the text, once for each turn that has them.
    """

    text: str
    spans: list[tuple[int, int]]
    unlocated: int = 0
    open: bool = False
    plain: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    last: bool = False
    left_out: int = 0
    unread: list[str] = dataclasses.field(default_factory=list)


class ChatTemplate:
    """Renders conversations, and locates the assistant's answers in the text.

    The conversation is rendered a second time with a placeholder instead of an answer: the answer is the text between
    the two parts that both renderings share. So nothing is assumed about a template: it may drop the reasoning of
    earlier turns, trim, or add its own text. If the answer is not such an insertion (the template rearranges the
    reasoning), it reaches from the generation prompt to the end of the turn, provided that the conversation continues
    from that prompt. Otherwise the answer is not located and has no labels.

    Args:
        tokenizer: its own template is used if `template` is None.
        template: a Jinja chat template.
        template_kwargs: variables for the template, the same for every row.
        allow_special_tokens: control tokens inside the rows are tokens; False: they are words.
        now: the date that the template writes; None: today's.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        template_kwargs: dict[str, Any] | None = None,
        allow_special_tokens: bool = False,
        now: datetime | None = None,
    ) -> None:
        self.now = now
        self.tokenizer = tokenizer
        self.template = template
        self.template_kwargs = template_kwargs or {}
        specials = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} - {""}
        if tokenizer.bos_token != tokenizer.eos_token:  # GPT-2 and others have one token for both
            specials -= {tokenizer.bos_token}
        longest_first = sorted(specials, key=len, reverse=True)
        self._special = re.compile("|".join(re.escape(token) for token in longest_first) or "$^")
        self._forms = MessageForms(self._render_probe)
        self.control_tokens = None if allow_special_tokens else ControlTokens(tokenizer)

    def prompt(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The prompt of a model: everything before the last answer, with the generation prompt.

        Returns:
            the text, and (start, end) of the control tokens that stand in the data.

        Raises:
            ValueError: the template refuses the conversation.
        """
        question = dataclasses.replace(conversation, messages=conversation.question, unlearned=[])
        marked = self._mark(question, ask=True)
        if marked is None:
            return self._render(question, question.messages, ask=True), []
        text = self._render(marked.conversation, marked.conversation.messages, ask=True)
        text, _, plain = marked.restore(text, [])
        return text, plain

    def full_text(self, conversation: Conversation) -> str | None:
        """The text of all turns; None if the template refuses the conversation."""
        return self._try(conversation, conversation.messages)

    def locate(self, conversation: Conversation) -> Located:
        """The text, and the spans of the answers.

        Raises:
            ValueError: the template refuses the conversation.
        """
        marked = self._mark(conversation)
        if marked is None:
            return self._locate(conversation)
        found = self._locate(marked.conversation)
        text, spans, plain = marked.restore(found.text, found.spans)
        return dataclasses.replace(found, text=text, spans=spans, plain=plain)

    def _locate(self, conversation: Conversation) -> Located:
        by_tags = self._marked(conversation)
        if by_tags is None:
            text = self._render(conversation, conversation.messages)
            turns = conversation.answer_turns
            places = [self._find(conversation, turn, text) for turn in turns]
            spans = [span for span in places if span is not None]
            is_open = bool(places) and places[-1] is not None and self._is_open(text, places[-1])
            is_open = is_open and not self._tail(conversation, turns[-1]).strip()
            located = Located(text, spans, unlocated=len(places) - len(spans), open=is_open)
            answers = dict(zip(turns, places, strict=True))
        else:
            located = by_tags
            answers = dict(zip(conversation.answer_turns, located.spans, strict=False))
        spans_of_turns = list(answers.values())
        return dataclasses.replace(
            located,
            last=len(answers) == len(conversation.answer_turns) and spans_of_turns[-1:] == located.spans[-1:] != [],
            unread=unread_fields(conversation, self._render_all),
            left_out=sum(
                words_left_out(conversation, turn, located.text[slice(*span)], self._render_all)
                for turn, span in answers.items()
                if span is not None
            ),
        )

    def _render_all(self, conversation: Conversation) -> str:
        return self._render(conversation, conversation.messages)

    def _mark(self, conversation: Conversation, ask: bool = False) -> Marked | None:
        """The conversation with the control tokens of its turns replaced; None if there is nothing to replace."""
        if self.control_tokens is None:
            return None
        return self.control_tokens.mark(conversation, lambda turns: self._render(turns, turns.messages, ask))

    # ------------------------------------------------------------------------------------------------------- helpers
    def _render(self, conversation: Conversation, messages: list[Message], ask: bool = False) -> str:
        messages = self._forms(messages)
        try:
            return self._apply(conversation, messages, ask)
        except EndlessTemplateError:
            raise
        except ValueError as error:
            if not any(message.get("tool_calls") for message in messages):
                raise
            try:
                return self._apply(conversation, with_argument_texts(messages), ask)
            except ValueError:
                raise error from None

    def _apply(self, conversation: Conversation, messages: list[Message], ask: bool) -> str:
        with self._limits(conversation, messages):
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

    def _limits(self, conversation: Conversation, messages: list[Message]) -> AbstractContextManager[None]:
        return refusals([messages, conversation.tools, self._variables(conversation)], self.now)

    def _render_probe(self, messages: list[Message]) -> str:
        return self._apply(Conversation(messages=messages), messages, ask=False)

    def _source(self, tools: list[Any] | None = None) -> str:
        """The Jinja text of the template."""
        try:
            return self.tokenizer.get_chat_template(self.template, tools)
        except ValueError:  # plain rows need no template
            return ""

    def _variables(self, conversation: Conversation) -> dict[str, Any]:
        return {**self.template_kwargs, **(conversation.template_kwargs or {})}

    def _try(self, conversation: Conversation, messages: list[Message], ask: bool = False) -> str | None:
        try:
            return self._render(conversation, messages, ask) if messages else ""
        except EndlessTemplateError:
            raise
        except ValueError:  # a template may refuse a part of a conversation that it accepts in full
            return None

    def _around(self, conversation: Conversation, messages: list[Message], turn: int) -> tuple[str, str] | None:
        """The text before and after an answer, rendered with a placeholder instead of the answer."""
        content: Any = messages[turn].get("content")
        content = [{"type": "text", "text": _PLACEHOLDER}] if isinstance(content, list) else _PLACEHOLDER
        with_placeholder = [*messages[:turn], {"role": "assistant", "content": content}, *messages[turn + 1 :]]
        text = self._try(conversation, with_placeholder)
        if text is None or text.count(_PLACEHOLDER) != 1:
            return None
        before, _, after = text.partition(_PLACEHOLDER)
        return before, after

    def _tail(self, conversation: Conversation, turn: int) -> str:
        """The text that the template writes after an answer in the last turn."""
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
            return None  # the end of turn alone is not an answer
        return len(prompt), len(whole.rstrip())

    def _end_of_turn(self, tail: str, rest: str) -> int:
        """Number of characters of `rest`, the text that follows an answer, that belong to the end of the turn.

        `tail` is the text after the answer if it is the last turn: the end of turn is the common prefix of the two, up
        to its last special token, or without trailing blanks if it has none.
        """
        common = tail if rest.startswith(tail) else commonprefix([tail, rest])  # noqa: RUF071 - characters are meant
        ends = [match.end() for match in self._special.finditer(common)]
        if ends:
            return ends[-1]
        return len(tail.rstrip()) if rest.startswith(tail.rstrip()) else 0

    def _is_open(self, text: str, span: tuple[int, int]) -> bool:
        """Whether nothing follows the last answer, and it does not end with an end of turn."""
        return not text[span[1] :].strip() and not self._ends_turn(text[slice(*span)])

    def _ends_turn(self, span: str) -> bool:
        return any(match.end() == len(span.rstrip()) for match in self._special.finditer(span.rstrip()))

    def _marked(self, conversation: Conversation) -> Located | None:
        """By the template's `{% generation %}` tags; None if it has none, or they do not match the turns."""
        template = self._source(conversation.tools)
        if not _GENERATION_TAG.search(template):
            return None
        variables = {**self.tokenizer.special_tokens_map, **self._variables(conversation)}
        messages = self._forms(conversation.messages)
        with self._limits(conversation, messages):
            rendered: Any = render_jinja_template(
                conversations=[messages],
                tools=conversation.tools,
                chat_template=template,
                return_assistant_tokens_mask=True,
                **variables,
            )
        text, marked = str(rendered[0][0]), rendered[1]
        spans = [(int(start), int(end)) for start, end in marked[0] if text[int(start) : int(end)].strip()]
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
