"""The tiny teacher, student and text that the defaults run on, and the `asset:` scheme that names them."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent
_NAMES = {
    "teacher": "teacher",
    "student": "student",
    "train": "train.jsonl",
    "validation": "validation.jsonl",
    "test": "test.jsonl",
}


def resolve(path: str) -> str:
    """Turn `asset:NAME` into the path of bundled material; any other string comes back unchanged.

    Args:
        path: `asset:teacher`, `asset:student`, `asset:train`, `asset:validation`, `asset:test`, or an ordinary path or
            hub name.

    Raises:
        ValueError: the scheme is `asset:` and the name is none of these.
    """
    scheme, colon, name = path.partition(":")
    if scheme != "asset" or not colon:
        return path
    if name not in _NAMES:
        raise ValueError(f"there is no bundled '{path}'; the names are {', '.join(f'asset:{n}' for n in _NAMES)}")
    return str(_HERE / _NAMES[name])
