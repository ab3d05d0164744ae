"""The figures of the page on losses are those of the benchmarks' results."""

from __future__ import annotations

import re

from locations import ROOT

FIGURE = re.compile(r"(\d+\.\d+) ± (\d+\.\d+)")


def figures(text: str) -> list[tuple[str, str]]:
    return FIGURE.findall(text)


def rounded(value: float, like: str) -> str:
    return f"{value:.{len(like.partition('.')[2])}f}"


def test_every_mean_and_deviation_of_the_page_is_measured() -> None:
    pages = [*sorted((ROOT / "benchmarks" / "results").glob("*.md")), ROOT / "docs" / "measured.md"]
    known = [found for page in pages for found in figures(page.read_text(encoding="utf-8"))]
    shown = figures((ROOT / "docs" / "which_loss.md").read_text(encoding="utf-8"))
    assert len(shown) > 40
    for mean, deviation in shown:
        assert any(
            all(abs(float(rounded(factor * float(one), here)) - float(here)) < tolerance(here) for one, here in pairs)
            for pairs in ([(a, mean), (b, deviation)] for a, b in known)
            for factor in (1, 100)
        ), f"{mean} ± {deviation}"


def tolerance(shown: str) -> float:
    """Half a unit of the last digit: results are rounded before they are rounded again."""
    return 0.51 * 10.0 ** -len(shown.partition(".")[2])
