"""Markdown of reports and TensorBoard: text of data, models and users is escaped, so that it shows as it is written."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kd_lightning.console import printable


class Markdown(str):
    """A text that is Markdown already, and is not escaped again."""


# Entities and not backslashes: no reader of Markdown takes an entity for a mark, and none splits a table at `&#124;`.
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", **{mark: f"&#{ord(mark)};" for mark in "\\`|[]~$"}})
_EMPHASIS = re.compile(r"(?<=\S)\*|\*(?=\S)|^\*|(?<!\w)_|_(?!\w)")
_LINK = re.compile(r":(?=//)|(?<=www)\.|(?<=\w)@(?=\w)|(?<=mailto):|(?<=xmpp):", re.IGNORECASE)
_AT_START = re.compile(r"^(?:#|[-+=](?=[-+=]*(?:\s|$))|(?<=^)\d{1,9}[.)](?=\s|$))")


def markdown_text(text: str) -> str:
    """A text as one line of Markdown that shows it unchanged: no links, images, HTML, emphasis or table cells.

    A text that is `Markdown` already is returned unchanged.
    """
    if isinstance(text, Markdown):
        return text
    line = printable(" ".join(str(text).split())).translate(_ENTITIES)
    line = _EMPHASIS.sub(_entity, _LINK.sub(_entity, line))
    return Markdown(_AT_START.sub(lambda found: f"{found[0][:-1]}&#{ord(found[0][-1])};", line))


def code_span(text: object) -> Markdown:
    """A text as code inside of a line or of a table."""
    line = printable(" ".join(str(text).split()))
    if line and not re.search(r"[`|\\<>&]", line):  # Python-Markdown, which TensorBoard uses, reads HTML in code too
        return Markdown(f"`{line}`")
    inside = markdown_text(line).replace("*", "&#42;").replace("_", "&#95;")
    return Markdown(f"<code>{inside}</code>")


def code_block(text: str, language: str = "") -> Markdown:
    """A text as a block of code, whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markdown(f"{fence}{language}\n{printable(text)}\n{fence}")


def markdown_table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table in Markdown.

    Args:
        header: title of each column; escaped.
        cells: text of each cell, row by row; escaped unless it is `Markdown`.
    """
    rule = [Markdown("---")] + [Markdown("---:")] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(map(markdown_text, line))} |" for line in [header, rule, *cells])


def _entity(found: re.Match[str]) -> str:
    return f"&#{ord(found[0])};"
