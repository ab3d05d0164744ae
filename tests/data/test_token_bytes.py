"""The bytes of tokens: of byte-level, byte-fallback and Unigram tokenizers; what cannot be read; the vocabulary map."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from chat_templates import FAMILIES
from kd_lightning.data import vocabulary_map
from kd_lightning.data.alignment.token_bytes import bytes_of_ranks, fallback_byte, special_ids, token_bytes
from kd_lightning.data.alignment.vocabulary import same_tokenizer, vocabulary_of
from tiny_tokenizers import TEXT, tiny, tiny_unigram

KINDS = ("byte_level", "metaspace", "unigram")
CHATML, GEMMA = FAMILIES["chatml"], FAMILIES["gemma"]


def made(kind: str, **kwargs: Any) -> PreTrainedTokenizerFast:
    return tiny_unigram(**kwargs) if kind == "unigram" else tiny(kind=kind, **kwargs)


def chatml(**kwargs: Any) -> PreTrainedTokenizerFast:
    return tiny(CHATML.specials, None, "<|im_end|>", template=CHATML.template, **kwargs)


def gemma() -> PreTrainedTokenizerFast:
    return tiny(GEMMA.specials, "<bos>", "<eos>", pad="<eos>", kind="metaspace", template=GEMMA.template)


def extended(tokenizer: PreTrainedTokenizerFast, *tokens: str) -> PreTrainedTokenizerFast:
    """A copy with normal tokens added."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_tokens(list(tokens))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token
    )


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_a_text_are_its_bytes(kind: str) -> None:
    tokenizer = made(kind)
    table = token_bytes(tokenizer)
    assert len(table) == len(tokenizer)
    for text in (TEXT[0], "naïve e\u0301 👩‍👩‍👧 東京\t 12\n\n 3", "½ ｆ " * 3):
        found = b"".join(table[n] or b"" for n in tokenizer(text, add_special_tokens=False).input_ids)
        assert found.decode().removeprefix(" ") == text


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_have_no_bytes(kind: str) -> None:
    tokenizer = made(kind)
    table = token_bytes(tokenizer)
    assert [table[tokenizer.convert_tokens_to_ids(name)] for name in ("<s>", "</s>", "<unk>")] == [None] * 3
    assert all(table[n] is not None for n in range(len(table)) if n not in special_ids(tokenizer))


def test_bytes_of_a_fallback_token() -> None:
    assert [fallback_byte(text) for text in ("<0xAB>", "<0x0a>", "<0xGG>", "<0xABC>", "a")] == [
        b"\xab",
        b"\n",
        None,
        None,
        None,
    ]


def test_ranks_of_a_file_are_bytes_already() -> None:
    assert bytes_of_ranks({b"a": 0, b"\xc3": 2}, special=[3]) == [b"a", None, b"\xc3", None]


def test_normal_tokens_that_were_added_are_their_own_text() -> None:
    tokenizer = extended(tiny(), "<tool_call>", "  é")
    table = token_bytes(tokenizer)
    assert [table[tokenizer.convert_tokens_to_ids(name)] for name in ("<tool_call>", "  é")] == [
        b"<tool_call>",
        "  é".encode(),
    ]


def word_level() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, name_or_path="words")


def word_pieces() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece({"a": 0, "##b": 1, "[UNK]": 2}))
    backend.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=backend, name_or_path="pieces")


@pytest.mark.parametrize(("make", "reason"), [(word_level, "it has no decoder"), (word_pieces, "WordPiece")])
def test_tokens_that_cannot_be_read_are_refused(make: Any, reason: str) -> None:
    tokenizer = make()
    with pytest.raises(ValueError, match=rf"'{tokenizer.name_or_path}'.*{reason}.*supported are byte-level BPE"):
        token_bytes(tokenizer)
    assert vocabulary_map(tokenizer, tokenizer).is_identity


def test_a_table_that_the_tokenizer_contradicts_is_refused() -> None:
    backend = Tokenizer.from_str(tiny().backend_tokenizer.to_str())
    backend.decoder = decoders.Fuse()  # the characters of the alphabet are no text
    with pytest.raises(ValueError, match="read as"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend))


# ---------------------------------------------------------------------------------------------------- vocabulary map
def pairs(student: Any, teacher: Any) -> dict[str, str]:
    known = vocabulary_map(student, teacher)
    ids = zip(known.student_ids.tolist(), known.teacher_ids.tolist(), strict=True)
    return {student.convert_ids_to_tokens(one): teacher.convert_ids_to_tokens(other) for one, other in ids}


