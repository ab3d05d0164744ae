"""Text of data, models and users in Markdown: it shows as it is written, and does nothing else."""

from __future__ import annotations

import html
import random
import re
from html.parser import HTMLParser

import markdown
import pytest

from kd_lightning.console import printable
from kd_lightning.reporting.figures import as_markdown, curves
from kd_lightning.reporting.markdown import Markdown, code_block, code_span, markdown_table, markdown_text

NASTY = [
    "![x](https://host/pixel.png)",
    "[a](javascript:alert(1))",
    "<img src=https://host/p.png>",
    "<script>alert(1)</script>",
    "a | b",
    r"a \| b",
    "\\\\| b",
    "`code` ``more``",
    "```\nout\n```",
    "https://host/x and www.host.org and me@host.org",
    "[1]: https://host",
    "&lt;b&gt; &#x3c;i&#x3e;",
    "# heading",
    "- item",
    "1. item",
    "**bold** _it_ ~~gone~~ $x$",
    "line\n\n| new | table |\n|---|---|",
    "\x1b[31mred\x1b[0m \x07\x00",
    "abc\u202edcba\u2066",
    "half \ud800 pair",
    "<!-- hidden",
    "<details><summary>x",
    "[x][y] ![z]",
    "back\\slash",
]
MARKS = [
    "|",
    "\\",
    "`",
    "<",
    ">",
    "[",
    "]",
    "(",
    ")",
    "!",
    "*",
    "_",
    "&",
    "#",
    "\n",
    " ",
    "a",
    "://",
    "$",
    "~",
    "-",
    "x1",
]


class Page(HTMLParser):
    """Tags of a page, and the texts of its cells."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, list[tuple[str, str | None]]]] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, attrs))
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data.rstrip("\n") if data.endswith("\n") else data


def rendered(text: str) -> Page:
    """As TensorBoard renders Markdown."""
    return Page(markdown.markdown(text, extensions=["markdown.extensions.tables", "markdown.extensions.fenced_code"]))


def shown(text: str) -> str:
    return printable(" ".join(text.split()))


def check(texts: list[str]) -> None:
    page = rendered(markdown_table(["who", "what"], [["x", text] for text in texts]))
    assert {tag for tag, _ in page.tags} <= {"table", "thead", "tbody", "tr", "th", "td"}, texts
    assert all(name == "style" for _, attrs in page.tags for name, _ in attrs)
    assert [cell.strip() for cell in page.cells[3::2]] == [shown(text) for text in texts]
    spans = rendered(markdown_table(["who", "what"], [["x", code_span(text)] for text in texts]))
    assert {tag for tag, _ in spans.tags} <= {"table", "thead", "tbody", "tr", "th", "td", "code"}
    assert [cell.strip() for cell in spans.cells[3::2]] == [shown(text) for text in texts]


def test_cells_show_what_is_written() -> None:
    check(NASTY)


def test_random_cells_show_what_is_written() -> None:
    draw = random.Random(11)
    check(["".join(draw.choices(MARKS, k=draw.randint(1, 14))) + "." for _ in range(1000)])


@pytest.mark.parametrize("text", NASTY)
def test_lines_and_headings(text: str) -> None:
    for page in (rendered(f"# {markdown_text(text)}"), rendered(f"- {markdown_text(text)}")):
        assert {tag for tag, _ in page.tags} <= {"h1", "ul", "li"}
    source = markdown_text(text)
    assert not re.search(r"https?://|www\.|!\[|[<>|`]|[\x00-\x1f\x7f\u202e\ud800]", source)


@pytest.mark.parametrize("text", [*NASTY, "a\n````\nb\n~~~\n<img src=x>", "```", "`" * 9])
def test_blocks_of_code_end_where_they_end(text: str) -> None:
    page = rendered(f"{code_block(text, 'yaml')}\n\nend")
    assert [tag for tag, _ in page.tags] == ["pre", "code", "p"]


def test_what_is_markdown_already_stays() -> None:
    assert markdown_text(Markdown("**a**")) == "**a**"
    assert markdown_table(["a"], [[code_span("b")]]) == "| a |\n| --- |\n| `b` |"
    assert markdown_text("run_1 (3 runs) 2.5 ± 0.1 *") == "run_1 (3 runs) 2.5 ± 0.1 *"
    assert html.unescape(markdown_text("-0.5")) == "-0.5"


def test_figures_of_runs_with_any_name() -> None:
    names = ["a$b$", r"$\frac{", "_hidden", "x\x1b\nline", "half \ud800"]
    assert as_markdown(curves({name: [(0, 1.0), (1, 2.0)] for name in names}, "t", {"$": 1.0}), "t").startswith(
        "![t](data:"
    )
