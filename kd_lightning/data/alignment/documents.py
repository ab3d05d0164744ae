"""Windows of a document that begin and end where two tokenizers have read the same bytes."""

from __future__ import annotations

from collections.abc import Sequence

from kd_lightning.data.alignment.boundaries import STUDENT_ONLY, TEACHER_ONLY, Pair, common_boundaries
from kd_lightning.data.alignment.vocabulary import vocabulary_of
from kd_lightning.data.text.text_tokenizer import TextTokenizer


class DocumentAligner:
    """Finds the windows of a document in the tokens of both sides.

    Args:
        student: how the student's documents become token ids; its `max_length` limits the windows of both sides.
        teacher: how the teacher's documents become token ids.

    Raises:
        ValueError: the tokens of a tokenizer cannot be read as bytes.
    """

    def __init__(self, student: TextTokenizer, teacher: TextTokenizer) -> None:
        self.size = student.max_length
        self.sides = (student, STUDENT_ONLY), (teacher, TEACHER_ONLY)
        self.vocabularies = [vocabulary_of(tokenizer.tokenizer) for tokenizer, _ in self.sides]

    def __call__(self, student: Sequence[int], teacher: Sequence[int]) -> list[tuple[Pair, Pair]]:
        """First and last position, plus one, of each window, for the student and for the teacher.

        As in `windows`, a window begins with the token before its first label. The labels begin after the token that
        begins texts; without it on both sides, where both have first read the same bytes after at least one token.

        Args:
            student: the student's tokens of a whole document.
            teacher: the teacher's.

        Raises:
            ValueError: no such position is near enough.
        """
        first = [len(tokenizer.first_ids) for tokenizer, _ in self.sides]
        spelled = [
            vocabulary.spell(list(ids[begin:]), other)
            for ids, begin, vocabulary, (_, other) in zip(
                (student, teacher), first, self.vocabularies, self.sides, strict=True
            )
        ]
        pairs, _ = common_boundaries(spelled[0], spelled[1])
        begin = (first[0], first[1])  # both have read nothing but the token that begins texts
        starts = {begin, *((t + first[0], s + first[1]) for t, s in pairs)}
        edges = sorted(pair for pair in starts if min(pair) > 0)
        return shared_windows(edges, (len(student), len(teacher)), self.size)


def shared_windows(pairs: Sequence[Pair], ends: Pair, size: int) -> list[tuple[Pair, Pair]]:
    """The longest windows, one after the other, that begin and end at one of the pairs.

    Args:
        pairs: positions of the student and of the teacher before which both have read the same bytes, increasing.
        ends: number of tokens on both sides.
        size: largest number of tokens of a window, on both sides.

    Returns:
        (start, end) of the student and (start, end) of the teacher, for each window.

    Raises:
        ValueError: two pairs are further apart than a window is long.
    """
    edges, found, at = [*pairs, ends], [], 0
    while at < len(edges) - 1:
        (t, s), stop = edges[at], at
        while stop + 1 < len(edges) and max(edges[stop + 1][0] - t, edges[stop + 1][1] - s) < size:
            stop += 1
        if stop == at:
            raise ValueError(
                f"the two tokenizers read no common bytes within max_length={size} tokens after token {t}: raise "
                "max_length, or remove what one of them cannot spell from the text"
            )
        found.append(((t - 1, edges[stop][0]), (s - 1, edges[stop][1])))
        at = stop
    return found
