"""Text -> token ids with a label mask."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from kd_lightning.data.text.long_rows import first_size
from kd_lightning.models.hf_adapter import has_offsets

Span = tuple[int, int]
MARGIN = 64  # tokens near a cut of the text may differ from those of the whole text


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span], plain: Sequence[Span] = ()
) -> Iterator[tuple[int, bool]]:
    """Token ids of a text, each with whether it is a label: whether it lies in one of the spans of characters.

    A token that extends beyond its span is a label only if the characters outside are blank; otherwise part of it
    belongs to another turn.

    Args:
        tokenizer: a Hugging Face tokenizer.
        text: may contain special tokens, which are encoded as such.
        spans: (start, end) of the labels, in order.
        plain: (start, end) of the special tokens that are encoded as words, in order.
    """
    if not has_offsets(tokenizer):  # split the text where the spans begin and end
        yield from _encode_pieces(tokenizer, text, spans, plain)
        return
    reached, n = 0, 0
    for token, start, end in _tokens(tokenizer, text, plain):
        start = min(start, reached)  # blanks that the offsets leave out belong to the next token
        reached = max(reached, end)
        while n < len(spans) and spans[n][1] <= start:
            n += 1
        if n == len(spans) or end <= spans[n][0] or start == end:
            yield token, False
            continue
        outside = text[start : max(start, spans[n][0])] + text[min(end, spans[n][1]) : end]
        yield token, not outside.strip()


def encode_start(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span], plain: Sequence[Span], length: int
) -> tuple[list[tuple[int, bool]], bool]:
    """At least the first `length` tokens of a text, with labels as in `encode`, and whether these are all of them.

    The work is bounded for a text that is much longer.
    """
    size = first_size(length)
    while size < len(text):
        found = encode_part(tokenizer, text[:size], spans, plain, length)
        if found is not None:
            return found, False
        size *= 4
    return list(encode(tokenizer, text, spans, plain)), True


def encode_part(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span], plain: Sequence[Span], length: int
) -> list[tuple[int, bool]] | None:
    """At least the first `length` tokens of a text of which only the beginning is given; None if it is too short."""
    inside = [span for span in plain if span[1] <= len(text)]
    found = list(encode(tokenizer, text, spans, inside))
    return found[:-MARGIN] if len(found) >= length + MARGIN else None


def encode_end(tokenizer: PreTrainedTokenizerBase, text: str, plain: Sequence[Span], length: int) -> list[int]:
    """The last `length` tokens of a text, with bounded work for a text that is much longer."""
    size = first_size(length)
    while size < len(text):
        cut = len(text) - size
        inside = [(start - cut, end - cut) for start, end in plain if start >= cut]
        found = [token for token, _ in encode(tokenizer, text[cut:], (), inside)]
        if len(found) >= length + MARGIN:
            return found[-length:]
        size *= 4
    return [token for token, _ in encode(tokenizer, text, (), plain)]


def encode_words(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that continues another one; special tokens inside it are words."""
    if not has_offsets(tokenizer):
        return [token for token, _ in _encode_pieces(tokenizer, text, (), [(0, len(text))])]
    return [token for token, _, _ in _piece(tokenizer, f"\n{text}", 1, len(text) + 1, as_words=True)]


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, plain: Sequence[Span]) -> Iterator[tuple[int, int, int]]:
    """Token ids with the first and the last character of each."""
    edges = [0, *(edge for span in plain for edge in span), len(text)]
    for number, (start, end) in enumerate(itertools.pairwise(edges)):
        if number % 2 == 0:
            yield from _piece(tokenizer, text, start, end, as_words=False)
            continue
        found = list(_piece(tokenizer, text, start, end, as_words=True))
        special = {token for name in [text[start:end]] for token in [tokenizer.convert_tokens_to_ids(name)]}
        if any(token in special for token, _, _ in found):  # the vocabulary has the name as a word, too
            for at in range(start, end):
                yield from _piece(tokenizer, text, at, at + 1, as_words=True)
        else:
            yield from found


def _piece(
    tokenizer: PreTrainedTokenizerBase, text: str, start: int, end: int, as_words: bool
) -> Iterator[tuple[int, int, int]]:
    """Tokens of a part of a text.

    A part that does not begin the text is encoded after a newline, whose tokens are removed again: some tokenizers put
    a blank before everything that they encode.
    """
    if start == end:
        return
    lead = "\n" if start else ""
    skipped = len(tokenizer(lead, add_special_tokens=False).input_ids) if lead else 0
    ids, offsets = _encoded(tokenizer, lead + text[start:end], as_words)
    if lead and ids[:skipped] != tokenizer(lead, add_special_tokens=False).input_ids:
        lead, skipped = "", 0
        ids, offsets = _encoded(tokenizer, text[start:end], as_words)
    for token, (first, last) in zip(ids[skipped:], offsets[skipped:], strict=True):
        yield token, max(start, first + start - len(lead)), last + start - len(lead)


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str, as_words: bool) -> tuple[list[int], list[Span]]:
    words = {"split_special_tokens": True} if as_words else {}
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False, **words)
    return tokens["input_ids"], tokens["offset_mapping"]


def _encode_pieces(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span], plain: Sequence[Span]
) -> Iterator[tuple[int, bool]]:
    edges = sorted({0, len(text), *(edge for span in (*spans, *plain) for edge in span if edge <= len(text))})
    words = {start for start, _ in plain}
    for start, end in itertools.pairwise(edges):
        options = {"split_special_tokens": True} if any(a <= start < b for a, b in plain) and words else {}
        ids = tokenizer(text[start:end], add_special_tokens=False, verbose=False, **options).input_ids
        is_label = any(a <= start < b for a, b in spans)
        yield from ((token, is_label) for token in ids)
