"""Conversations -> token ids with a label mask, tokenized once and cached by `datasets`."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from kd_lightning.assets import resolve
from kd_lightning.data.chat_template import PLAIN_TEMPLATE, ChatTemplate
from kd_lightning.data.conversation import Conversation, parse_row
from kd_lightning.data.sources import cache_folder, fingerprint, read_rows
from kd_lightning.models.hf_adapter import backend_state, has_offsets
from kd_lightning.models.pretrained import RemoteCodeError, from_pretrained

VERSION = "2"
"""Changes when the same settings give other token ids or labels."""
CACHE_VERSION = "4"
"""Changes when the columns of the cached data sets do, or when a row is read in another way."""
INTEGERS = ("length", "full_length", "first_label", "unlocated", "excluded")
"""Columns of a tokenized row that hold one number."""
PARALLEL_ROWS = 20_000
"""Data sets with more rows are tokenized by several processes."""

Notice = Callable[[str], None]
Reader = Callable[..., Iterator[dict[str, Any]]]


def load_tokenizer(name: str | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder, hub name or `asset:` name; a loaded tokenizer is returned as it is.

    Raises:
        ValueError: there is no tokenizer under that name.
    """
    if not isinstance(name, str):
        return name
    path = resolve(name)
    try:
        tokenizer: PreTrainedTokenizerBase = from_pretrained("tokenizer", path)
    except RemoteCodeError as error:
        raise ValueError(f"tokenizer: {error}") from None
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = "the folder holds no tokenizer" if os.path.isdir(path) else "no such folder"
        detail = " ".join(str(error).split())[:160]
        raise ValueError(f"tokenizer: {name!r} cannot be loaded ({reason}): {detail}") from None
    return tokenizer


@dataclasses.dataclass(frozen=True)
class TextTokenizer:
    """Turns conversations into token ids; the same settings give the same fingerprint.

    Args:
        tokenizer: a Hugging Face tokenizer.
        chat_template: a Jinja template instead of the tokenizer's own.
        template_kwargs: variables for the template.
        max_length: longest sequence in tokens; longer ones are truncated on the right.
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None = None
    template_kwargs: dict[str, Any] | None = None
    max_length: int = 512

    @functools.cached_property
    def chat(self) -> ChatTemplate:
        """The chat template these texts are rendered with."""
        return ChatTemplate(self.tokenizer, self.chat_template, self.template_kwargs)

    @property
    def first_ids(self) -> list[int]:
        """The token that the tokenizer puts before a plain text, if any."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and bos in self.tokenizer("a").input_ids[:1] else []

    def tokenize(self, conversation: Conversation, chat: ChatTemplate | None = None) -> dict[str, Any]:
        """Token ids of a conversation, which of them are labels, and figures for the report.

        Returns:
            `input_ids`, `label_mask`, `length`, `full_length`, `first_label` (-1: none), `unlocated`, `empty`,
            `excluded`.

        Raises:
            ValueError: the chat template refuses the conversation.
        """
        if conversation.empty:  # a template may refuse a conversation that ends with a question
            none: dict[str, Any] = {"input_ids": [], "label_mask": [], "length": 0, "full_length": 0, "unlocated": 0}
            return {**none, "first_label": -1, "empty": True, "excluded": conversation.excluded}
        eos = self.tokenizer.eos_token_id
        unlocated, ids = 0, []
        if conversation.messages:
            located = (chat or self.chat).locate(conversation)
            text, spans, unlocated, is_open = located.text, located.spans, located.unlocated, located.open
            text = text[: spans[-1][1]] if is_open else text  # the end of sequence follows the answer directly
        else:
            ids = self.first_ids
            text = conversation.prompt + conversation.completion
            spans = [(len(conversation.prompt), len(text))]
            is_open = not text.endswith(self.tokenizer.eos_token or "\0")
        label_mask = [False] * len(ids)
        for token, is_label in encode(self.tokenizer, text, spans):
            ids.append(token)
            label_mask.append(is_label)
        if is_open and eos is not None and any(label_mask):
            ids.append(eos)
            label_mask.append(True)
        if label_mask:
            label_mask[0] = False  # no position predicts the first token
        return {
            "input_ids": ids[: self.max_length],
            "label_mask": label_mask[: self.max_length],
            "length": min(len(ids), self.max_length),
            "full_length": len(ids),
            "first_label": label_mask.index(True) if any(label_mask) else -1,
            "unlocated": unlocated,
            "empty": False,
            "excluded": conversation.excluded,
        }

    def prompt(self, conversation: Conversation) -> tuple[str, list[int]]:
        """The text before the last answer, and its token ids; of a longer one the last `max_length`."""
        if conversation.messages:
            text, first = self.chat.prompt(conversation), []
        else:
            text, first = conversation.prompt, self.first_ids
        ids = first + self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
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
        ]
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def with_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None, notice: Notice) -> None:
    """Set the plain bundled chat template on a tokenizer without one (it is then exported with the student)."""
    if chat_template is not None or tokenizer.chat_template is not None:
        return
    first = "{{ bos_token }}" if TextTokenizer(tokenizer).first_ids else ""
    tokenizer.chat_template = first + PLAIN_TEMPLATE
    notice(
        "the tokenizer has no chat template: using a plain one, 'User: ... Assistant: ...'; "
        "pass chat_template for another"
    )


