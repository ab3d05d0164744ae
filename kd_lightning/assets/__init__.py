"""The tiny teacher, student and text that the defaults run on, and the `asset:` scheme that names them."""

from __future__ import annotations

from pathlib import Path

from kd_lightning.paths import expand_path

_HERE = Path(__file__).parent
_NAMES = {
    "teacher": "teacher",
    "student": "student",
    "student_byte_fallback": "student_byte_fallback",
    "train": "train.jsonl",
    "validation": "validation.jsonl",
    "test": "test.jsonl",
    "context_train": "context_train.jsonl",
    "context_validation": "context_validation.jsonl",
    "context_test": "context_test.jsonl",
    "text_train": "text_train.jsonl",
    "text_validation": "text_validation.jsonl",
    "text_test": "text_test.jsonl",
}


def resolve(path: str) -> str:
    """Turn `asset:NAME` into the path of bundled material; expand `~` and `$VAR` in any other string.

    Args:
        path: `asset:teacher`, `asset:student`, `asset:student_byte_fallback` (with a tokenizer of its own),
            `asset:train`, `asset:validation`, `asset:test`, the same three with `context_` before the name (rows whose
            field `definition` only the teacher reads) or with `text_` (documents), or an ordinary path or hub name.

    Raises:
        ValueError: the scheme is `asset:` and the name is none of these; an environment variable is not set.
    """
    scheme, colon, name = path.partition(":")
    if scheme != "asset" or not colon:
        return expand_path(path)
    if name not in _NAMES:
        raise ValueError(f"there is no bundled '{path}'; the names are {', '.join(f'asset:{n}' for n in _NAMES)}")
    return str(_HERE / _NAMES[name])
