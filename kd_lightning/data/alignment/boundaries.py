"""Where the tokens of two tokenizers have read the same bytes of a text.

A token is spelled as a text with one character for each of its bytes; a special token is one character beyond those of
the bytes, the same on both sides if it has the same role. So the spellings of both sides can be compared as texts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix

END, BEGIN = "\u0100", "\u0101"
"""The spelling of a token that ends a turn, and of one that begins a text."""
STUDENT_ONLY, TEACHER_ONLY = "\u0102", "\u0103"
"""The spelling of the other special tokens of each side: they are never the same."""
BLANKS = " \t\r\n"
Pair = tuple[int, int]


@dataclass(frozen=True)
class SpelledRow:
    """The tokens of a row, spelled.

    Args:
        spellings: of each token.
        labels: whether each token is a label.
        is_cut: whether the row ends before its text does.
    """

    spellings: Sequence[str]
    labels: Sequence[bool]
    is_cut: bool = False

    @property
    def answers(self) -> list[list[int]]:
        """Positions of the labels, one list for each run of them."""
        groups = itertools.groupby(range(len(self.labels)), lambda n: self.labels[n])
        return [list(group) for is_label, group in groups if is_label]

    def spelled(self, start: int, end: int) -> str:
        """The labels in a range of positions."""
        return "".join(self.spellings[n] for n in range(start, end) if self.labels[n])


@dataclass(frozen=True)
class Alignment:
    """How the tokens of the student and of the teacher belong together.

    Args:
        positions: for each token t of the student, the token s of the teacher such that both have read the same bytes
            of the answers before t and s; -1: there is none.
        teacher_labels: whether each token of the teacher counts in a chunk: the labels, without those between two pairs
            whose bytes differ, or after a last pair whose chunk is cut.
        same: whether the answers are the same bytes on both sides, as far as both have them.
    """

    positions: list[int]
    teacher_labels: list[bool]
    same: bool


def common_boundaries(student: Sequence[str], teacher: Sequence[str], is_cut: bool = False) -> tuple[list[Pair], bool]:
    """All pairs (t, s) of tokens before which both sides have read the same bytes.

    Where the spellings differ, only the pairs before and after the difference remain: those whose bytes up to the next
    pair are the same on both sides, counted from the beginning or from the end.

    Args:
        student: spellings of the tokens, none of them empty.
        teacher: the same.
        is_cut: whether a side may end before the text does.

    Returns:
        The pairs in order, and whether the spellings are the same, up to the cut.
    """
    one, other, starts = _without_leads(student, teacher)
    alike = starts[0][:1] == [0] == starts[1][:1]
    prefix = len(commonprefix([one, other]))  # noqa: RUF071 - characters are meant
    head = _matches(*starts, range(prefix + 1))
    if one == other or (is_cut and prefix == min(len(one), len(other))):
        return head, alike
    if is_cut:
        return head[:-1], False
    suffix = len(commonprefix([one[::-1], other[::-1]]))  # noqa: RUF071
    suffix = min(suffix, len(one) - prefix, len(other) - prefix)
    from_end = [start - len(one) for start in starts[0]], [start - len(other) for start in starts[1]]
    return [*head[:-1], *_matches(*from_end, range(-suffix, 0))], False


def _without_leads(student: Sequence[str], teacher: Sequence[str]) -> tuple[str, str, tuple[list[int], list[int]]]:
    """Both spellings, and where their tokens begin; without the blanks before the text if these differ.

    A chat template may end its prompt with a blank that the first token of the answer has.
    """
    texts = "".join(student), "".join(teacher)
    stripped = texts[0].lstrip(BLANKS), texts[1].lstrip(BLANKS)
    leads = len(texts[0]) - len(stripped[0]), len(texts[1]) - len(stripped[1])
    if texts[0][: leads[0]] == texts[1][: leads[1]]:
        return *texts, (_starts(student), _starts(teacher))
    starts = ([start - lead for start in _starts(side)] for side, lead in zip((student, teacher), leads, strict=True))
    ours, theirs = starts
    return *stripped, (ours, theirs)


def align(student: SpelledRow, teacher: SpelledRow) -> Alignment:
    """Align the answers of a row: run by run of labels, or as one text if the sides have different numbers of runs."""
    runs = [student.answers, teacher.answers]
    cuts = [student.is_cut, teacher.is_cut]
    if len(runs[0]) != len(runs[1]) and not any(cuts):
        runs = [[list(itertools.chain(*side))] for side in runs]
    pairs: list[Pair] = []
    same = True
    for ours, theirs in zip(*runs, strict=False):
        is_cut = any(cut and run is side[-1] for cut, run, side in zip(cuts, (ours, theirs), runs, strict=True))
        spellings = [student.spellings[n] for n in ours], [teacher.spellings[n] for n in theirs]
        found, alike = common_boundaries(*spellings, is_cut=is_cut)
        pairs += [(ours[t], theirs[s]) for t, s in found]
        same = same and alike
    return _alignment(student, teacher, pairs, same)


def _alignment(student: SpelledRow, teacher: SpelledRow, pairs: list[Pair], same: bool) -> Alignment:
    ends = (len(student.labels), len(teacher.labels))
    chunks = list(zip(pairs, [*pairs[1:], ends], strict=False))  # there may be no pair
    whole = [student.spelled(t, t_end) == teacher.spelled(s, s_end) for (t, s), (t_end, s_end) in chunks]
    first = whole.index(True) if True in whole else len(whole)
    positions, labels = [-1] * ends[0], list(teacher.labels)
    for n, ((t, s), (_, s_end)) in enumerate(chunks):
        if n < first:  # the first label of the teacher stays one: its prompt ends there
            continue
        positions[t] = s
        if not whole[n]:
            labels[s:s_end] = [False] * (s_end - s)
    return Alignment(positions, labels, same)


def _starts(spellings: Sequence[str]) -> list[int]:
    """Length of what stands before each token."""
    return list(itertools.accumulate((len(text) for text in spellings[:-1]), initial=0)) if spellings else []


def _matches(ours: Sequence[int], theirs: Sequence[int], allowed: range) -> list[Pair]:
    """Indices of the numbers that are in both increasing lists, and allowed."""
    found = {start: s for s, start in enumerate(theirs)}
    return [(t, found[start]) for t, start in enumerate(ours) if start in found and start in allowed]
