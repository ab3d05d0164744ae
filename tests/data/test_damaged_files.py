"""Values and bytes that cannot be read are refused in one line that names file and line, also in unused fields."""

from __future__ import annotations

import collections
import datetime
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chat_templates import FAMILIES
from kd_lightning.data import ContrastiveDataModule, InstructionDataModule, PromptDataModule
from kd_lightning.data.conversation import parse_row
from kd_lightning.data.sources import read_rows
from tiny_tokenizers import tiny

GOOD = '{"instruction": "a", "output": "b"}\n'


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


def field(value: str, name: str = "x") -> str:
    return f'{{"instruction": "a", "output": "b", "{name}": {value}}}\n'


BAD_VALUES = {
    "lists": (field(nested(500)), "nested too deeply"),
    "objects": (field('{"a": ' * 700 + "1" + "}" * 700), "nested too deeply"),
    "deeper than Python": (field(nested(50_000)), "nested too deeply"),
    "a parsed field": (field('{"a": ' * 600 + "1" + "}" * 600, "chat_template_kwargs"), "nested too deeply"),
    "tools": (field(nested(900), "tools"), "nested too deeply"),
    "integer": (field("7" * 4300), "an integer has 4300 digits"),
    "negative integer": (field("-" + "7" * 10_000), "an integer has 10000 digits"),
    "inner integer": (field('[{"a": [1, ' + "9" * 5000 + "]}]"), "an integer has 5000 digits"),
    "surrogate": (field(r'"a\ud800b"'), r"a string has \\ud800, half of a surrogate pair"),
    "low surrogate": (field(r'{"a": ["\uDC01"]}'), r"a string has \\udc01"),
    "name of a field": (field("1", r"\udbff"), r"a string has \\udbff"),
    "surrogate in an answer": (r'{"instruction": "a", "output": "\ude00"}' + "\n", r"a string has \\ude00"),
}


@pytest.mark.parametrize("case", BAD_VALUES.values(), ids=BAD_VALUES.keys())
@pytest.mark.parametrize("kind", ["lines", "list"])
def test_a_value_that_cannot_be_kept_is_named_with_its_line(kind: str, case: tuple[str, str], tmp_path: Path) -> None:
    line, message = case
    path = tmp_path / ("rows.jsonl" if kind == "lines" else "rows.json")
    path.write_text(GOOD + line + GOOD if kind == "lines" else f"[{GOOD}, {line}, {GOOD}]")
    where = "rows.jsonl:2" if kind == "lines" else "rows.json:2"
    with pytest.raises(ValueError, match=f"{where}: broken JSON: {message}") as error:
        list(read_rows(str(path), "train"))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("module", [InstructionDataModule, PromptDataModule, ContrastiveDataModule])
