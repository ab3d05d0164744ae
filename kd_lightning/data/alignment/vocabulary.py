"""Which tokens of two tokenizers are partners: equal bytes, and special tokens of the same role."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from kd_lightning.data.alignment.boundaries import BEGIN, END
from kd_lightning.data.alignment.token_bytes import fallback_byte, token_bytes
from kd_lightning.data.conversation import Conversation
from kd_lightning.data.text.text_tokenizer import TextTokenizer
from kd_lightning.engine.vocabulary_map import VocabularyMap
from kd_lightning.models.hf_adapter import backend_state, is_token_of_model

SAMPLE = Conversation.of([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], first=1)
"""A conversation that shows how a chat template ends an answer, and what it writes before one."""
KEPT = 8  # tokenizers and pairs that are kept in memory


@dataclass(frozen=True)
class Vocabulary:
    """What the tokens of a tokenizer stand for.

    Args:
        table: the bytes of each token; None for special tokens.
        partners: the token that stands for some bytes: of several, the one that encoding produces.
        end_of_turn: the special token with which the chat template ends an answer; without one, the end of sequence.
        end_of_sequence: the end of sequence.
        begin: the token that begins a text, if it is another one.
        size: number of tokens.
    """

    table: Sequence[bytes | None]
    partners: dict[bytes, int]
    end_of_turn: int | None
    end_of_sequence: int | None
    begin: int | None
    size: int

    @property
    def ends(self) -> set[int]:
        """The special tokens that end an answer."""
        return {number for number in (self.end_of_turn, self.end_of_sequence) if number is not None}

    def spell(self, ids: Iterable[int], other: str) -> list[str]:
        """The spelling of each token, as `boundaries` compares them.

        Args:
            ids: the tokens.
            other: the spelling of special tokens without a role.
        """
        ends = self.ends
        found = []
        for number in ids:
            part = self.table[number] if number < len(self.table) else None
            special = END if number in ends else BEGIN if number == self.begin else other
            found.append(special if part is None else part.decode("latin-1"))
        return found


def vocabulary_map(
    student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase
) -> VocabularyMap:
    """The tokens of two tokenizers that stand for the same bytes.

    Special tokens have a partner only by their role: what ends an answer of the chat template, the end of sequence, and
    the beginning of a text; padding has none. Of several tokens with the same bytes, the one that encoding produces has
    the partner. The map of two tokenizers is built once in a process.

    Reduces to the identity for the same tokenizer.

    Args:
        student_tokenizer: a Hugging Face tokenizer.
        teacher_tokenizer: another one.

    Raises:
        ValueError: the tokens of one of them cannot be read as bytes.
    """
    return _maps.get(student_tokenizer, teacher_tokenizer)


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """What the tokens of a tokenizer stand for; read once in a process.

    Raises:
        ValueError: the tokens cannot be read as bytes.
    """
    return _maps.vocabulary(tokenizer)


class _Maps:
    """The last vocabularies and maps, by what the tokenizers contain."""

    def __init__(self) -> None:
        self.vocabularies: dict[str, Vocabulary] = {}
        self.maps: dict[tuple[str, str], VocabularyMap] = {}

    def vocabulary(self, tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
        key = tokenizer_digest(tokenizer)
        if key not in self.vocabularies:
            _forget(self.vocabularies)
            self.vocabularies[key] = _read(tokenizer)
        return self.vocabularies[key]

    def get(self, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> VocabularyMap:
        key = (tokenizer_digest(student), tokenizer_digest(teacher))
        if key not in self.maps:
            _forget(self.maps)
            same = key[0] == key[1]
            self.maps[key] = _identity(student) if same else _map(self.vocabulary(student), self.vocabulary(teacher))
        return self.maps[key]


_maps = _Maps()


def _forget(kept: dict[Any, Any]) -> None:
    while len(kept) >= KEPT:
        kept.pop(next(iter(kept)))


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of everything that a vocabulary depends on."""
    named = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    template = tokenizer.chat_template
    settings = json.dumps([named, template, sorted(tokenizer.all_special_ids)], sort_keys=True, default=str)
    state = backend_state(tokenizer) or json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(f"{state}{settings}".encode(errors="surrogatepass")).hexdigest()