def test_partners_have_equal_bytes_and_special_tokens_equal_roles() -> None:
    student, teacher = chatml(), gemma()
    known, tables = vocabulary_map(student, teacher), [token_bytes(student), token_bytes(teacher)]
    assert (known.student_size, known.teacher_size) == (len(student), len(teacher))
    special = {}
    for one, other in zip(known.student_ids.tolist(), known.teacher_ids.tolist(), strict=True):
        assert tables[0][one] == tables[1][other]
        if tables[0][one] is None:
            special[student.convert_ids_to_tokens(one)] = teacher.convert_ids_to_tokens(other)
    assert special == {"<|im_end|>": "<end_of_turn>"}  # the other ends, `<eos>` and padding, have no partner
    shared = {part for part in tables[0] if part} & {part for part in tables[1] if part}
    assert len(known.student_ids) == len(shared) + 1


def test_the_beginning_of_a_text_and_the_end_of_sequence_are_roles() -> None:
    found = pairs(tiny(), tiny(("<bos>", "<eos>", "<pad>"), "<bos>", "<eos>", pad="<pad>"))
    assert (found["<s>"], found["</s>"]) == ("<bos>", "<eos>")
    assert "<unk>" not in found


def test_special_and_normal_tokens_of_one_text_are_no_partners() -> None:
    student, teacher = tiny(), extended(tiny(("<x>", "</x>"), "<x>", "</x>"), "</s>", "<s>")
    found = pairs(student, teacher)
    assert (found["</s>"], "<s>" in found) == ("</x>", True)
    assert "</s>" not in found.values()
    assert "<s>" not in found.values()


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_and_a_copy_of_it_have_the_identity(kind: str) -> None:
    assert vocabulary_map(made(kind), made(kind)).is_identity


def test_a_permuted_vocabulary_gives_the_permutation() -> None:
    tokenizer = tiny()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    size = len(backend["model"]["vocab"])
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0)).tolist()
    order += range(size, len(tokenizer))
    backend["model"]["vocab"] = {token: order[n] for token, n in backend["model"]["vocab"].items()}
    for token in backend["added_tokens"]:
        token["id"] = order[token["id"]]
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)), bos_token="<s>", eos_token="</s>"
    )
    known = vocabulary_map(tokenizer, other)
    assert known.teacher_ids.tolist() == [order[n] for n in known.student_ids.tolist()]
    assert len(known.student_rest) == len(known.teacher_rest) == 1  # `<unk>`


def test_of_tokens_with_the_same_bytes_the_encoded_one_has_the_partner() -> None:
    student, teacher = tiny(), tiny(kind="metaspace")
    assert pairs(student, teacher)["a"] == "a"  # and not `<0x61>`
    assert pairs(teacher, student)["<0x80>"] == "Ģ"
    added = extended(student, "the quick", "Ġbrown fox")  # the second is no token of the text " brown fox"
    known = vocabulary_of(added).partners
    assert known[b"the quick"] == added.convert_tokens_to_ids("the quick")


def test_a_map_is_built_once() -> None:
    assert vocabulary_map(chatml(), gemma()) is vocabulary_map(chatml(), gemma())
    assert vocabulary_map(chatml(), gemma()) is not vocabulary_map(gemma(), chatml())


# ------------------------------------------------------------------------------------------------- the same tokenizer
def test_the_same_tokenizer_is_recognized_by_its_content() -> None:
    one = tiny()
    assert same_tokenizer(one, tiny(template="{{ messages }}", adds_bos=True))
    assert same_tokenizer(one, extended(one, "more"))
    assert same_tokenizer(extended(one, "more"), one)
    assert not same_tokenizer(one, tiny(kind="metaspace"))
    assert not same_tokenizer(one, tiny(("<a>", "</s>"), "<a>"))


def test_other_merges_or_another_normalizer_are_another_tokenizer() -> None:
    one = tiny()
    lower = Tokenizer.from_str(one.backend_tokenizer.to_str())
    lower.normalizer = normalizers.Lowercase()
    assert not same_tokenizer(one, PreTrainedTokenizerFast(tokenizer_object=lower))
    state = json.loads(one.backend_tokenizer.to_str())
    state["model"]["merges"].reverse()
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    assert other.get_vocab() == one.get_vocab()
    assert not same_tokenizer(one, other)
