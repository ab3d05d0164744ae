"""The work for a row is bounded by `max_length`, not by the row, and the kept tokens are those of the whole row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chat_templates import FAMILIES
from kd_lightning.data import InstructionDataModule
from kd_lightning.data.conversation import parse_row
from kd_lightning.data.text import long_rows
from kd_lightning.data.text import text_tokenizer as text_tokenizer_module
from kd_lightning.data.tokenization import TextTokenizer
from tiny_tokenizers import tiny

MEGABYTES = 10_000_000
WORDS = "the answer is forty two, and a story about a little town by the sea "


def filled(size: int) -> str:
    return (WORDS * (size // len(WORDS) + 1))[:size]


class Counting:
    """A tokenizer that counts the characters that it is given."""

    def __init__(self, tokenizer: Any) -> None:
        self.inner, self.characters = tokenizer, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, text: str, **kwargs: Any) -> Any:
        self.characters += len(text)
        return self.inner(text, **kwargs)


def text_tokenizer(name: str = "chatml", max_length: int = 64) -> TextTokenizer:
    family = FAMILIES[name]
    tokenizer = tiny(family.specials, family.bos, family.eos, kind=family.kind, template=family.template)
    return TextTokenizer(tokenizer, max_length=max_length)


def turns(count: int, size: int, **fields: Any) -> list[dict[str, Any]]:
    text = filled(count * size)
    return [
        {"role": ("user", "assistant")[n % 2], "content": text[n * size : (n + 1) * size], **fields}
        for n in range(count)
    ]


LONG_ROWS: dict[str, Any] = {
    "answer": lambda size: {"instruction": "a", "output": filled(size)},
    "question": lambda size: {"instruction": filled(size), "output": "b"},
    "completion": lambda size: {"prompt": "a", "completion": filled(size)},
    "prompt": lambda size: {"prompt": filled(size), "completion": "b"},
    "control tokens": lambda size: {"instruction": "a", "output": "<|im_end|> a" * (size // 12)},
    "one word": lambda size: {"instruction": "a", "output": "ab" * (size // 2)},
    "turns": lambda size: {"messages": turns(10_000, size // 10_000)},
    "short turns": lambda size: {"messages": turns(4_000, size // 40_000, name="x")},
}


@pytest.mark.parametrize("row", LONG_ROWS.values(), ids=LONG_ROWS.keys())
def test_the_tokenizer_gets_a_bounded_part_of_a_row_of_10_megabytes(row: Any) -> None:
    text = text_tokenizer()
    counting = Counting(text.tokenizer)
    text = TextTokenizer(counting, max_length=64)  # type: ignore[arg-type]
    conversation = parse_row(row(MEGABYTES), "row")
    found = text.tokenize(conversation)
    assert len(found["input_ids"]) == 64 and found["full_length"] > 64
    text.prompt(conversation)
    assert counting.characters < 8 * long_rows.SHORT_TEXT


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "marked", "qwen3, drops thoughts"])
@pytest.mark.parametrize("row", [*LONG_ROWS.values()], ids=LONG_ROWS.keys())
def test_the_kept_tokens_are_those_of_the_whole_row(name: str, row: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 60_000  # all of it is tokenized, unless texts of 2,000 characters are long
    conversation = parse_row({"messages": turns(60, 1000)} if "messages" in row(100_000) else row(size), "row")
    whole = text_tokenizer(name)
    expected, prompt = whole.tokenize(conversation), whole.prompt(conversation)
    monkeypatch.setattr(long_rows, "SHORT_TEXT", 2000)
    monkeypatch.setattr(text_tokenizer_module, "MANY_TURNS", 2000)
    found = text_tokenizer(name).tokenize(conversation)
    assert text_tokenizer(name).prompt(conversation) == prompt
    assert found["full_length"] < expected["full_length"]
    for column in ("input_ids", "label_mask", "length", "empty", "excluded"):
        assert found[column] == expected[column], column
    if expected["first_label"] < 64:
        assert found["first_label"] == expected["first_label"]
    else:
        assert found["first_label"] >= 64


def test_a_template_that_rewrites_early_turns_is_rendered_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = "{% for m in messages %}[{{ messages | length }}|{{ m.content }}]{% endfor %}"
    tokenizer = tiny(template=counts)
    conversation = parse_row({"messages": turns(60, 1000)}, "row")
    expected = TextTokenizer(tokenizer, max_length=64).tokenize(conversation)
    monkeypatch.setattr(long_rows, "SHORT_TEXT", 2000)
    monkeypatch.setattr(text_tokenizer_module, "MANY_TURNS", 2000)
    assert TextTokenizer(tokenizer, max_length=64).tokenize(conversation)["input_ids"] == expected["input_ids"]


def test_long_rows_are_reported_as_truncated(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [LONG_ROWS["answer"](400_000), LONG_ROWS["question"](400_000), {"messages": turns(4000, 100)}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = InstructionDataModule(str(path), tokenizer=text_tokenizer().tokenizer, max_length=64)
    data.setup("fit")
    counts = data.report["train"]
    assert (counts["rows"], counts["kept"], counts["truncated"], counts["cut_away"]) == (3, 2, 2, 1)
