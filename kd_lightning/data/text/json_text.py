"""JSON from files of data: read strictly, so that everything that is accepted can also be cached and tokenized."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

DEEPEST = 200
"""Levels of objects and lists in a row; Python's own limit depends on where it is reached."""
MOST_DIGITS = 4300
"""Integers with as many digits are refused: Python writes only shorter ones."""
_MANY_DIGITS = re.compile(rf"[0-9]{{{MOST_DIGITS}}}")
_SURROGATE = re.compile("[\ud800-\udfff]")
_BETWEEN = re.compile(r"[ \t\r\n,]*")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class JSONError(ValueError):
    """A text that is not JSON, or JSON that cannot be used.

    Args:
        message: what is wrong, for the end of a message that names the text.
        line: line of the text, from 1.
    """

    def __init__(self, message: str, line: int = 1) -> None:
        super().__init__(message)
        self.line = line


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        JSONError: it is not JSON, nested too deeply, or has a number or a string that cannot be written again.
    """
    try:
        value = json.loads(text, parse_int=_integer if _MANY_DIGITS.search(text) else None)
    except json.JSONDecodeError as error:
        raise JSONError(f"broken JSON: {error.msg} at column {error.colno}", error.lineno) from None
    except RecursionError:
        raise JSONError(f"broken JSON: nested too deeply (more than {DEEPEST} levels)") from None
    if text.count("[") + text.count("{") > DEEPEST:
        check_depth(value)
    if _ESCAPED_SURROGATE.search(text):
        check_strings(value)
    return value


def check_depth(value: Any) -> None:
    """Check that a value is nested at most `DEEPEST` levels.

    Raises:
        JSONError: it is nested more deeply.
    """
    level = [value]
    for _ in range(DEEPEST):
        level = [inner for outer in level for inner in _inside(outer) if isinstance(inner, (dict, list, tuple))]
        if not level:
            return
    raise JSONError(f"broken JSON: nested too deeply (more than {DEEPEST} levels)")


def check_strings(value: Any) -> None:
    """Check that all strings, names of fields included, can be written as UTF-8.

    Raises:
        JSONError: one has half of a surrogate pair.
    """
    level = [value]
    while level:
        for text in (item for item in level if isinstance(item, str)):
            if found := _SURROGATE.search(text):
                code = f"\\u{ord(found.group()):04x}"
                raise JSONError(f"broken JSON: a string has {code}, half of a surrogate pair without the other half")
        level = [item for outer in level for item in (*(outer if isinstance(outer, dict) else ()), *_inside(outer))]


def rows_of_list(text: str) -> Iterator[tuple[int, str]]:
    """Line and text of each element of a JSON list, up to one that is broken: to find the element of an error."""
    decoder = json.JSONDecoder(parse_int=_no_integer)
    position, line, counted = text.index("[") + 1, 1, 0
    while True:
        position = _BETWEEN.match(text, position).end()  # type: ignore[union-attr]  # it matches the empty text
        line += text.count("\n", counted, position)
        counted = position
        if position >= len(text) or text[position] == "]":
            return
        try:
            _, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            end = len(text)
        yield line, text[position:end]
        position = end


def _inside(value: Any) -> Any:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, (list, tuple)) else ()


def _no_integer(text: str) -> int:
    return 0


def _integer(text: str) -> int:
    if len(text.lstrip("-")) >= MOST_DIGITS:
        raise JSONError(
            f"broken JSON: an integer has {len(text.lstrip('-'))} digits: at most {MOST_DIGITS - 1} can be read"
        )
    return int(text)
