"""Text files as documents, and the decoding of lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEXT = "text"
"""The field of a row that is a document."""
SUFFIX = ".txt"


def decode_line(line: bytes, location: str) -> str:
    """A line as text.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{location}: not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}") from None


def read_text_file(name: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """One row: the whole file, unchanged, as its field `text`.

    Args:
        name: of the file, for messages.
        path: of the file.

    Raises:
        ValueError: the file has only blanks, or is not UTF-8.
    """
    lines = path.read_bytes().split(b"\n")
    text = "\n".join(decode_line(line, f"{name}:{number}") for number, line in enumerate(lines, start=1))
    if not text.strip():
        raise ValueError(f"{name}: empty, it has no text: write a text into it, or remove the file")
    yield name, {TEXT: text}


def text_files(source: str, path: Path, others: tuple[str, ...]) -> list[Path]:
    """The `.txt` files of a folder and of the folders in it, in the order of their names; none if there are none.

    Args:
        source: name of the folder, for messages.
        path: of the folder.
        others: suffixes of files with rows.

    Raises:
        ValueError: there are both `.txt` files and files with rows.
    """
    files = sorted(file for file in path.rglob("*") if file.is_file())
    texts = [file for file in files if file.suffix == SUFFIX]
    rows = [file for file in files if file.suffix in others]
    if texts and rows:
        raise ValueError(
            f"{source}: this folder has text files ({texts[0].relative_to(path)}, …) and files with rows "
            f"({rows[0].relative_to(path)}, …): move one of the two kinds into a folder of its own, or name the files"
        )
    return texts


def read_text_folder(source: str, path: Path, files: list[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """One row for each file of `text_files`.

    Raises:
        ValueError: a file has only blanks, or is not UTF-8; the message names it.
    """
    for file in files:
        yield from read_text_file(f"{source.rstrip('/')}/{file.relative_to(path).as_posix()}", file)