def _identity(tokenizer: PreTrainedTokenizerBase) -> VocabularyMap:
    size = max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)
    return VocabularyMap(torch.arange(size), torch.arange(size), size, size)


def _map(student: Vocabulary, teacher: Vocabulary) -> VocabularyMap:
    pairs = {(number, teacher.partners[part]) for part, number in student.partners.items() if part in teacher.partners}
    used: tuple[set[int], set[int]] = set(), set()
    for roles in (
        (student.end_of_turn, teacher.end_of_turn),
        (student.end_of_sequence, teacher.end_of_sequence),
        (student.begin, teacher.begin),
    ):
        one, other = roles
        if one is not None and other is not None and one not in used[0] and other not in used[1]:
            pairs.add((one, other))
            used[0].add(one)
            used[1].add(other)
    ours, theirs = zip(*sorted(pairs), strict=True) if pairs else ((), ())
    columns = [torch.tensor(ids, dtype=torch.int64) for ids in (ours, theirs)]
    return VocabularyMap(columns[0], columns[1], student.size, teacher.size)


def _read(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    table = token_bytes(tokenizer)
    text = TextTokenizer(tokenizer)
    eos = tokenizer.eos_token_id
    end = eos if (found := _end_of_turn(text, table)) is None else found
    begin = tokenizer.bos_token_id
    begin = None if begin in (end, eos) else begin
    special = [None if number is None or table[number] is not None else int(number) for number in (end, eos, begin)]
    return Vocabulary(table, _partners(tokenizer, table), special[0], special[1], special[2], len(table))


def _end_of_turn(text: TextTokenizer, table: Sequence[bytes | None]) -> int | None:
    """The special token at the end of an answer, as the chat template writes it; None if there is none."""
    try:
        found = text.tokenize(SAMPLE)
    except ValueError:  # no template, or one that refuses a conversation of two turns
        return None
    labels = [number for number, is_label in zip(found["input_ids"], found["label_mask"], strict=True) if is_label]
    return labels[-1] if labels and table[labels[-1]] is None else None


def _partners(tokenizer: PreTrainedTokenizerBase, table: Sequence[bytes | None]) -> dict[bytes, int]:
    """The token for each bytes: of several, the one that encoding produces."""
    found: dict[bytes, int] = {}
    several: dict[bytes, list[int]] = {}
    for number, part in enumerate(table):
        if part is None:
            continue
        if part in found:
            several.setdefault(part, [found[part]]).append(number)
        else:
            found[part] = number
    added = tokenizer.added_tokens_decoder

    def order(number: int) -> tuple[bool, bool, bool, int]:
        is_byte = fallback_byte(str(tokenizer.convert_ids_to_tokens(number))) is not None
        return is_byte, number not in added, not is_token_of_model(tokenizer, number), number

    return found | {part: min(numbers, key=order) for part, numbers in several.items()}


def same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give the same tokens, so that the teacher can read those of the student.

    One of them may have more tokens at the end of its vocabulary. What they put around a text, and their chat
    templates, may differ.
    """
    if student is teacher:
        return True
    by_id = {number: token for token, number in teacher.get_vocab().items()}
    if any(by_id.get(number, token) != token for token, number in student.get_vocab().items()):
        return False
    states = backend_state(student), backend_state(teacher)
    if states[0] is None or states[0] == states[1] or states[1] is None:
        return states[0] == states[1]
    ours, theirs = (json.loads(state) for state in states if state is not None)
    if any(ours[name] != theirs[name] for name in ("normalizer", "pre_tokenizer")):
        return False
    return _same_model(ours["model"], theirs["model"])


def _same_model(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    growing = ("vocab", "merges")
    if any(ours.get(name) != theirs.get(name) for name in {*ours, *theirs} - {*growing, "dropout"}):
        return False
    lists = [name for name in growing if isinstance(ours.get(name), list)]  # a vocabulary of BPE is compared by its ids
    return all(_begins_alike(ours[name], theirs[name]) for name in lists)


def _begins_alike(one: list[Any], other: list[Any]) -> bool:
    shortest = min(len(one), len(other))
    return one[:shortest] == other[:shortest]
