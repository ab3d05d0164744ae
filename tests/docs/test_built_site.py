"""The built site: it builds strictly, every page is whole without a network, and notebooks are pages of it."""

from __future__ import annotations

import html
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kd_lightning
from kd_lightning.cli.command_parser import OTHER_COMMANDS
from locations import ROOT

NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))


def hook(name: str) -> dict[str, Any]:
    """What a module of `docs/` that shapes the site defines."""
    return runpy.run_path(str(ROOT / "docs" / f"{name}.py"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_it_builds_strictly_and_names_are_where_links_expect_them(site: Path) -> None:
    """Links and anchors inside pages are checked by the strict build itself; here, what docstrings turned into."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(site.rglob("*.html")))
    for name in set(kd_lightning.__all__) - {"__version__"}:
        assert f'id="kd_lightning.{name}"' in text, name
    assert ".. math::" not in text
    assert not re.search(r"<p>[^<]*\\\(", text), "a formula was left as text"


def test_blocks_and_papers_of_docstrings_become_markdown() -> None:
    given = "One line:\n\n  .. math:: a = \\frac12,\n    b\n\n  arXiv 1503.02531."
    want = "One line:\n\n  \\[ a = \\frac12, b \\]\n\n  [arXiv 1503.02531](https://arxiv.org/abs/1503.02531)."
    assert hook("docstrings")["markdown"](given) == want


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_is_a_page_with_its_figures_and_formulas(site: Path, path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    page = (site / "tutorials" / f"{path.stem}.html").read_text(encoding="utf-8")
    article = page[page.index("<article") : page.index("</article>")]
    figures = re.findall(r'<img [^>]*src="([^"]+)"', article)
    assert len(figures) == sum("image/png" in output.get("data", {}) for output in outputs)
    assert len(set(figures)) == len(figures)
    printed = len(re.findall(r'<div class="[^"]*output', article))
    assert printed == len(outputs) - len(figures)
    prose = re.sub(
        r"<(pre|code)\b.*?</\1>|<(?:span|div) class=\"arithmatex\">.*?</(?:span|div)>", "", article, flags=re.S
    )
    assert "$" not in prose
    left = re.findall(r"^(?:<p>)?(?:[-*|#] ?|\d+\. )\w.*", prose, re.M)
    assert not left, f"left as text, because a blank line is missing before it: {left}"
    assert article.count("<h1") == 1


def test_links_of_a_checkout_lead_to_pages_of_the_site() -> None:
    site_links = hook("notebooks")["site_links"]
    book = "[a](02_two.ipynb) [b](../docs/x.md#y) [c](../docs/reference/z.md)"
    assert site_links(book, "tutorials/01_one.md") == "[a](02_two.md) [b](../x.md#y) [c](../reference/z.md)"
    assert site_links("[a](../tutorials/02_two.ipynb)", "x.md") == "[a](tutorials/02_two.md)"
    assert site_links("[a](../../tutorials/02_two.ipynb)", "reference/x.md") == "[a](../tutorials/02_two.md)"


def test_the_page_of_the_commands_shows_their_help(site: Path) -> None:
    page = html.unescape((site / "reference" / "commands.html").read_text(encoding="utf-8"))
    for command in ("fit", *OTHER_COMMANDS):
        assert f"usage: kd-lightning {command} " in page, command
    for argument in ("--model.temperature", "--data.packing", "--trainer.devices", "--export.which", "--ckpt_path"):
        assert re.search(rf"^  {argument}\s", page, re.MULTILINE), argument


def test_every_page_is_whole_without_a_network(site: Path) -> None:
    for path in sorted(site.rglob("*.html")):
        text = path.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|link[^>]*rel="(?:stylesheet|icon)")[^>]*(?:src|href)="([^"]+)"', text)
        assert any("katex" in name for name in loaded), path
        for name in loaded:
            assert "://" not in name, (path, name)
            assert path.name == "404.html" or (path.parent / name.split("?")[0]).exists(), (path, name)


def test_formulas_are_such_that_katex_reads(site: Path) -> None:
    """Balanced, and nothing of Markdown left in them."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(site.rglob("*.html")))
    formulas = re.findall(r'class="arithmatex">(.*?)</(?:span|div)>', text, re.DOTALL)
    assert len(formulas) > 80
    for formula in formulas:
        assert "<" not in formula, formula
        bare = re.sub(r"\\[{}]", "", formula)
        assert bare.count("{") == bare.count("}"), formula
