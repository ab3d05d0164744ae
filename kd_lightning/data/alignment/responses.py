"""Responses that the student generates, in the teacher's tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

from kd_lightning.constants import IGNORE_INDEX
from kd_lightning.data.alignment.boundaries import STUDENT_ONLY, TEACHER_ONLY, SpelledRow, align
from kd_lightning.data.alignment.two_tokenizers import TeacherResponse
from kd_lightning.data.alignment.vocabulary import SAMPLE, Vocabulary, vocabulary_of
from kd_lightning.data.text.encode import encode_words
from kd_lightning.data.text.text_tokenizer import TextTokenizer

_BLANK = re.compile(r"\s*")


class ResponseTranslator:
    """Turns responses in the student's tokens into the teacher's.

    Args:
        student: how the student's rows become token ids.
        teacher: how the teacher's rows become token ids.

    Raises:
        ValueError: the tokens of a tokenizer cannot be read as bytes.
    """

    def __init__(self, student: TextTokenizer, teacher: TextTokenizer) -> None:
        self.tokenizers = student.tokenizer, teacher.tokenizer
        self.student, self.teacher = vocabulary_of(student.tokenizer), vocabulary_of(teacher.tokenizer)
        self.blanks = leading_blank(student, self.student), leading_blank(teacher, self.teacher)

    def __call__(self, ids: Sequence[int]) -> TeacherResponse:
        """The response in the teacher's tokens.

        Its bytes are encoded again; a character that is incomplete at the end is left out. Special tokens inside of
        it become words, and the token that ends it the one that ends the teacher's answers.

        Args:
            ids: the student's tokens, up to and including the end of the turn, if there is one.
        """
        ended = bool(ids) and ids[-1] in self.student.ends
        text = self._text(ids[:-1] if ended else ids)
        own, other = self.blanks
        found = encode_words(self.tokenizers[1], other + text.removeprefix(own)) if text else []
        if ended and self.teacher.end_of_turn is not None:
            found.append(self.teacher.end_of_turn)
        rows = (
            SpelledRow(vocabulary.spell(tokens, unlike), [True] * len(tokens), is_cut=not ended)
            for vocabulary, tokens, unlike in (
                (self.student, ids, STUDENT_ONLY),
                (self.teacher, found, TEACHER_ONLY),
            )
        )
        aligned = align(*rows)
        labels = [n if counts else IGNORE_INDEX for n, counts in zip(found, aligned.teacher_labels, strict=True)]
        return TeacherResponse(found, labels, aligned.positions)

    def _text(self, ids: Sequence[int]) -> str:
        table = self.student.table
        pieces = []
        for special, run in groupby(ids, lambda n: n >= len(table) or table[n] is None):
            if special:
                pieces.append(str(self.tokenizers[0].decode(list(run), clean_up_tokenization_spaces=False)))
            else:
                pieces.append(whole_characters(b"".join(table[n] or b"" for n in run)))
        return "".join(pieces)


def whole_characters(text: bytes) -> str:
    """A text without the incomplete character at its end; other bytes that are no text become U+FFFD."""
    for size in range(1, min(4, len(text) + 1)):
        last = text[-size]
        if last >= 0xC0:  # the first byte of a character
            needed = 2 if last < 0xE0 else 3 if last < 0xF0 else 4
            text = text if size >= needed else text[:-size]
            break
        if last < 0x80:
            break
    return text.decode(errors="replace")


def leading_blank(text: TextTokenizer, vocabulary: Vocabulary) -> str:
    """The blanks before an answer that its first token has: "Assistant: a" may be read as "Assistant:" and " a"."""
    try:
        found = text.tokenize(SAMPLE)
    except ValueError:
        return ""
    labels = [n for n, is_label in zip(found["input_ids"], found["label_mask"], strict=True) if is_label]
    first = vocabulary.table[labels[0]] if labels else None
    match = _BLANK.match((first or b"").decode(errors="replace"))
    return match.group() if match else ""
