"""Conversations -> token ids with a label mask."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from kd_lightning.data.chat_template import ChatTemplate, Located
from kd_lightning.data.conversation import ROLES, Conversation
from kd_lightning.data.text.encode import MARGIN, encode, encode_end, encode_part, encode_start
from kd_lightning.data.text.long_rows import MANY_TURNS, beginning, first_size
from kd_lightning.data.text.rendering import date_of, today
from kd_lightning.models.hf_adapter import backend_state

VERSION = "2"
"""Changes when the same settings give other token ids or labels."""
COUNTS = ("unlocated", "excluded", "left_out", "control_tokens")
"""Columns of a tokenized row that are summed up in the report."""
_WORD = re.compile(r"""["']([A-Za-z][\w-]{0,39})["']""")
_FIELDS = frozenset(
    "role content text type name function arguments parameters tools tool_calls reasoning_content".split()
)
Tokens = list[tuple[int, bool]]


@dataclasses.dataclass(frozen=True)
class TextTokenizer:
    """Turns conversations into token ids; the same settings give the same fingerprint.

    Args:
        tokenizer: a Hugging Face tokenizer.
        chat_template: a Jinja template instead of the tokenizer's own.
        template_kwargs: variables for the template.
        max_length: longest sequence in tokens; longer ones are truncated on the right.
        allow_special_tokens: special tokens inside the rows are tokens, for rows that are rendered already; False:
            they are words, and only those of the chat template are tokens.
        date: YYYY-MM-DD, for templates that write the date; None: today's.
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None = None
    template_kwargs: dict[str, Any] | None = None
    max_length: int = 512
    allow_special_tokens: bool = False
    date: str | None = None

    @functools.cached_property
    def chat(self) -> ChatTemplate:
        """The chat template these texts are rendered with."""
        now = None if self.date is None else date_of(self.date)
        return ChatTemplate(self.tokenizer, self.chat_template, self.template_kwargs, self.allow_special_tokens, now)

    @property
    def own_roles(self) -> tuple[str, ...]:
        """Words that the chat template has as strings, apart from usual roles and fields: roles that it may know."""
        words = set(_WORD.findall(str(self.chat_template or self.tokenizer.chat_template)))
        return tuple(sorted(words - ROLES.keys() - _FIELDS))

    @property
    def written_date(self) -> str | None:
        """The date that the chat template writes; None if it writes none."""
        writes = "strftime_now" in str(self.chat_template or self.tokenizer.chat_template)
        return (self.date or today()) if writes else None

    @property
    def first_ids(self) -> list[int]:
        """The token that the tokenizer puts before a plain text, if any."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and bos in self.tokenizer("a").input_ids[:1] else []

    def tokenize(self, conversation: Conversation, chat: ChatTemplate | None = None) -> dict[str, Any]:
        """Token ids of a conversation, which of them are labels, and figures for the report.

        Returns:
            `input_ids`, `label_mask`, `length`, `full_length` (at least so many tokens), `first_label` (-1: none),
            `empty`, `unread` and the counts of `COUNTS`.

        Raises:
            ValueError: the chat template refuses the conversation.
        """
        if conversation.empty:  # a template may refuse a conversation that ends with a question
            none: dict[str, Any] = {"input_ids": [], "label_mask": [], "length": 0, "full_length": 0, "first_label": -1}
            return {**none, **dict.fromkeys(COUNTS, 0), "excluded": conversation.excluded, "unread": [], "empty": True}
        if conversation.messages:
            ids: list[int] = []
            located, found, is_whole = self._turns(conversation, chat or self.chat)
        else:
            ids, located = self.first_ids, self._plain(conversation)
            found, is_whole = self._encoded(located)
        label_mask = [False] * len(ids)
        ids += [token for token, _ in found]
        label_mask += [is_label for _, is_label in found]
        eos = self.tokenizer.eos_token_id
        if located.open and eos is not None and any(label_mask) and is_whole:
            ids.append(eos)
            label_mask.append(True)
        if label_mask:
            label_mask[0] = False  # no position predicts the first token
        beyond = len(ids) if located.spans and not is_whole else -1  # the first label is none of these tokens
        return {
            "input_ids": ids[: self.max_length],
            "label_mask": label_mask[: self.max_length],
            "length": min(len(ids), self.max_length),
            "full_length": len(ids),
            "first_label": label_mask.index(True) if any(label_mask) else beyond,
            "unlocated": located.unlocated,
            "excluded": conversation.excluded,
            "left_out": located.left_out,
            "control_tokens": len(located.plain),
            "unread": located.unread,
            "empty": False,
        }

    def document(self, text: str) -> tuple[list[int], int]:
        """All token ids of a raw text, and how many control tokens in it are encoded as words.

        The text follows the token that the tokenizer puts before plain texts, and ends with the end of sequence, if the
        tokenizer has these.
        """
        located = self._plain(Conversation(completion=text))
        ids = [*self.first_ids, *(token for token, _ in encode(self.tokenizer, text, (), located.plain))]
        eos = self.tokenizer.eos_token_id
        return ([*ids, eos] if located.open and eos is not None else ids), len(located.plain)

    def _turns(self, conversation: Conversation, chat: ChatTemplate) -> tuple[Located, Tokens, bool]:
        """The text with its answers, its tokens as of `encode_start`, and whether these are all of them.

        Of many more turns than `max_length` tokens can hold, only the first ones are located.
        """
        size = MANY_TURNS + 16 * self.max_length
        first_turns = beginning(conversation, 2 * size)
        if first_turns is not None:
            located, whole = chat.locate(first_turns), chat.full_text(conversation)
            text = located.text[:size]
            found = encode_part(self.tokenizer, text, located.spans, located.plain, self.max_length)
            if found is not None and whole is not None and whole.startswith(text):
                return located, found, False
        located = chat.locate(conversation)
        return located, *self._encoded(located)

    def _encoded(self, located: Located) -> tuple[Tokens, bool]:
        # the end of sequence follows an open answer directly
        text = located.text[: located.spans[-1][1]] if located.open else located.text
        return encode_start(self.tokenizer, text, located.spans, located.plain, self.max_length)

    def _plain(self, conversation: Conversation) -> Located:
        """A prompt and its completion without a template; an end of sequence that is there already is not doubled."""
        text, eos = conversation.prompt + conversation.completion, self.tokenizer.eos_token
        spans = [(len(conversation.prompt), len(text))]
        is_open = not text.endswith(eos or "\0")
        control = self.chat.control_tokens
        plain = control.ranges(text) if control else []
        return Located(text, spans, open=is_open, plain=plain if is_open or not plain else plain[:-1])

    def prompt(self, conversation: Conversation) -> tuple[str, list[int]]:
        """The text before the last answer, and its token ids; of a longer one the last `max_length`.

        It ends with the generation prompt, or with what stands before the answer in training if that is another text.
        """
        if conversation.messages:
            first: list[int] = []
            text, plain = self.chat.prompt(conversation)
            if (trained := self.trained_prompt(conversation, text)) is not None:
                return trained
        elif conversation.prompt[-1:].isspace() and not conversation.empty:  # the blank belongs to the first word
            text, located = conversation.prompt, self._plain(conversation)
            ids = self.first_ids + self._ids_before(len(text), located)
            return text, ids[-self.max_length :]
        else:
            text, first = conversation.prompt, self.first_ids
            control = self.chat.control_tokens
            plain = control.ranges(text) if control else []
        ids = first + encode_end(self.tokenizer, text, plain, self.max_length)
        return text, ids[-self.max_length :]

    def trained_prompt(self, conversation: Conversation, asked: str) -> tuple[str, list[int]] | None:
        """What stands before the last answer in training, as text and token ids; of a longer one the last `max_length`.

        Args:
            conversation: turns.
            asked: their text with the generation prompt instead of the last answer.

        Returns:
            None if it is the same as `asked`, and if it is not known: there is no answer, or it is not located.
        """
        if conversation.empty:
            return None
        last_turn = conversation.answer_turns[-1]
        located = self.chat.locate(dataclasses.replace(conversation, first=last_turn))
        if not located.last or located.text[: located.spans[-1][0]].rstrip() == asked.rstrip():
            return None
        start = located.spans[-1][0]
        return located.text[:start], self._ids_before(start, located)[-self.max_length :]

    def _ids_before(self, start: int, located: Located) -> list[int]:
        """Token ids before the answer that starts at this character, as they are in the whole text."""
        cut = max(0, start - first_size(self.max_length))
        end = min(len(located.text), start + MARGIN)  # a token may have the end of the prompt and the first word
        plain = [(a - cut, b - cut) for a, b in located.plain if a >= cut and b <= end]
        tokens = encode(self.tokenizer, located.text[cut:end], [(start - cut, end - cut)], plain)
        return [token for token, _ in itertools.takewhile(lambda pair: not pair[1], tokens)]

    def fingerprint(self) -> str:
        """A digest of everything that the token ids depend on."""
        inner = backend_state(self.tokenizer) or json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        settings = [
            VERSION,
            type(self.tokenizer).__name__,
            inner,
            {name: str(value) for name, value in self.tokenizer.special_tokens_map.items()},
            self.chat_template or self.tokenizer.chat_template,
            self.template_kwargs,
            self.max_length,
            *(["special tokens"] if self.allow_special_tokens else []),
            *([] if self.written_date is None else [self.written_date]),
        ]
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
