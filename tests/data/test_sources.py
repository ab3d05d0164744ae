"""Every kind of file gives the same rows, and a bad one is named with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from kd_lightning.data.conversation import parse_row
from kd_lightning.data.sources import read_rows

ROWS: list[dict[str, Any]] = [
    {"instruction": "a", "input": "ä", "output": "b", "extra": 1},
    {"instruction": "c", "input": None, "output": "d", "extra": None},
]


def rows_of(source: Path | str, split: str = "train") -> list[dict[str, Any]]:
    return [row for _, row in read_rows(str(source), split)]


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(ROWS)
    write(tmp_path / "rows.jsonl", lines(ROWS))
    write(tmp_path / "marked.jsonl", b"\xef\xbb\xbf" + lines(ROWS).encode())
    write(tmp_path / "lines.json", "\n" + lines(ROWS).replace("\n", "\r\n\r\n"))
    write(tmp_path / "rows.json", " \n" + json.dumps(ROWS, indent=2))
    data.to_parquet(tmp_path / "rows.parquet")
    data.save_to_disk(str(tmp_path / "folder"))
    for source in sorted(tmp_path.iterdir()):
        assert rows_of(source) == ROWS, source


def test_locations_name_line_or_row(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", "\n" + lines(ROWS))
    assert [location for location, _ in read_rows(path, "train")] == [f"{path}:2", f"{path}:3"]
    path = write(tmp_path / "rows.json", json.dumps(ROWS))
    assert [location for location, _ in read_rows(path, "train")] == [f"{path}: row 1", f"{path}: row 2"]


def test_a_bundled_name() -> None:
    assert {"instruction", "output", "task"} <= set(rows_of("asset:test")[0])
    with pytest.raises(ValueError, match="asset:trian"):
        rows_of("asset:trian")


def test_a_folder_of_several_splits(tmp_path: Path) -> None:
    parts = {
        name: datasets.Dataset.from_list([{"instruction": name, "output": "b"}]) for name in ("train", "validation")
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "both"))
    assert rows_of(tmp_path / "both", "train")[0]["instruction"] == "train"
    assert rows_of(tmp_path / "both", "val")[0]["instruction"] == "validation"
    with pytest.raises(ValueError, match="has the splits train, validation, and none of them is for test"):
        rows_of(tmp_path / "both", "test")
    datasets.DatasetDict({"only": parts["train"]}).save_to_disk(str(tmp_path / "one"))
    assert rows_of(tmp_path / "one", "test")[0]["instruction"] == "train"


GOOD = lines(ROWS[:1])
BAD_FILES = {
    "empty": ("rows.jsonl", "", "rows.jsonl: empty"),
    "blank": ("rows.jsonl", "\n \n", "rows.jsonl: empty"),
    "empty list": ("rows.json", "[]", "rows.json: empty"),
    "broken line": ("rows.jsonl", GOOD + "{oops\n", "rows.jsonl:2: broken JSON: .* at column 2"),
    "cut line": ("rows.jsonl", GOOD + '{"instruction": "a', "rows.jsonl:2: broken JSON"),
    "broken list": ("rows.json", '[\n{"instruction": "a"},\n{oops}]', "rows.json:3: broken JSON"),
    "not UTF-8": ("rows.jsonl", GOOD.encode() + b'{"a": "\xff"}', "rows.jsonl:2: not UTF-8: byte 0xff at column 8"),
    "list, not UTF-8": ("rows.json", b'[\n"\xe9"]', "rows.json:2: not UTF-8"),
    "no object": ("rows.jsonl", GOOD + "[1]\n", "rows.jsonl:2: a row must be an object with named fields, got list"),
    "null": ("rows.json", "[null]", "rows.json: row 1: .* got null"),
    "deep": ("rows.jsonl", "[" * 100_000, "rows.jsonl:1: broken JSON: nested too deeply"),
    "plain text": ("rows.md", "Once", "if the file is one document of plain text, give it a name that ends with .txt"),
    "upper case": ("rows.TXT", "Once", "rows.TXT: unknown kind of file .*give it a name that ends with .txt"),
    "table": ("rows.xlsx", "a", 'write a .jsonl file with lines such as {"prompt": TEXT, "completion": TEXT}'),
    "unknown kind": (
        "rows.xml",
        "a",
        "rows.xml: unknown kind of file '.xml', expected one of .jsonl, .*, .csv, .tsv, .txt",
    ),
    "no parquet": ("rows.parquet", "hello", "rows.parquet: not a readable parquet file"),
}


@pytest.mark.parametrize("case", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_is_named_with_its_line(case: tuple[str, str | bytes, str], tmp_path: Path) -> None:
    name, content, message = case
    with pytest.raises(ValueError, match=message) as error:
        rows_of(write(tmp_path / name, content))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["/nowhere/rows.jsonl", "rows.jsonl", "rows.csv", "./nowhere", "a/b/c", "no such name"]
)
def test_a_missing_file_is_not_looked_for_elsewhere(name: str) -> None:
    with pytest.raises(ValueError, match=f"train: '{name}' is neither an existing file or folder nor .*no such file"):
        rows_of(name)


@pytest.mark.parametrize("name", ["nobody/nothing", "nobody/nothing:train", "nobody/nothing:main:train"])
def test_a_name_that_datasets_cannot_load(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is neither an existing file or folder nor") as error:
        rows_of(name)
    assert "\n" not in str(error.value)


def test_a_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this folder holds no data set saved by"):
        rows_of(tmp_path)
    write(tmp_path / "state.json", "{}")
    with pytest.raises(ValueError, match="not a readable data set"):
        rows_of(tmp_path)


USER = {"role": "user", "content": "a"}
BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    ({}, "a row needs 'instruction'.*'prompt' and 'completion'; 'messages'; or 'text'; this one has no fields"),
    ({"question": "a", "answer": "b"}, "this one has 'question', 'answer'"),
    ({"instruction": "a"}, "this one has 'instruction'"),
    ({"instruction": "a", "output": None}, "this one has 'instruction'"),
    ({"instruction": 3, "output": "b"}, "field 'instruction' must be a string, got int"),
    ({"instruction": "a", "output": ["b"]}, "field 'output' must be a string, got list"),
    ({"instruction": "a", "input": 1.5, "output": "b"}, "field 'input' must be a string, got float"),
    ({"prompt": "a", "completion": [USER]}, "field 'completion' must be a string, got list"),
    ({"prompt": [USER], "completion": "b"}, "field 'completion' must be a list, got str"),
    ({"messages": "hello"}, "field 'messages' must be a list, got str"),
    ({"messages": []}, "field 'messages' must hold at least one message"),
    ({"messages": ["hello"]}, "message 1: must be an object with 'role' and 'content', got str"),
    ({"messages": [USER, {"content": "a"}]}, "message 2: 'role' must be a string, got None"),
    (
        {"messages": [{"role": "user", "content": 3}]},
        "message 1: 'content' must be a string or a list of parts, got int",
    ),
    ({"messages": [USER], "tools": "[oops"}, "field 'tools' is broken JSON"),
    ({"messages": [USER], "tools": [1]}, "field 'tools' must be a list of objects"),
    ({"messages": [USER], "chat_template_kwargs": 1}, "field 'chat_template_kwargs' must be an object, got int"),
]


@pytest.mark.parametrize("case", BAD_ROWS, ids=lambda case: case[1][:40])
def test_a_bad_row_is_named_with_its_field(case: tuple[dict[str, Any], str]) -> None:
    row, message = case
    with pytest.raises(ValueError, match=f"^rows.jsonl:7: .*{message}"):
        parse_row(row, "rows.jsonl:7")


def test_an_instruction_is_one_user_turn() -> None:
    conversation = parse_row({"instruction": "Define.", "input": "cat", "output": "an animal"}, "row")
    assert conversation.question == [{"role": "user", "content": "Define.\ncat"}]
    assert conversation.answer == "an animal"
    assert parse_row({"instruction": "Define.", "input": "", "output": "b"}, "row").question[0]["content"] == "Define."


def test_answers_of_parts() -> None:
    parts = [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]
    conversation = parse_row({"messages": [USER, {"role": "assistant", "content": parts}]}, "row")
    assert conversation.answer == "bc" and not conversation.empty


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "a", "output": " \n"},
        {"prompt": "a", "completion": ""},
        {"messages": [USER]},
        {"messages": [USER, {"role": "assistant", "content": ""}]},
        {"prompt": [USER, {"role": "assistant", "content": "b"}], "completion": [USER]},
    ],
)
def test_a_row_without_an_answer_is_empty(row: dict[str, Any]) -> None:
    assert parse_row(row, "row").empty
