"""Real tokenizers of different families, two by two: their tokens as bytes, their common tokens and boundaries."""

from __future__ import annotations

import itertools
import random

import pytest

from boundary_checks import check_pair, random_text
from kd_lightning.data import vocabulary_map
from kd_lightning.data.alignment.vocabulary import same_tokenizer, vocabulary_of
from kd_lightning.models.hf_adapter import normalized
from real_tokenizers import LOADERS, real

pytestmark = pytest.mark.slow
TEXTS = 100


@pytest.mark.parametrize("name", LOADERS)
def test_the_tokens_of_a_text_are_its_bytes(name: str) -> None:
    tokenizer = real(name)
    table, draw = vocabulary_of(tokenizer).table, random.Random(name)
    assert sum(part is not None for part in table) > 30_000
    for text in (random_text(draw) for _ in range(TEXTS)):
        parts = [table[n] for n in tokenizer(text, add_special_tokens=False).input_ids]
        found = b"".join(part or b"" for part in parts).decode()
        expected = normalized(tokenizer, text).replace("▁", " ")  # Qwen 3 composes characters (NFC)
        assert expected in (found, found.removeprefix(" "))


@pytest.mark.parametrize("name", LOADERS)
def test_a_tokenizer_and_itself(name: str) -> None:
    tokenizer, draw = real(name), random.Random(name)
    assert same_tokenizer(tokenizer, tokenizer)
    assert vocabulary_map(tokenizer, tokenizer).is_identity
    found = check_pair(tokenizer, tokenizer, [random_text(draw) for _ in range(TEXTS)])
    assert found.pairs == found.tokens


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(LOADERS, 2)))
def test_no_common_boundary_is_missed_and_none_is_wrong(one: str, other: str) -> None:
    student, teacher, draw = real(one), real(other), random.Random(f"{one} {other}")
    assert not same_tokenizer(student, teacher)
    known, tables = vocabulary_map(student, teacher), (vocabulary_of(student).table, vocabulary_of(teacher).table)
    for a, b in zip(known.student_ids.tolist(), known.teacher_ids.tolist(), strict=True):
        assert tables[0][a] == tables[1][b]
    found = check_pair(student, teacher, [random_text(draw) for _ in range(TEXTS)])
    shared = {part for part in tables[0] if part} & {part for part in tables[1] if part}
    assert len(known.student_ids) == len(shared) + 1  # and the end of the turn
    assert found.pairs > TEXTS
    print(
        f"{one} | {other} | {len(shared)} | {len(tables[0])} | {len(tables[1])} | {found.texts} | {found.tokens} | "
        f"{found.pairs} | {found.different}"
    )
