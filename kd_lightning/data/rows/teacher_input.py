"""The teacher's own input: the same answers after another prompt, in another chat template, or in other tokens."""

from __future__ import annotations

import dataclasses
import json
import string
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from kd_lightning.data.alignment.rows import ALIGNED_COLUMNS, ALIGNMENT, RowAligner
from kd_lightning.data.base import GenerationRow
from kd_lightning.data.chat_template import ChatTemplate
from kd_lightning.data.conversation import Conversation, text_of
from kd_lightning.data.text.text_tokenizer import TextTokenizer
from kd_lightning.data.tokenization import json_digest, processes

PROMPT = "prompt"
"""The name of the last user turn in a `teacher_prompt`."""
SHOWN = 8  # tokens of an answer that a message shows
RowColumns = Callable[[Mapping[str, Any]], dict[str, Any]]
"""A row to its columns that are new or change."""


@dataclasses.dataclass(frozen=True)
class TeacherInput:
    """How the teacher's input differs from the student's; the same answers follow.

    Args:
        prompt: what the last user turn is for the teacher: a format text over the fields of the row and `{prompt}`,
            the turn itself; None: the turn itself.
        chat_template: a Jinja template for the teacher; None: the student's.
        template_kwargs: variables for its template, in addition to the student's.
        tokenizer: the teacher's, with its chat template; None: the student's.

    Raises:
        ValueError: the format text cannot be parsed, or names something other than fields.
    """

    prompt: str | None = None
    chat_template: str | None = None
    template_kwargs: dict[str, Any] | None = None
    tokenizer: PreTrainedTokenizerBase | None = None

    def __post_init__(self) -> None:
        if self.prompt is not None:
            field_names(self.prompt)

    @property
    def is_own(self) -> bool:
        """Whether the teacher has an input of its own."""
        settings = (self.prompt, self.chat_template, self.template_kwargs, self.tokenizer)
        return any(value is not None for value in settings)

    @property
    def columns(self) -> Mapping[str, str]:
        """Columns of a row besides those that every input has, and the type of each."""
        return {} if self.tokenizer is None else ALIGNED_COLUMNS

    def settings(self, student: TextTokenizer) -> list[Any]:
        """Changes when the same row is read in another way."""
        return [self.prompt, self.text_tokenizer(student).fingerprint()]

    def adder(self, student: TextTokenizer) -> AddTeacherInput:
        """Adds the columns of `with_teacher_input` to a row."""
        return AddTeacherInput(self, student)

    def of_row(self, fields: Mapping[str, Any]) -> TeacherInput:
        """How the teacher of a row with these fields reads it."""
        return self

    def text_tokenizer(self, student: TextTokenizer) -> TextTokenizer:
        """How the teacher's conversations become token ids, given the student's tokenizer."""
        kwargs = student.template_kwargs
        if self.template_kwargs is not None:
            kwargs = {**(kwargs or {}), **self.template_kwargs}
        if self.tokenizer is not None:
            return dataclasses.replace(
                student, tokenizer=self.tokenizer, chat_template=self.chat_template, template_kwargs=kwargs
            )
        template = student.chat_template if self.chat_template is None else self.chat_template
        return dataclasses.replace(student, chat_template=template, template_kwargs=kwargs)

    def conversation(self, conversation: Conversation, fields: Mapping[str, Any], location: str) -> Conversation:
        """The conversation with the teacher's prompt.

        Args:
            conversation: of the row.
            fields: of the row.
            location: file and line of the row, for error messages.

        Raises:
            ValueError: a field is missing or is no text, or there is no user turn before the last answer.
        """
        if self.prompt is None:
            return conversation
        if not conversation.messages:
            return dataclasses.replace(conversation, prompt=self._text(conversation.prompt, fields, location))
        asked = [n for n, turn in enumerate(conversation.question) if turn["role"] == "user"]
        if not asked:
            raise ValueError(f"{location}: teacher_prompt replaces the last user turn, and this row has none")
        turn = conversation.messages[asked[-1]]
        before = text_of(turn)
        text = self._text(before, fields, location)
        if text == before:
            return conversation
        messages = list(conversation.messages)
        messages[asked[-1]] = {**turn, "content": text}
        return dataclasses.replace(conversation, messages=messages)

    def _text(self, prompt: str, fields: Mapping[str, Any], location: str) -> str:
        assert self.prompt is not None
        values = {}
        for name in field_names(self.prompt):
            found = prompt if name == PROMPT else fields.get(name)
            if found is None:
                there = ", ".join(repr(name) for name, value in fields.items() if value is not None)
                raise ValueError(f"{location}: teacher_prompt names the field {name!r}; this row has {there}")
            if not isinstance(found, str | int | float):
                raise ValueError(
                    f"{location}: field {name!r} must be a text or a number for teacher_prompt, got "
                    f"{type(found).__name__}"
                )
            values[name] = found
        return self.prompt.format(**values)


