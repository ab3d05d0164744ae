"""Tokenized rows of two tokenizers, aligned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kd_lightning.constants import TEACHER_POSITIONS
from kd_lightning.data.alignment.boundaries import STUDENT_ONLY, TEACHER_ONLY, SpelledRow, align
from kd_lightning.data.alignment.two_tokenizers import TokenizerShares
from kd_lightning.data.alignment.vocabulary import vocabulary_of
from kd_lightning.data.text.text_tokenizer import TextTokenizer
from kd_lightning.engine.vocabulary_map import VocabularyMap

ALIGNMENT = "two tokenizers 1"
"""Changes when the same tokens are aligned in another way."""
ALIGNED_COLUMNS = {
    TEACHER_POSITIONS: "positions",
    "spelled_otherwise": "bool",
    "no_pairs": "bool",
    "labels": "int32",
    "aligned_labels": "int32",
}
"""Columns of a row of two tokenizers, and the type of each."""


class RowAligner:
    """Makes the teacher's columns of a row from its tokens in both tokenizers.

    Args:
        student: how the student's rows become token ids.
        teacher: how the teacher's rows become token ids.

    Raises:
        ValueError: the tokens of a tokenizer cannot be read as bytes.
    """

    def __init__(self, student: TextTokenizer, teacher: TextTokenizer) -> None:
        self.student, self.teacher = vocabulary_of(student.tokenizer), vocabulary_of(teacher.tokenizer)
        self.max_length = teacher.max_length

    def __call__(self, row: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
        """The columns of the teacher's input, and those of `ALIGNED_COLUMNS`.

        Args:
            row: the student's, with the columns of `TextTokenizer.tokenize`.
            found: the same columns of the teacher.
        """
        sides = (
            SpelledRow(
                vocabulary.spell(columns["input_ids"], other),
                columns["label_mask"],
                is_cut=columns["full_length"] > columns["length"],
            )
            for columns, vocabulary, other in (
                (row, self.student, STUDENT_ONLY),
                (found, self.teacher, TEACHER_ONLY),
            )
        )
        aligned = align(*sides)
        taught = any(found["label_mask"])
        labels = sum(row["label_mask"]) if taught else 0
        pairs = sum(position >= 0 for position in aligned.positions)
        return {
            "first_label": row["first_label"] if taught or not any(row["label_mask"]) else self.max_length,
            "teacher_input_ids": found["input_ids"],
            "teacher_label_mask": aligned.teacher_labels,
            "teacher_length": found["length"],
            "teacher_cut": found["full_length"] > found["length"],
            "teacher_difference": "",
            TEACHER_POSITIONS: aligned.positions,
            "spelled_otherwise": labels > 0 and not aligned.same,
            "no_pairs": labels > 0 and not pairs,
            "labels": labels,
            "aligned_labels": pairs,
        }


def shares_of(rows: Any, known: VocabularyMap) -> TokenizerShares:
    """How much of the vocabularies, and of the labels of these rows, two tokenizers share.

    Args:
        rows: a `datasets.Dataset` with the columns of both sides.
        known: the tokens that are partners.
    """
    partners = (known.student_shared.cpu(), known.teacher_shared.cpu())
    shared, total = [0, 0], [0, 0]
    for columns in (("input_ids", "label_mask"), ("teacher_input_ids", "teacher_label_mask")):
        side = columns[0].startswith("teacher_")
        for ids, mask in zip(*(rows[name] for name in columns), strict=True):
            labels = torch.tensor(ids, dtype=torch.long)[torch.tensor(mask, dtype=torch.bool)]
            shared[side] += int(partners[side][labels].sum())
            total[side] += len(labels)
    pairs = len(known.student_ids)
    return TokenizerShares(
        student_tokens=pairs / max(1, known.student_size),
        teacher_tokens=pairs / max(1, known.teacher_size),
        student_labels=shared[0] / max(1, total[0]),
        teacher_labels=shared[1] / max(1, total[1]),
        aligned_labels=sum(rows["aligned_labels"][:]) / max(1, total[0]),
    )
