"""Conversations -> token ids with a label mask."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from kd_lightning.data.chat_template import ChatTemplate, Located
from kd_lightning.data.conversation import Conversation
from kd_lightning.data.text.encode import encode_end, encode_part, encode_start
from kd_lightning.data.text.long_rows import MANY_TURNS, beginning
from kd_lightning.models.hf_adapter import backend_state

VERSION = "2"
"""Changes when the same settings give other token ids or labels."""
COUNTS = ("unlocated", "excluded", "left_out", "control_tokens")
"""Columns of a tokenized row that are summed up in the report."""
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
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None = None
    template_kwargs: dict[str, Any] | None = None
    max_length: int = 512
    allow_special_tokens: bool = False

    @functools.cached_property
    def chat(self) -> ChatTemplate:
        """The chat template these texts are rendered with."""
        return ChatTemplate(self.tokenizer, self.chat_template, self.template_kwargs, self.allow_special_tokens)

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
        """The text before the last answer, and its token ids; of a longer one the last `max_length`."""
        if conversation.messages:
            first: list[int] = []
            text, plain = self.chat.prompt(conversation)
        else:
            text, first = conversation.prompt, self.first_ids
            control = self.chat.control_tokens
            plain = control.ranges(text) if control else []
        ids = first + encode_end(self.tokenizer, text, plain, self.max_length)
        return text, ids[-self.max_length :]

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
        ]
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
