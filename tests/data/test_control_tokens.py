"""Control tokens inside rows are words, what a template leaves out is counted, and its template is exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chat_templates import FAMILIES
from kd_lightning.data import InstructionDataModule
from kd_lightning.data.conversation import parse_row
from kd_lightning.data.tokenization import TextTokenizer
from tiny_tokenizers import tiny


def turn(role: str, content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def text_tokenizer(name: str, **kwargs: Any) -> TextTokenizer:
    family = FAMILIES[name]
    tokenizer = tiny(family.specials, family.bos, family.eos, kind=family.kind, template=family.template)
    return TextTokenizer(tokenizer, max_length=5000, **kwargs)


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "marked", "zephyr"])
def test_control_tokens_in_a_row_are_words(name: str) -> None:
    text = text_tokenizer(name)
    token = FAMILIES[name].specials[-1]
    forged = {"instruction": f"a{token}b", "output": f"c {token} d"}
    honest = {"instruction": "a b", "output": "c d"}
    special = set(text.tokenizer.all_special_ids) | set(text.tokenizer.added_tokens_decoder)

    def specials(row: dict[str, Any], **kwargs: Any) -> list[int]:
        found = text_tokenizer(name, **kwargs).tokenize(parse_row(row, "row"))
        return [i for i in found["input_ids"] if i in special and i != text.tokenizer.unk_token_id]

    known = text.tokenizer.convert_tokens_to_ids(token)
    assert specials(forged).count(known) == specials(honest).count(known)
    assert specials(forged, allow_special_tokens=True).count(known) == specials(honest).count(known) + 2
    found = text.tokenize(parse_row(forged, "row"))
    assert found["control_tokens"] == 2
    labels = [i for i, is_label in zip(found["input_ids"], found["label_mask"], strict=True) if is_label]
    assert "".join(text.tokenizer.decode(labels).split()).startswith(f"c{token}d")
    _, prompt = text.prompt(parse_row(forged, "row"))
    assert found["input_ids"][: len(prompt)] == prompt


def write(path: Path, row: dict[str, Any]) -> str:
    path.write_text(json.dumps(row) + "\n")
    return str(path)


def test_what_a_template_leaves_out_is_counted(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "red", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    path = write(tmp_path / "a.jsonl", {"messages": [turn("user", "a", mood="calm"), call], "tools": [{"name": "f"}]})
    data = InstructionDataModule(path, tokenizer=text_tokenizer("chatml").tokenizer)
    data.setup("fit")
    counts = data.report["train"]
    assert counts["left_out"] == 1 and counts["unread mood"] == counts["unread tools"] == 1
    thought = {"instruction": "a", "output": "hm</think>forty"}
    assert text_tokenizer("deepseek, asks for thoughts").tokenize(parse_row(thought, "row"))["left_out"] == 1
    assert text_tokenizer("chatml").tokenize(parse_row(thought, "row"))["left_out"] == 0


def test_the_template_of_the_user_is_the_tokenizers_own_afterwards(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"instruction": "a", "output": "b"})
    given, mine = text_tokenizer("chatml").tokenizer, FAMILIES["zephyr"].template
    data = InstructionDataModule(path, tokenizer=given, chat_template=mine)
    data.setup("fit")
    assert data.tokenizer.chat_template == mine and given.chat_template == FAMILIES["chatml"].template


def test_an_added_padding_token_is_never_looked_up(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"instruction": "a", "output": "b"})
    given = text_tokenizer("chatml").tokenizer
    rows = len(given)
    given.add_special_tokens({"pad_token": "[PAD]"})
    data = InstructionDataModule(path, tokenizer=given)
    data.setup("fit")
    assert data.pad_id < rows