def test_every_data_module_refuses_it(module: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b", "chosen": "c", "rejected": "d"}\n' + field(nested(600)))
    with pytest.raises(ValueError, match=r"rows.jsonl:2: broken JSON: nested too deeply"):
        module(str(path), tokenizer=tiny(template=FAMILIES["zephyr"].template)).setup("fit")


def test_what_can_be_kept_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    texts = [nested(150), "7" * 4299, r'"\ud83d\ude00 \\ud800"', "1" + "0" * 4200 + ".5", '"' + "7" * 9000 + '"']
    path.write_text("".join(map(field, texts)))
    data = InstructionDataModule(str(path), tokenizer=tiny(template=FAMILIES["zephyr"].template))
    data.setup("fit")
    assert data.report["train"]["kept"] == len(texts)


@pytest.mark.parametrize("text", ['{"a": ' + "8" * 4400 + "}", r'{"a": "\ud901"}', '{"a": ' * 400 + "1" + "}" * 400])
def test_json_inside_a_field_is_read_as_strictly(text: str) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": text}}]}
    for row in ({"messages": [{"role": "user", "content": "a"}, call]}, {"messages": [call], "tools": f"[{text}]"}):
        with pytest.raises(ValueError, match=r"^a:3: field '(messages|tools)'.* broken JSON"):
            parse_row(row, "a:3")


# ------------------------------------------------------------------------------------------------------------- parquet
def table(**columns: Any) -> Any:
    return pa.table({"instruction": ["a"] * 5, "output": ["b"] * 5, **columns})


def raw_strings(values: list[bytes]) -> Any:
    return pa.array(values, pa.binary()).view(pa.string())


FAR = 400_000_000  # days and seconds from 1970: beyond the year 9999
BAD_COLUMNS: dict[str, Callable[[], Any]] = {
    "date32": lambda: pa.array([0, 1, FAR, 3, 4], pa.int32()).cast(pa.date32()),
    "timestamp": lambda: pa.array([0, 1, FAR * 86_400, 3, 4]).cast(pa.timestamp("s")),
    "negative timestamp": lambda: pa.array([0, 1, -FAR * 86_400, 3, 4]).cast(pa.timestamp("s")),
    "inside a list": lambda: pa.array([[0], [1], [2, FAR], [], None], pa.list_(pa.int32())).cast(pa.list_(pa.date32())),
    "not UTF-8": lambda: raw_strings([b"a", b"b", b"\xff\xfe", b"d", b"e"]),
    "cut UTF-8": lambda: raw_strings([b"a", b"b", "ä".encode()[:1], b"d", b"e"]),
    "surrogate": lambda: raw_strings([b"a", b"b", b"\xed\xa0\x80", b"d", b"e"]),
}


@pytest.mark.parametrize("column", BAD_COLUMNS.values(), ids=BAD_COLUMNS.keys())
def test_a_value_of_a_parquet_file_that_cannot_be_read_is_named_with_its_row(column: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(table(unused=column()), path)
    data = InstructionDataModule(str(path), tokenizer=tiny(template=FAMILIES["zephyr"].template))
    with pytest.raises(ValueError, match=r"rows.parquet: row 3: field 'unused' (is not UTF-8|cannot be read)") as error:
        data.setup("fit")
    assert "\n" not in str(error.value)


def test_a_value_of_a_saved_data_set_that_cannot_be_read_is_named_with_its_row(tmp_path: Path) -> None:
    folder = str(tmp_path / "folder")
    datasets.Dataset(table(unused=BAD_COLUMNS["not UTF-8"]())).save_to_disk(folder)
    with pytest.raises(ValueError, match="folder: row 3: a field is not UTF-8: byte 0xff"):
        list(read_rows(folder, "train"))


def test_a_deep_type_of_a_parquet_file(tmp_path: Path) -> None:
    value: Any = 1
    for _ in range(250):
        value = [value]
    pq.write_table(table(unused=pa.array([None, None, None, None, value])), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"rows.parquet: (row 5: broken JSON: nested too|not a readable parquet file)"):
        list(read_rows(str(tmp_path / "rows.parquet"), "train"))


# ---------------------------------------------------------------------------------------------------------------- fuzz
def rows(rng: random.Random) -> list[dict[str, Any]]:
    texts = ["a", "the sea 🙂", "", "x" * 300, "<|im_end|>"]
    found: list[dict[str, Any]] = []
    for n in range(40):
        turns = [{"role": "user", "content": rng.choice(texts)}, {"role": "assistant", "content": f"red {n}"}]
        found.append({"messages": turns, "n": n, "when": datetime.date(2020, 1, 1 + n % 28), "note": rng.choice(texts)})
    return found


def flipped(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 3, 20])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(content: bytes, rng: random.Random) -> bytes:
    begin, end = sorted(rng.randrange(len(content)) for _ in range(2))
    return rng.choice([content[:end], content[begin:], content[:begin] + content[end:]])


def doubled(content: bytes, rng: random.Random) -> bytes:
    begin, end = sorted(rng.randrange(len(content)) for _ in range(2))
    return content[:end] + content[begin:]


ODD = [3, -1.5, True, [], {}, [[]], "", None, "\ud800", 10**4500, float("nan"), [None], {"role": 3}, "\0"]


def retyped(content: bytes, rng: random.Random) -> bytes:
    """A line with another value, deeper or in the place of a field."""
    lines = content.decode().splitlines()
    at = rng.randrange(len(lines))
    row = json.loads(lines[at])
    value: Any = rng.choice(ODD)
    text = "9" * 4500 if value == 10**4500 else json.dumps(value)
    if rng.random() < 0.3:
        text = nested(rng.choice([10, 300, 3000]))
    name = rng.choice(list(row))
    target = row
    if name == "messages" and rng.random() < 0.8:
        target = rng.choice(row["messages"])
        name = rng.choice(["role", "content", "tool_calls", "weight", "name"])
    target[name] = "PLACEHOLDER"
    lines[at] = json.dumps(row).replace('"PLACEHOLDER"', text)
    return "\n".join(lines).encode()


def write_rows(path: Path, content: list[dict[str, Any]]) -> bytes:
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(content).to_parquet(path)
    elif path.suffix == ".csv":
        path.write_text("instruction,output\n" + "".join(f"{row['n']},b\n" for row in content))
    else:
        lines = [json.dumps(row, default=str) for row in content]
        path.write_text("[" + ",\n".join(lines) + "]" if path.suffix == ".json" else "\n".join(lines))
    return path.read_bytes()


@pytest.mark.slow
def test_damaged_files_load_or_are_refused_in_one_line(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    rng, outcomes = random.Random(20261128), collections.Counter[str]()
    tokenizer = tiny(FAMILIES["chatml"].specials, None, "<|im_end|>", template=FAMILIES["chatml"].template)
    for number in range(240):
        suffix = (".jsonl", ".parquet", ".json", ".jsonl", ".parquet", ".jsonl", ".parquet", ".csv")[number % 8]
        path = tmp_path / f"rows-{number}{suffix}"
        content = write_rows(path, rows(rng))
        changes = [flipped, cut, doubled, *([retyped] * 3 if suffix == ".jsonl" else [])]
        path.write_bytes(rng.choice(changes)(content, rng))
        data = InstructionDataModule(str(path), tokenizer=tokenizer)
        try:
            data.setup("fit")
            outcomes[f"{suffix} loaded"] += 1
        except ValueError as error:
            assert path.name in str(error) and "\n" not in str(error) and len(str(error)) < 600, error
            outcomes[f"{suffix} refused"] += 1
        path.unlink()
    record_property("outcomes", dict(outcomes))
    assert all(outcomes[f"{suffix} refused"] for suffix in (".jsonl", ".parquet", ".json", ".csv"))
    assert outcomes[".jsonl loaded"] and outcomes[".parquet loaded"]
