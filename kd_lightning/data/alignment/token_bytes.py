"""The bytes that each token of a tokenizer stands for, read from the tokenizer's own decoder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from kd_lightning.models.hf_adapter import backend_state, normalized

BYTE_LEVEL, METASPACE = "ByteLevel", "Metaspace"
READABLE = (BYTE_LEVEL, METASPACE, "Replace", "ByteFallback", "Fuse", "Strip")
"""Decoders of the `tokenizers` library that leave each token its own bytes."""
SUPPORTED = (
    "supported are byte-level BPE (GPT-2, Llama 3, Qwen, Tekken, tiktoken) and SentencePiece-like BPE or Unigram "
    "(`▁`, `<0xAB>`) with a tokenizer.json"
)
SAMPLES = (
    "The quick brown fox jumps over 12 lazy dogs.",
    "Naïve café, e\u0301; tabs\tand\n\n  indented lines = [1, 2.50]",
    "東京 와 москва 👩‍👩‍👧 done",
)
"""Texts whose tokens are read once, to check the table against the tokenizer itself."""
PROBED = 200  # tokens that are decoded one by one for the same purpose
Reading = Callable[[str], bytes | None]


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """The bytes that each token id stands for; None for special tokens, and for ids without a token.

    They are read from the decoder of the tokenizer (without one, from its pre-tokenizer), and compared with what the
    tokenizer itself encodes and decodes. A token may hold a part of a character.

    Args:
        tokenizer: a Hugging Face tokenizer with a `tokenizer.json`.

    Returns:
        One entry for each id, at least `len(tokenizer)`.

    Raises:
        ValueError: the tokenizer is of a kind whose tokens cannot be read as bytes.
    """
    state = backend_state(tokenizer)
    if state is None:
        raise _unreadable(tokenizer, "it is written in Python")
    backend = json.loads(state)
    read = _reading(tokenizer, backend)
    ids = {**tokenizer.get_vocab()}
    table: list[bytes | None] = [None] * max(len(tokenizer), max(ids.values(), default=-1) + 1)
    added = {token["content"] for token in backend["added_tokens"]} - _tokens_of_model(backend["model"])
    special = special_ids(tokenizer)
    fallback = bool(backend["model"].get("byte_fallback"))
    for token, number in ids.items():
        if fallback and (byte := fallback_byte(token)) is not None:
            table[number] = byte
        elif number not in special:
            table[number] = (token.encode() if token in added else read(token)) or None
    _check(tokenizer, table)
    return table


def bytes_of_ranks(ranks: Mapping[bytes, int], special: Sequence[int] = ()) -> list[bytes | None]:
    """The same table for the ranks of a tiktoken or Tekken file.

    Args:
        ranks: the bytes of each token, and its id.
        special: ids of special tokens.
    """
    table: list[bytes | None] = [None] * (max([*ranks.values(), *special], default=-1) + 1)
    for token, number in ranks.items():
        table[number] = None if number in special else token
    return table


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the special tokens: those that are marked so, and the named ones (bos, eos, pad, unk, …)."""
    marked = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    unknown = tokenizer.unk_token_id
    return {*marked, *tokenizer.all_special_ids, *([] if unknown is None else [unknown])}


def fallback_byte(token: str) -> bytes | None:
    """The byte of a token such as `<0xAB>`; None for another token."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes.fromhex(token[3:5])
        except ValueError:
            return None
    return None


def _reading(tokenizer: PreTrainedTokenizerBase, backend: Mapping[str, Any]) -> Reading:
    """How a token of the vocabulary becomes bytes."""
    model = backend["model"]
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _unreadable(tokenizer, f"its {model['type']} model marks the inside or the end of words")
    decoders = list(_steps(backend["decoder"], "decoders"))
    steps = decoders or list(_steps(backend["pre_tokenizer"], "pretokenizers"))
    kinds = [step["type"] for step in steps]
    if unknown := [kind for kind in kinds if decoders and kind not in READABLE]:
        raise _unreadable(tokenizer, f"its decoder has {unknown[0]}")
    if BYTE_LEVEL in kinds:
        return _byte_level
    replaced = []
    for step in steps:
        if step["type"] == METASPACE:
            replaced.append((step["replacement"], " "))
        elif decoders and step["type"] == "Replace":
            if "String" not in step["pattern"]:
                raise _unreadable(tokenizer, "its decoder replaces a regular expression")
            replaced.append((step["pattern"]["String"], step["content"]))
    if not decoders and not replaced:
        raise _unreadable(tokenizer, "it has no decoder")

    def read(token: str) -> bytes:
        for old, new in replaced:
            token = token.replace(old, new)
        return token.encode(errors="replace")

    return read


def _tokens_of_model(model: Mapping[str, Any]) -> set[str]:
    """The tokens that the model knows: an added one among them (as `▁▁` of Gemma) is read as they are."""
    vocab = model["vocab"]
    return set(vocab) if isinstance(vocab, dict) else {token for token, _ in vocab}


def _steps(part: Mapping[str, Any] | None, name: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a decoder or a pre-tokenizer, without the sequences around them."""
    if part is None:
        return
    if part["type"] == "Sequence":
        for inner in part[name]:
            yield from _steps(inner, name)
    else:
        yield part


def _alphabet() -> dict[str, int]:
    """The byte that each character of the GPT-2 alphabet stands for."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


ALPHABET = _alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([ALPHABET[character] for character in token])
    except KeyError:  # the decoder leaves such a token as it is
        return token.encode()


def _check(tokenizer: PreTrainedTokenizerBase, table: Sequence[bytes | None]) -> None:
    """Compare the table with what the tokenizer encodes and decodes.

    Raises:
        ValueError: they differ.
    """

    def decoded(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    anchor: list[int] = []
    for text in SAMPLES:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        parts = [table[number] for number in ids]
        if None in parts:  # characters that the tokenizer does not know
            continue
        found = b"".join(part or b"" for part in parts).decode(errors="replace")
        if found.strip(" ") not in (text, normalized(tokenizer, text).replace("▁", " ").strip(" ")):
            raise _unreadable(tokenizer, f"the tokens of {text!r} read as {found!r}")
        anchor = anchor or ids
    normal = [number for number, part in enumerate(table) if part is not None and _is_text(part)]
    before = decoded(anchor) if anchor else ""
    for number in normal[:: -(-len(normal) // PROBED) or 1] if anchor else ():
        part = table[number]
        if part is not None and decoded([*anchor, number]) != before + part.decode():
            raise _unreadable(tokenizer, f"token {number} decodes as {decoded([number])!r} and reads as {part!r}")


def _is_text(part: bytes) -> bool:
    try:
        part.decode()
    except UnicodeDecodeError:
        return False
    return True


def _unreadable(tokenizer: PreTrainedTokenizerBase, reason: str) -> ValueError:
    return ValueError(
        f"the tokens of the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r} cannot be read as bytes "
        f"({reason}): {SUPPORTED}"
    )
