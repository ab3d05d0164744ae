"""Random texts, and a slow reference for the common boundaries of two tokenizers."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers import decoders as backend_decoders
from transformers import PreTrainedTokenizerFast

from kd_lightning.data.alignment.boundaries import STUDENT_ONLY, TEACHER_ONLY, SpelledRow, align
from kd_lightning.data.alignment.vocabulary import Vocabulary, vocabulary_of
from tiny_tokenizers import TEXT, tiny, tiny_unigram

PIECES = (
    *("the", " quick", " answer", "The", "ing", " a", "x", " 12", "3.5", "2026", " 000", "don't", "</b>", "<s", "Ġ"),
    *(" ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u2028", "\u3000", "\u200b"),
    *("é", "e\u0301", "a\u0308\u0301", "n\u0303", "ﬁ", "½", "Å", "İ", "ß", "ñ"),
    *("東京", "中文字符", "한국어", "ひらがな", "العربية", "हिन्दी", "ไทย", "привет"),
    *("🙂", "👩‍👩‍👧", "👍🏽", "🇩🇪", "❤️", "🏴󠁧󠁢󠁥󠁮󠁧󠁿"),
)


def random_text(draw: random.Random, most: int = 24) -> str:
    """A text of random pieces: words, digits, blanks, combining marks, CJK, emoji, any characters."""
    pieces = []
    for _ in range(draw.randint(1, most)):
        if draw.random() < 0.15:
            code = draw.choice(
                (draw.randrange(0x20, 0x250), draw.randrange(0x250, 0xD800), draw.randrange(0x1F300, 0x1FAFF))
            )
            pieces.append(chr(code))
        else:
            pieces.append(draw.choice(PIECES))
    return "".join(pieces)


@functools.cache
def _digits() -> PreTrainedTokenizerFast:
    """Byte-level BPE that splits digits, trained on other words: merges within characters are many."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = backend_decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([*TEXT[:2], *(piece * 2 for piece in PIECES)] * 4, trainer)
    tokenizer.add_special_tokens(["<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


FAMILIES_OF_TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte_level": tiny,
    "byte_level, single digits": _digits,
    "byte fallback": functools.partial(tiny, kind="metaspace"),
    "unigram": tiny_unigram,
}


@dataclasses.dataclass
class Found:
    """What was compared.

    Args:
        texts: number of texts.
        tokens: tokens of the student, with the ends of turns.
        pairs: of them, those with a partner.
        different: texts that the two tokenizers spell differently.
    """

    texts: int = 0
    tokens: int = 0
    pairs: int = 0
    different: int = 0


def spelled(vocabulary: Vocabulary, ids: Sequence[int], other: str = STUDENT_ONLY) -> list[str]:
    """The spelling of tokens."""
    return vocabulary.spell(ids, other)


def bytes_before(spellings: Sequence[str]) -> list[str]:
    """What stands before each token."""
    return ["".join(spellings[:n]) for n in range(len(spellings))]


def tokens_of(tokenizer: Any, text: str, end: int | None) -> list[int]:
    """The tokens of a text that continues another one, and its end."""
    lead = tokenizer("\n", add_special_tokens=False).input_ids
    ids = tokenizer(f"\n{text}", add_special_tokens=False).input_ids
    ids = ids[len(lead) :] if ids[: len(lead)] == lead else tokenizer(text, add_special_tokens=False).input_ids
    return [*ids, *([] if end is None else [end])]


def check_pair(student: Any, teacher: Any, texts: Sequence[str]) -> Found:
    """Compare the alignment of texts with the common prefixes, token by token.

    Where both sides spell a text alike, the pairs are all tokens before which both have read the same. Otherwise, each
    pair has read the same, or the same follows on both sides.
    """
    found = Found()
    vocabularies = vocabulary_of(student), vocabulary_of(teacher)
    for text in texts:
        sides = []
        for tokenizer, vocabulary, other in zip(
            (student, teacher), vocabularies, (STUDENT_ONLY, TEACHER_ONLY), strict=True
        ):
            symbols = spelled(vocabulary, tokens_of(tokenizer, text, vocabulary.end_of_turn), other)
            sides.append(SpelledRow(symbols, [True] * len(symbols)))
        aligned = align(*sides)
        ours, theirs = (bytes_before(side.spellings) for side in sides)
        pairs = [(t, s) for t, s in enumerate(aligned.positions) if s >= 0]
        whole = ["".join(side.spellings) for side in sides]
        if whole[0] == whole[1]:
            assert aligned.same
            expected = set(map(len, ours)) & set(map(len, theirs))
            assert [len(ours[t]) for t, _ in pairs] == sorted(expected), text
            assert all(ours[t] == theirs[s] for t, s in pairs)
            assert all(aligned.teacher_labels)
            assert pairs[0] == (0, 0)
            assert pairs[-1] == (len(ours) - 1, len(theirs) - 1)
        else:
            assert not aligned.same
            found.different += 1
            for t, s in pairs:
                read, follows = ours[t] == theirs[s], whole[0][len(ours[t]) :] == whole[1][len(theirs[s]) :]
                blanks = ours[t].lstrip() == theirs[s].lstrip()
                assert read or follows or blanks, text
        assert all(one < other for a, b in itertools.pairwise(pairs) for one, other in zip(a, b, strict=True))
        found.texts += 1
        found.tokens += len(ours)
        found.pairs += len(pairs)
    return found
