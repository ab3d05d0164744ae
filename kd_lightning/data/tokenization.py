"""Rows of files -> token ids with a label mask, tokenized once and cached by `datasets`; loading a tokenizer."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from kd_lightning.assets import resolve
from kd_lightning.data.chat_template import PLAIN_TEMPLATE
from kd_lightning.data.conversation import Conversation, parse_row, template_roles
from kd_lightning.data.sources import cache_folder, fingerprint, read_rows
from kd_lightning.data.text.text_tokenizer import COUNTS, TextTokenizer
from kd_lightning.models.pretrained import RemoteCodeError, from_pretrained

CACHE_VERSION = "5"
"""Changes when the columns of the cached data sets do, or when a row is read in another way."""
PARALLEL_ROWS = 20_000
"""Data sets with more rows are tokenized by several processes."""

Notice = Callable[[str], None]
Reader = Callable[..., Iterator[dict[str, Any]]]


def load_tokenizer(name: str | PreTrainedTokenizerBase, argument: str = "tokenizer") -> PreTrainedTokenizerBase:
    """A tokenizer from a folder, hub name or `asset:` name; a loaded tokenizer is returned as it is.

    Args:
        name: of the tokenizer.
        argument: that the user has set, for messages.

    Raises:
        ValueError: there is no tokenizer under that name.
    """
    if not isinstance(name, str):
        return name
    path = resolve(name)
    try:
        tokenizer: PreTrainedTokenizerBase = from_pretrained("tokenizer", path)
    except RemoteCodeError as error:
        raise ValueError(f"{argument}: {error}") from None
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = "the folder holds no tokenizer" if os.path.isdir(path) else "no such folder"
        detail = " ".join(str(error).split())[:160]
        raise ValueError(f"{argument}: {name!r} cannot be loaded ({reason}): {detail}") from None
    return tokenizer


def masked_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token id of padding; an added padding token may have no row in the embeddings, then that of another token."""
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is None or pad >= tokenizer.vocab_size:
        return min(int(token) for token in (pad, eos, 0 if eos is None else eos) if token is not None)
    return int(pad)


def with_template(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None, notice: Notice, subject: str = "the tokenizer"
) -> PreTrainedTokenizerBase:
    """A tokenizer whose own chat template, which is exported with the student, is the one that is used.

    Args:
        tokenizer: gets the plain bundled template if it has none and `chat_template` is None; a copy of it is returned
            with another `chat_template`.
        chat_template: a Jinja template instead of the tokenizer's own.
        notice: called with a line about the bundled template.
        subject: what the tokenizer is called in that line.
    """
    if chat_template is not None:
        if tokenizer.chat_template != chat_template:
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.chat_template = chat_template
        return tokenizer
    if tokenizer.chat_template is not None:
        return tokenizer
    first = "{{ bos_token }}" if TextTokenizer(tokenizer).first_ids else ""
    tokenizer.chat_template = first + PLAIN_TEMPLATE
    notice(
        f"{subject} has no chat template: using a plain one, 'User: ... Assistant: ...'; pass "
        f"{'teacher_' if 'teacher' in subject else ''}chat_template for another"
    )
    return tokenizer


def gather(
    read: Reader,
    split: str,
    files: dict[str, list[str]],
    texts: tuple[str, ...] = ("row", "conversation", "location"),
    roles: Sequence[str] = (),
    **settings: Any,
) -> Any:
    """The rows that a function reads from files, cached on disk until the function, a file or a setting changes.

    Args:
        read: called with `split`, the files and the settings; yields the columns of `texts`, and `row_id`.
        split: which split of a folder or hub name.
        files: sources by the argument name of `read`.
        texts: names of the text columns.
        roles: roles of the chat template that rows may have, in addition to the usual ones.
        settings: other arguments of `read`.

    Raises:
        ValueError: raised by `read`.
    """
    import datasets  # type: ignore[import-untyped]

    stamps = {name: [fingerprint(source, split) for source in sources] for name, sources in files.items()}
    stamp = json_digest([CACHE_VERSION, read.__name__, split, stamps, texts, settings, *([roles] if roles else [])])
    try:
        with template_roles(roles):
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
        if isinstance(error.__cause__, (ValueError, OSError)):
            raise error.__cause__ from None
        raise


def processes(rows: int) -> int | None:
    """Number of processes that tokenize so many rows; None: this one does."""
    return min(os.cpu_count() or 1, 16) if rows > PARALLEL_ROWS else None


def tokenize_rows(rows: Any, split: str, tokenizer: TextTokenizer) -> Any:
    """The rows with the columns of `TextTokenizer.tokenize` for their `conversation`, cached on disk.

    Raises:
        ValueError: the template refuses a row; the message has file and line.
    """
    import datasets

    integers = {name: datasets.Value("int32") for name in ("length", "full_length", "first_label", *COUNTS)}
    return rows.map(
        _Tokenize(tokenizer),
        num_proc=processes(len(rows)),
        features=datasets.Features(
            {
                **rows.features,
                "input_ids": datasets.List(datasets.Value("int32")),
                "label_mask": datasets.List(datasets.Value("bool")),
                **integers,
                "unread": datasets.List(datasets.Value("string")),
                "empty": datasets.Value("bool"),
            }
        ),
        new_fingerprint=json_digest([rows._fingerprint, tokenizer.fingerprint()]),
        desc=f"Tokenizing {split}",
    )


def read_conversations(split: str, sources: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Columns of each row: `row` (the fields, as JSON), `conversation` (as JSON), `location`, `row_id`.

    Raises:
        ValueError: a row cannot be read, or some rows are documents and others are not.
    """
    found = (pair for source in sources for pair in read_rows(source, split))
    yield from conversation_columns((location, row, parse_row(row, location)) for location, row in found)


def conversation_columns(rows: Iterable[tuple[str, dict[str, Any], Conversation]]) -> Iterator[dict[str, Any]]:
    """The columns of `read_conversations`.

    Args:
        rows: location, fields, and conversation of each row.

    Raises:
        ValueError: some rows are documents and others are not.
    """
    before: tuple[str, bool] | None = None
    for number, (location, row, conversation) in enumerate(rows):
        before = before or (location, conversation.document)
        if conversation.document != before[1]:
            kinds = ("a document (it has only 'text')", "a row with a prompt")
            this, other = kinds if conversation.document else kinds[::-1]
            raise ValueError(
                f"{location}: this is {this}, and {before[0]} is {other}: a split must have one kind; write documents "
                'as {"prompt": "", "completion": TEXT} to mix them'
            )
        text = json.dumps(row, ensure_ascii=False, default=str)
        yield {"row": text, "conversation": conversation.dump(), "location": location, "row_id": number}


class _Tokenize:
    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer, self.chat = tokenizer, tokenizer.chat

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            return self.tokenizer.tokenize(Conversation.load(row["conversation"]), self.chat)
        except ValueError as error:
            raise ValueError(f"{row['location']}: {error}") from None


def json_digest(parts: Any) -> str:
    """The fingerprint of a `datasets.Dataset` that depends on these parts alone."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
