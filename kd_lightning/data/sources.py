"""Files, folders and hub names -> rows, each with its location (for error messages)."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kd_lightning.assets import resolve
from kd_lightning.data.files.csv_rows import DELIMITERS, read_csv
from kd_lightning.data.files.text_files import SUFFIX, decode_line, read_text_file, read_text_folder, text_files
from kd_lightning.data.text.arrow_rows import RowError, arrow_errors, reason, rows_of_batches
from kd_lightning.data.text.json_text import JSONError, check_depth, parse_json, rows_of_list

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", *DELIMITERS)
"""Of files with rows; a file with the suffix .txt is one document."""
SPLIT_NAMES = {
    "train": ("train",),
    "val": ("validation", "val", "valid", "dev", "eval"),
    "test": ("test",),
}


def as_list(sources: str | list[str] | None) -> list[str]:
    """One source, several or none, as a list of texts."""
    return [sources] if isinstance(sources, str) else [os.fspath(source) for source in sources or []]


def read_rows(source: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of one source as (location, row); a location is `file:line`, or `name: row n` if there are no lines.

    Args:
        source: a `.jsonl`, `.json`, `.parquet`, `.csv` or `.tsv` file, a `.txt` file or a folder of such files (each
            is a row with `text`), a folder written by `datasets.save_to_disk`, an `asset:` name, or a `datasets` name:
            `NAME`, `NAME:SPLIT` or `NAME:CONFIG:SPLIT`.
        split: `train`, `val` or `test`: chooses among the splits of a folder or name that has several.

    Raises:
        ValueError: the source is missing, empty, broken, not UTF-8, or of an unknown kind.
    """
    path = Path(resolve(source))
    if path.is_dir():
        rows: Iterator[tuple[str, Any]] = _read_folder(source, path, split)
    elif not path.exists():
        rows = _read_dataset(source, _read_hub(source, split))
    elif path.suffix == ".parquet":
        rows = _numbered(source, _read_parquet(source, path))
    elif path.suffix == ".json" and path.read_bytes()[:4096].lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
        rows = _numbered(source, _read_list(source, path))
    elif path.suffix in DELIMITERS:
        rows = read_csv(source, path)
    elif path.suffix == SUFFIX:
        rows = read_text_file(source, path)
    elif path.suffix in SUFFIXES:
        rows = _read_lines(source, path)
    else:
        kinds = ", ".join((*SUFFIXES, SUFFIX))
        raise ValueError(f"{source}: unknown kind of file {path.suffix!r}, expected one of {kinds}{_way_out(source)}")
    empty = True
    for location, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{location}: a row must be an object with named fields, got {_kind(row)}")
        empty = False
        yield location, row
    if empty:
        raise ValueError(f"{source}: empty, it has no rows")


def _way_out(source: str) -> str:
    """How a file of another kind becomes one that is read."""
    suffix = Path(source).suffix.lower()
    if suffix in ("", SUFFIX, ".text", ".md"):
        return f" (if the file is one document of plain text, give it a name that ends with {SUFFIX})"
    return ' (write a .jsonl file with lines such as {"prompt": TEXT, "completion": TEXT})'


def fingerprint(source: str, split: str) -> str:
    """A text that changes when the source does: the key of a cache.

    Raises:
        ValueError: the source cannot be found.
    """
    path = Path(resolve(source))
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    elif path.exists():
        files = [path]
    else:
        return f"{source} {split} {_read_hub(source, split)._fingerprint}"
    stamps = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([source, split, stamps]).encode()).hexdigest()


def _numbered(source: str, rows: Any) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(rows, start=1):
        yield f"{source}: row {number}", row


def _read_dataset(source: str, rows: Any) -> Iterator[tuple[str, Any]]:
    """The rows of a `datasets.Dataset`; its files may be damaged."""
    number = 0
    try:
        for number, row in enumerate(rows, start=1):
            check_depth(row)
            yield f"{source}: row {number}", row
    except JSONError as error:
        raise ValueError(f"{source}: row {number}: {error}") from None
    except arrow_errors() as error:
        raise ValueError(f"{source}: row {number + 1}: a field {reason(error)}") from None


def _read_lines(source: str, path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            location = f"{source}:{number}"
            text = decode_line(line, location)
            try:
                yield location, parse_json(text)
            except JSONError as error:
                raise ValueError(f"{location}: {error}") from None


def _read_list(source: str, path: Path) -> list[Any]:
    lines = path.read_bytes().split(b"\n")
    text = "\n".join(decode_line(line, f"{source}:{number}") for number, line in enumerate(lines, start=1))
    try:
        rows: list[Any] = parse_json(text)
    except JSONError as error:
        raise ValueError(f"{source}:{_line_of(error, text)}: {error}") from None
    return rows


def _line_of(error: JSONError, text: str) -> int:
    """The line of the first row of a list that has the error; the error's own line if no row alone has it."""
    for line, row in rows_of_list(text):
        try:
            parse_json(row)
        except JSONError as found:
            return line + found.line - 1
    return error.line


def _read_parquet(source: str, path: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    read = 0
    try:
        with pq.ParquetFile(path) as file:
            for number, row in rows_of_batches(file.iter_batches(batch_size=1024), source):
                yield row
                read = number
    except RowError:
        raise
    except arrow_errors() as error:
        at = f" after row {read}" if read else ""
        raise ValueError(f"{source}: not a readable parquet file{at}: {_one_line(error)}") from None


def _read_folder(source: str, path: Path, split: str) -> Iterator[tuple[str, Any]]:
    import datasets  # type: ignore[import-untyped]

    if not (path / "state.json").exists() and not (path / "dataset_dict.json").exists():
        if texts := text_files(source, path, SUFFIXES):
            return read_text_folder(source, path, texts)
        raise ValueError(
            f"{source}: this folder holds no data set saved by datasets.save_to_disk, and no {SUFFIX} files"
        )
    try:
        return _read_dataset(source, _choose_split(datasets.load_from_disk(str(path)), source, split))
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{source}: not a readable data set: {_one_line(error)}") from None


def _read_hub(source: str, split: str) -> Any:
    import datasets

    name, _, rest = source.partition(":")
    missing = "is neither an existing file or folder nor a data set that `datasets` can load"
    if source.endswith((*SUFFIXES, SUFFIX)) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name):
        raise ValueError(f"{split}: {source!r} {missing}: no such file")
    config, _, wanted = rest.rpartition(":")
    try:
        loaded = datasets.load_dataset(name, config or None, split=wanted or None)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{split}: {source!r} {missing}: {_one_line(error)}") from None
    return _choose_split(loaded, source, split)


def _choose_split(loaded: Any, source: str, split: str) -> Any:
    if not isinstance(loaded, dict):
        return loaded
    for name in SPLIT_NAMES[split]:
        if name in loaded:
            return loaded[name]
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    raise ValueError(f"{split}: {source!r} has the splits {', '.join(loaded)}, and none of them is for {split}")


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def cache_folder() -> str:
    """The cache folder of `datasets`."""
    import datasets

    return str(datasets.config.HF_DATASETS_CACHE)