def encode(tokenizer: PreTrainedTokenizerBase, text: str, spans: list[tuple[int, int]]) -> Iterator[tuple[int, bool]]:
    """Token ids of a text, each with whether it is a label: whether it lies in one of the spans of characters.

    A token that extends beyond its span is a label only if the characters outside are blank; otherwise part of it
    belongs to another turn.
    """
    if not has_offsets(tokenizer):  # split the text where the spans begin and end
        edges = [0, *(edge for span in spans for edge in span), len(text)]
        for number, (start, end) in enumerate(itertools.pairwise(edges)):
            ids = tokenizer(text[start:end], add_special_tokens=False, verbose=False).input_ids if start < end else []
            yield from ((token, number % 2 == 1) for token in ids)
        return
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    reached, n = 0, 0
    for token, (start, end) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True):
        start = min(start, reached)  # blanks that the offsets leave out belong to the next token
        reached = max(reached, end)
        while n < len(spans) and spans[n][1] <= start:
            n += 1
        if n == len(spans) or end <= spans[n][0] or start == end:
            yield token, False
            continue
        outside = text[start : max(start, spans[n][0])] + text[min(end, spans[n][1]) : end]
        yield token, not outside.strip()


def prepare(sources: list[str], split: str, tokenizer: TextTokenizer, read: Reader | None = None) -> Any:
    """All rows of the sources, tokenized: a `datasets.Dataset` that is cached on disk by its fingerprint.

    Its columns are those of `TextTokenizer.tokenize`, and `row` (the fields, as JSON), `conversation` (as JSON),
    `location` (file and line) and `row_id` (the row's number among all rows).

    Args:
        sources: files, folders and names.
        split: which split of a folder or hub name.
        tokenizer: how rows become token ids.
        read: called with `split` and `sources`, yields these four columns; None: instructions and conversations.

    Raises:
        ValueError: a source or a row cannot be read, or the template refuses a row; the message has file and line.
    """
    return tokenize_rows(gather(read or read_conversations, split, {"sources": sources}), split, tokenizer)


def gather(
    read: Reader,
    split: str,
    files: dict[str, list[str]],
    texts: tuple[str, ...] = ("row", "conversation", "location"),
    **settings: Any,
) -> Any:
    """The rows that a function reads from files, cached on disk until the function, a file or a setting changes.

    Args:
        read: called with `split`, the files and the settings; yields the columns of `texts`, and `row_id`.
        split: which split of a folder or hub name.
        files: sources by the argument name of `read`.
        texts: names of the text columns.
        settings: other arguments of `read`.

    Raises:
        ValueError: raised by `read`.
    """
    import datasets  # type: ignore[import-untyped]

    stamps = {name: [fingerprint(source, split) for source in sources] for name, sources in files.items()}
    stamp = _digest([CACHE_VERSION, read.__name__, split, stamps, texts, settings])
    try:
        return datasets.Dataset.from_generator(
            read,
            features=datasets.Features(
                {**{name: datasets.Value("string") for name in texts}, "row_id": datasets.Value("int64")}
            ),
            gen_kwargs={"split": split, **{name: tuple(sources) for name, sources in files.items()}, **settings},
            cache_dir=cache_folder(),
            split=datasets.NamedSplit(split),
            fingerprint=stamp,
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise


def tokenize_rows(rows: Any, split: str, tokenizer: TextTokenizer) -> Any:
    """The rows with the columns of `TextTokenizer.tokenize` for their `conversation`, cached on disk.

    Raises:
        ValueError: the template refuses a row; the message has file and line.
    """
    import datasets

    integers = {name: datasets.Value("int32") for name in INTEGERS}
    return rows.map(
        _Tokenize(tokenizer),
        num_proc=min(os.cpu_count() or 1, 16) if len(rows) > PARALLEL_ROWS else None,
        features=datasets.Features(
            {
                **rows.features,
                "input_ids": datasets.List(datasets.Value("int32")),
                "label_mask": datasets.List(datasets.Value("bool")),
                **integers,
                "empty": datasets.Value("bool"),
            }
        ),
        new_fingerprint=_digest([rows._fingerprint, tokenizer.fingerprint()]),
        desc=f"Tokenizing {split}",
    )


def read_conversations(split: str, sources: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Columns of each row: `row` (the fields, as JSON), `conversation` (as JSON), `location`, `row_id`."""
    number = 0
    for source in sources:
        for location, row in read_rows(source, split):
            yield {
                "row": json.dumps(row, ensure_ascii=False, default=str),
                "conversation": parse_row(row, location).dump(),
                "location": location,
                "row_id": number,
            }
            number += 1


class _Tokenize:
    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer, self.chat = tokenizer, tokenizer.chat

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            return self.tokenizer.tokenize(Conversation.load(row["conversation"]), self.chat)
        except ValueError as error:
            raise ValueError(f"{row['location']}: {error}") from None


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