def field_names(text: str) -> list[str]:
    """The fields that a format text names.

    Raises:
        ValueError: the text cannot be parsed, or names something other than fields.
    """
    try:
        parts = [(name, spec, conversion) for _, name, spec, conversion in string.Formatter().parse(text)]
    except ValueError as error:
        raise ValueError(f"teacher_prompt cannot be parsed ({error}): write {{{{ and }}}} for braces") from None
    names = [name for name, _, _ in parts if name is not None]
    plain = all(name and not set(".[]") & set(name) and not name.isdigit() for name in names)
    if not plain or any(spec or conversion for _, spec, conversion in parts):
        raise ValueError(
            f"teacher_prompt must name fields of the row as {{name}}, and {{{{ and }}}} stand for braces, got {text!r}"
        )
    return list(dict.fromkeys(names))


class InputOfRows(Protocol):
    """How the teacher of each row reads it; `TeacherInput` is one for all rows."""

    @property
    def columns(self) -> Mapping[str, str]:
        """Columns of a row besides those that every input has, and the type of each."""

    def settings(self, student: TextTokenizer) -> list[Any]:
        """Changes when the same row is read in another way."""

    def adder(self, student: TextTokenizer) -> RowColumns:
        """Adds the columns of `with_teacher_input` to a row."""

    def of_row(self, fields: Mapping[str, Any]) -> TeacherInput:
        """How the teacher of a row with these fields reads it."""


def with_teacher_input(rows: Any, split: str, own: InputOfRows, student: TextTokenizer) -> Any:
    """Tokenized rows with the columns of the teacher's own input.

    They are `teacher_input_ids`, `teacher_label_mask`, `teacher_length`, `teacher_cut` (whether labels are lost because
    the teacher's input is longer than `max_length`) and `teacher_difference` (how the teacher's template writes the
    answer otherwise; "": it does not). Labels that are not on both sides are removed on both. With two tokenizers, the
    labels stay as they are, and the columns of `ALIGNED_COLUMNS` are added.

    Args:
        rows: a `datasets.Dataset` from `tokenize_rows`.
        split: which split, for the progress bar.
        own: the teacher's input.
        student: the tokenizer of the rows.

    Raises:
        ValueError: a row lacks a field, or the teacher's template refuses it; the message has file and line.
    """
    import datasets  # type: ignore[import-untyped]

    aligned = [ALIGNMENT] if own.columns else []
    return rows.map(
        own.adder(student),
        num_proc=processes(len(rows)),
        features=datasets.Features({**rows.features, **teacher_features(own.columns)}),
        new_fingerprint=json_digest([rows._fingerprint, "teacher", own.settings(student), *aligned]),
        desc=f"Teacher's input, {split}",
    )


def teacher_features(more: Mapping[str, str]) -> dict[str, Any]:
    """Types of the columns of the teacher's own input.

    Args:
        more: further columns, such as `ALIGNED_COLUMNS`, with their types.
    """
    import datasets

    integer, yes = datasets.Value("int32"), datasets.Value("bool")
    types = {"int32": integer, "bool": yes, "positions": datasets.List(integer)}
    return {
        "teacher_input_ids": datasets.List(integer),
        "teacher_label_mask": datasets.List(yes),
        "teacher_length": integer,
        "teacher_cut": yes,
        "teacher_difference": datasets.Value("string"),
        **{name: types[kind] for name, kind in more.items()},
    }


