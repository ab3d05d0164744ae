"""Text files are documents, and CSV files are read as JSON lines are."""

from __future__ import annotations

from pathlib import Path

import pytest

from kd_lightning.data.sources import read_rows


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def test_a_text_file_is_one_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfOnce\r\n\nupon a time\n")
    assert list(read_rows(path, "train")) == [(path, {"text": "Once\r\n\nupon a time\n"})]


def test_a_folder_of_text_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "more/c.txt", "LICENSE"):
        write(tmp_path / "texts" / name, name)
    found = list(read_rows(f"{tmp_path}/texts/", "train"))
    assert [row["text"] for _, row in found] == ["a.txt", "b.txt", "more/c.txt"]
    assert found[2][0] == f"{tmp_path}/texts/more/c.txt"


FOLDERS = {
    "rows beside texts": (
        {"a.txt": "a", "b.jsonl": "{}"},
        r"both|text files \(a.txt, …\) and files with rows \(b.jsonl",
    ),
    "an empty text": ({"a.txt": "a", "b.txt": " \n"}, "texts/b.txt: empty, it has no text"),
    "another encoding": ({"a.txt": b"a\n\xe9"}, "texts/a.txt:2: not UTF-8: byte 0xe9 at column 1"),
    "no texts": ({"a.md": "a"}, "texts: this folder holds no data set saved by .*, and no .txt files"),
}


@pytest.mark.parametrize("case", FOLDERS.values(), ids=FOLDERS.keys())
def test_a_folder_that_cannot_be_read_is_named(case: tuple[dict[str, str | bytes], str], tmp_path: Path) -> None:
    for name, content in case[0].items():
        write(tmp_path / "texts" / name, content)
    with pytest.raises(ValueError, match=case[1]):
        list(read_rows(str(tmp_path / "texts"), "train"))


def test_csv_rows(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.csv",
        b'\xef\xbb\xbfinstruction,input,output\r\n"a, ""b""",,c\r\n\r\n"two\r\nlines",\xc3\xa4,d\r\nlast,e,f',
    )
    assert list(read_rows(path, "train")) == [
        (f"{path}:2", {"instruction": 'a, "b"', "input": None, "output": "c"}),
        (f"{path}:4", {"instruction": "two\r\nlines", "input": "ä", "output": "d"}),
        (f"{path}:6", {"instruction": "last", "input": "e", "output": "f"}),
    ]
    path = write(tmp_path / "rows.tsv", "text\tn\na,b\t1\n")
    assert list(read_rows(path, "train")) == [(f"{path}:2", {"text": "a,b", "n": "1"})]


def test_a_csv_cell_may_be_a_long_document(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "text\n" + "word " * 60_000)
    ((_, row),) = read_rows(path, "train")
    assert len(row["text"]) == 300_000


TABLES = {
    "empty": ("", "rows.csv: empty, it has no rows"),
    "names alone": ("prompt,completion\n", "rows.csv: empty, it has no rows"),
    "another encoding": (b"a,b\nc,\xe9\n", "rows.csv:2: not UTF-8: byte 0xe9 at column 3"),
    "too many cells": (
        "a,b\n\nc,d,e\n",
        "rows.csv:2: a row must have 2 cells, .* got 3|rows.csv:3: a row must have 2 cells",
    ),
    "too few cells": ("a,b\nc\n", "rows.csv:2: a row must have 2 cells, .* got 1"),
    "an open quote": ('a,b\nc,d\n"e,f\ng\n', "rows.csv:3: broken CSV: unexpected end of data"),
    "words behind a quote": ('a,b\n"c"d,e\n', "rows.csv:2: broken CSV: "),
    "no name": ("a,\nc,d\n", "rows.csv:1: the first line must name each field once, got 'a', ''"),
    "a name twice": ("a,a\nc,d\n", "rows.csv:1: the first line must name each field once, got 'a', 'a'"),
    "semicolons": ("prompt;completion\na;b\n", "rows.csv:1: the cells of a .csv file must be separated by commas"),
}


@pytest.mark.parametrize("case", TABLES.values(), ids=TABLES.keys())
def test_a_table_that_cannot_be_read_is_named_with_its_line(case: tuple[str | bytes, str], tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", case[0])
    with pytest.raises(ValueError, match=case[1]) as error:
        list(read_rows(path, "train"))
    assert "\n" not in str(error.value)
