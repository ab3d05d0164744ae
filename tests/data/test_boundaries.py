"""Where two tokenizers have read the same bytes: compared with slow sets of prefixes, over random texts."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from boundary_checks import FAMILIES_OF_TOKENIZERS, bytes_before, check_pair, random_text, spelled
from kd_lightning.data.alignment.boundaries import END, SpelledRow, align, common_boundaries
from kd_lightning.data.alignment.vocabulary import vocabulary_of
from tiny_tokenizers import tiny

TEXTS = 60


@pytest.mark.parametrize(("one", "other"), list(itertools.product(FAMILIES_OF_TOKENIZERS, repeat=2)))
def test_no_common_boundary_is_missed_and_none_is_wrong(one: str, other: str) -> None:
    student, teacher = FAMILIES_OF_TOKENIZERS[one](), FAMILIES_OF_TOKENIZERS[other]()
    draw = random.Random(f"{one} {other}")
    texts = [random_text(draw) for _ in range(TEXTS)]
    found = check_pair(student, teacher, texts)
    assert found.texts == TEXTS
    assert found.pairs >= TEXTS  # the end of the turn at least
    if one == other:
        assert found.pairs == found.tokens


def test_half_characters_are_boundaries() -> None:
    tokenizer = tiny()
    symbols = spelled(vocabulary_of(tokenizer), tokenizer("é", add_special_tokens=False).input_ids)
    assert [len(part) for part in symbols] == [1, 1]
    assert common_boundaries(symbols, symbols) == ([(0, 0), (1, 1)], True)
    assert common_boundaries(symbols, ["é".encode().decode("latin-1")]) == ([(0, 0)], True)


# --------------------------------------------------------------------------------------------- texts that are not alike
@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        (["ab", "c", "d"], ["ab", "C", "d"], [(0, 0), (2, 2)]),  # another letter
        (["a", "b", "c"], ["a", "b"], [(0, 0)]),  # more at the end
        (["a", "b", END], ["a", END], [(0, 0), (2, 1)]),
        (["x", "y"], ["z"], []),
        (["a", "a", "a"], ["a", "a"], [(0, 0)]),
        ([" the", "n"], ["the", "n"], [(1, 1)]),  # a blank of the prompt
        (["\n", "the", "n"], ["the", "n"], [(1, 0), (2, 1)]),
        ([], ["a"], []),
    ],
)
def test_only_the_differing_part_has_no_pairs(student: Any, teacher: Any, pairs: Any) -> None:
    assert common_boundaries(student, teacher) == (pairs, False)
    mirrored = [(s, t) for t, s in pairs]
    assert common_boundaries(teacher, student) == (mirrored, False)


@pytest.mark.parametrize(
    ("student", "teacher", "pairs", "same"),
    [
        (["a", "b"], ["a", "b", "c"], [(0, 0), (1, 1)], True),
        (["ab"], ["a", "b", "c"], [(0, 0)], True),
        (["a", "b", "x"], ["a", "b", "y", "z"], [(0, 0), (1, 1)], False),
        ([" a", "b"], ["a", "b", "c"], [(1, 1)], False),
    ],
)
def test_a_row_that_is_cut_has_the_pairs_of_the_common_beginning(
    student: Any, teacher: Any, pairs: Any, same: bool
) -> None:
    assert common_boundaries(student, teacher, is_cut=True) == (pairs, same)


def row(*parts: str, is_cut: bool = False) -> SpelledRow:
    """A row of spelled tokens; those in brackets have no label."""
    return SpelledRow([part.strip("[]") for part in parts], [part[0] != "[" for part in parts], is_cut)


def test_each_answer_of_a_row_is_aligned_alone() -> None:
    student = row("[q]", "a", "b", END, "[q]", "c", END)
    teacher = row("[qq]", "[q]", "ab", END, "[qqq]", "C", END)
    found = align(student, teacher)
    assert found.positions == [-1, 2, -1, 3, -1, -1, 6]
    assert not found.same
    # the chunk of the first end reaches to the second one and differs
    assert found.teacher_labels == [False, False, True, False, False, False, True]


def test_answers_of_different_numbers_are_aligned_as_one_text() -> None:
    found = align(row("a", "b", END, "c", END), row("ab", END, "[q]", "c", END))
    assert found.positions == [0, -1, 1, 3, 4]
    assert found.same
    assert found.teacher_labels == [True, True, False, True, True]


def test_an_incomplete_last_chunk_has_no_teacher_labels() -> None:
    found = align(row("[q]", "a", "b", is_cut=True), row("[q]", "a", "bc", END))
    assert found.positions == [-1, 1, 2]
    assert found.teacher_labels == [False, True, False, False]
    assert align(row("[q]", "a", "b", is_cut=True), row("[q]", "a", "b", END)).teacher_labels == [
        False,
        True,
        False,
        False,
    ]


def test_the_first_label_of_the_teacher_stays_one() -> None:
    found = align(row("[q]", "ab", is_cut=True), row("[q]", "a", "c", END))
    assert found.positions == [-1, -1]
    assert found.teacher_labels == [False, True, True, True]


@pytest.mark.parametrize("normalizer", [normalizers.Lowercase(), normalizers.NFC(), normalizers.Prepend(" ")])
def test_a_tokenizer_that_changes_the_text_loses_only_the_changed_part(normalizer: Any) -> None:
    backend = Tokenizer.from_str(tiny().backend_tokenizer.to_str())
    backend.normalizer = normalizer
    changed, plain = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"), tiny()
    text = "the Fox e\u0301 jumps over"
    sides = []
    for tokenizer in (plain, changed):
        ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        symbols = spelled(vocabulary_of(tokenizer), ids)
        sides.append(SpelledRow(symbols, [True] * len(symbols)))
    found = align(*sides)
    assert not found.same
    pairs = [(t, s) for t, s in enumerate(found.positions) if s >= 0]
    before = bytes_before(sides[0].spellings), bytes_before(sides[1].spellings)
    rest = [side.spellings for side in sides]
    assert pairs[-1] == (len(rest[0]) - 1, len(rest[1]) - 1)
    assert len(pairs) > 2
    for t, s in pairs:  # the same bytes from the beginning, or up to the end
        same_end = "".join(rest[0][t:]) == "".join(rest[1][s:])
        assert before[0][t] == before[1][s] or same_end