def prompts_of(rows: Any, student: TextTokenizer, own: InputOfRows | None) -> Iterator[GenerationRow]:
    """Prompt and reference answer of each row.

    Args:
        rows: a `datasets.Dataset` with the columns `row`, `conversation`, `location` and `row_id`.
        student: how the student's prompts become token ids.
        own: the teacher's input, if it is the teacher that is asked.
    """
    tokenizers: dict[int, TextTokenizer] = {}  # by the input of a teacher: a chat template is compiled once
    for row in rows:
        conversation, fields = Conversation.load(row["conversation"]), json.loads(row["row"])
        asked, tokenizer = conversation, student
        if own is not None:
            found = own.of_row(fields)
            tokenizer = tokenizers.setdefault(id(found), found.text_tokenizer(student))
            asked = found.conversation(conversation, fields, row["location"])
        text, ids = tokenizer.prompt(asked)
        yield GenerationRow(prompt_ids=ids, prompt=text, answer=conversation.answer, row=fields, index=row["row_id"])


class AddTeacherInput:
    """Adds the columns of `with_teacher_input` to a tokenized row.

    Args:
        own: the teacher's input.
        student: the tokenizer of the rows.
    """

    def __init__(self, own: TeacherInput, student: TextTokenizer) -> None:
        self.own, self.tokenizer = own, own.text_tokenizer(student)
        self.chat: ChatTemplate = self.tokenizer.chat
        self.aligner = None if own.tokenizer is None else RowAligner(student, self.tokenizer)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The new columns, and those of the student that change."""
        conversation = Conversation.load(row["conversation"])
        if not conversation.empty:
            conversation = self.own.conversation(conversation, json.loads(row["row"]), row["location"])
        try:
            found = self.tokenizer.tokenize(conversation, self.chat)
        except ValueError as error:
            raise ValueError(f"{row['location']}: the teacher's input: {error}") from None
        if self.aligner is not None:
            return self.aligner(row, found)
        labels = [_labels(row["input_ids"], row["label_mask"]), _labels(found["input_ids"], found["label_mask"])]
        count = min(map(len, labels))
        whole = [row["full_length"] <= row["length"], found["full_length"] <= found["length"]]
        shorter = 0 if len(labels[0]) < len(labels[1]) else 1
        differs = labels[0][:count] != labels[1][:count] or (len(labels[0]) != len(labels[1]) and whole[shorter])
        mask = _first_labels(row["label_mask"], count)
        return {
            "label_mask": mask,
            "first_label": row["first_label"] if count or differs or not labels[0] else self.tokenizer.max_length,
            "teacher_input_ids": found["input_ids"],
            "teacher_label_mask": _first_labels(found["label_mask"], count),
            "teacher_length": found["length"],
            "teacher_cut": len(labels[1]) < len(labels[0]) and not differs,
            "teacher_difference": self._difference(labels) if differs else "",
        }

    def _difference(self, labels: list[list[int]]) -> str:
        pairs = zip(*labels, strict=False)
        at = next((n for n, (one, other) in enumerate(pairs) if one != other), min(map(len, labels)))
        texts = [self.tokenizer.tokenizer.decode(ids[at : at + SHOWN]) for ids in labels]
        return f"{texts[1]!r} for the teacher where it is {texts[0]!r} for the student"


def _labels(ids: list[int], mask: list[bool]) -> list[int]:
    return [token for token, is_label in zip(ids, mask, strict=True) if is_label]


def _first_labels(mask: list[bool], count: int) -> list[bool]:
    """The mask with its first `count` labels."""
    kept = []
    for is_label in mask:
        kept.append(is_label and count > 0)
        count -= is_label
    return kept
