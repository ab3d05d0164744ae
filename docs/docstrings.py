"""Docstrings as the site shows them: `.. math::` blocks become display formulas, numbers of papers become links."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from griffe import Extension, Object

BLOCK = re.compile(
    r"^(?P<indent>[ ]*)\.\. math::(?P<body>.*(?:\n(?:(?P=indent)[ ]+\S.*|[ ]*(?=\n(?P=indent)[ ]+\S)))*)", re.M
)
PAPER = re.compile(r"\barXiv (\d{4}\.\d{5})\b")


def markdown(text: str) -> str:
    """What a docstring says, in Markdown."""

    def display(found: re.Match[str]) -> str:
        body = " ".join(textwrap.dedent(line).strip() for line in found["body"].splitlines()).strip()
        return f"{found['indent']}\\[ {body} \\]"

    return PAPER.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", BLOCK.sub(display, text))


class Docstrings(Extension):
    """Applies `markdown` to every docstring that is read."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
