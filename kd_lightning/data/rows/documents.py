"""Documents: rows of raw text, cut into windows in which every token has a label."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from kd_lightning.data.alignment.boundaries import Pair
from kd_lightning.data.alignment.documents import DocumentAligner
from kd_lightning.data.alignment.rows import ALIGNED_COLUMNS, ALIGNMENT, RowAligner
from kd_lightning.data.base import DistillationDataModule
from kd_lightning.data.conversation import Conversation
from kd_lightning.data.files.text_files import TEXT
from kd_lightning.data.rows.teacher_input import TeacherInput, teacher_features
from kd_lightning.data.text.text_tokenizer import COUNTS, TextTokenizer
from kd_lightning.data.tokenization import json_digest, processes

DOCUMENTS = "documents 1"
"""Changes when the same text is cut into other windows."""
BATCH = 16  # documents that are tokenized at a time
NOTHING = ((0, 0), (0, 0))  # the window of a document without labels


def windows(length: int, size: int) -> Iterator[tuple[int, int]]:
    """The first and the last position, plus one, of each window of a document.

    A window begins with the last token of the window before it, so that each token but the first of the document is
    predicted exactly once, from a token that precedes it. The last window has what remains.

    Args:
        length: of the document, in tokens.
        size: of a window, at least 2.
    """
    for start in range(0, max(length - 1, 0), size - 1):
        yield start, min(start + size, length)


def are_documents(rows: Any) -> bool:
    """Whether the rows of `read_conversations` are documents; all of a split are, or none."""
    return len(rows) > 0 and Conversation.load(rows[0]["conversation"]).document


def check_one_input(own: TeacherInput, sources: list[str]) -> None:
    """Check that the teacher reads the same documents as the student.

    Raises:
        ValueError: it has a prompt or a chat template of its own.
    """
    given = {
        "teacher_prompt": own.prompt,
        "teacher_chat_template": own.chat_template,
        "teacher_chat_template_kwargs": own.template_kwargs,
    }
    names = ", ".join(sources)
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"{name} must be null for documents (rows with 'text'), which have no prompt and no chat template: "
                f"{names}"
            )


def require_prompts(data: DistillationDataModule | None, split: str, needed_by: str) -> None:
    """Check that a loaded split has prompts.

    Args:
        data: of the run; None: nothing is known of it.
        split: `train`, `val` or `test`.
        needed_by: the argument that needs prompts, and what it must be without, for the message.

    Raises:
        ValueError: the rows of the split are documents.
    """
    if data is not None and split in data.document_splits:
        raise ValueError(
            f"{needed_by}: the {split} rows are documents (a field 'text', or .txt files), which have no prompts to "
            f"answer; or pass rows with prompts as data.{split}"
        )


def cut_documents(rows: Any, split: str, tokenizer: TextTokenizer, teacher: TextTokenizer | None = None) -> Any:
    """One row for each window of the documents, with the columns of `tokenize_rows`, and `documents`.

    The location of a window names its tokens; `row` has the fields of the document, with the window's text instead of
    the whole; `row_id` numbers the windows of the split; `documents` is 1 for the first window of a document. A
    document without two tokens is one row without tokens (`empty`).

    Args:
        rows: a `datasets.Dataset` with the columns of `read_conversations`.
        split: which split, for the progress bar.
        tokenizer: its `max_length` is the size of a window.
        teacher: how the teacher's documents become token ids, if it has a tokenizer of its own: then windows begin and
            end where both sides have read the same bytes, and the columns of `with_teacher_input` are added.

    Raises:
        ValueError: there is no such position near enough; the message has file and line.
    """
    import datasets  # type: ignore[import-untyped]

    integer = datasets.Value("int32")
    texts = {name: datasets.Value("string") for name in ("row", "conversation", "location")}
    counts = dict.fromkeys(("length", "full_length", "first_label", *COUNTS, "documents"), integer)
    features = {
        **texts,
        "input_ids": datasets.List(integer),
        "label_mask": datasets.List(datasets.Value("bool")),
        **counts,
        "unread": datasets.List(datasets.Value("string")),
        "empty": datasets.Value("bool"),
        **({} if teacher is None else teacher_features(ALIGNED_COLUMNS)),
    }
    theirs = [] if teacher is None else [ALIGNMENT, teacher.fingerprint()]
    digest = json_digest([rows._fingerprint, DOCUMENTS, tokenizer.fingerprint(), *theirs])
    found = rows.map(
        _Cut(tokenizer, teacher),
        batched=True,
        batch_size=BATCH,
        num_proc=processes(len(rows)),
        remove_columns=rows.column_names,
        features=datasets.Features(features),
        new_fingerprint=digest,
        desc=f"Tokenizing {split}",
    )
    numbers = datasets.Value("int64")
    numbered = json_digest([digest, "numbered"])
    return found.add_column("row_id", list(range(len(found))), new_fingerprint=numbered, feature=numbers)


class _Cut:
    def __init__(self, tokenizer: TextTokenizer, teacher: TextTokenizer | None) -> None:
        self.tokenizer, self.teacher = tokenizer, teacher
        if teacher is not None:
            self.document_aligner, self.row_aligner = (
                DocumentAligner(tokenizer, teacher),
                RowAligner(tokenizer, teacher),
            )

    def __call__(self, rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        found = [self._windows(*row) for row in zip(rows["row"], rows["conversation"], rows["location"], strict=True)]
        cut = list(itertools.chain.from_iterable(found))
        return {name: [window[name] for window in cut] for name in cut[0]}

    def _windows(self, row: str, conversation: str, location: str) -> list[dict[str, Any]]:
        fields = json.loads(row)
        text = Conversation.load(conversation).completion
        ids, control_tokens = self.tokenizer.document(text) if text.strip() else ([], 0)
        theirs, _ = self.teacher.document(text) if text.strip() and self.teacher is not None else ([], 0)
        try:
            parts = self._positions(ids, theirs)
        except ValueError as error:
            raise ValueError(f"{location}: {error}") from None
        found = []
        for number, ((start, end), (other_start, other_end)) in enumerate(parts or [NOTHING]):
            part = ids[start:end]
            tokens = f" (tokens {start + 1} to {end})" if len(parts) > 1 else ""
            words = self.tokenizer.tokenizer.decode(part, clean_up_tokenization_spaces=False)
            window = {
                "row": json.dumps({**fields, TEXT: words}, ensure_ascii=False),
                "conversation": Conversation(document=True).dump(),
                "location": f"{location}{tokens}",
                **_columns(part),
                **dict.fromkeys(COUNTS, 0),
                "control_tokens": 0 if number else control_tokens,
                "documents": int(number == 0),
                "unread": [],
                "empty": not part,
            }
            if self.teacher is not None:
                window |= self.row_aligner(window, _columns(theirs[other_start:other_end]))
            found.append(window)
        return found

    def _positions(self, ids: list[int], theirs: list[int]) -> list[tuple[Pair, Pair]]:
        """Where the windows are in the student's and in the teacher's tokens, which are the same without its own."""
        if self.teacher is not None:
            return self.document_aligner(ids, theirs) if ids else []
        return [(window, window) for window in windows(len(ids), self.tokenizer.max_length)]


def _columns(ids: list[int]) -> dict[str, Any]:
    """The tokens of a window, of which all but the first are labels."""
    return {
        "input_ids": ids,
        "label_mask": [n > 0 for n in range(len(ids))],
        "length": len(ids),
        "full_length": len(ids),
        "first_label": 1 if ids else -1,
    }
