"""The figures of the pages are those of the results of the benchmarks."""

from __future__ import annotations

import importlib
import json
import re
import statistics
from pathlib import Path

import pytest

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


def test_what_the_first_command_gains_is_what_its_benchmark_found() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "gain.json").read_text(encoding="utf-8"))
    assert sorted({run["seed"] for run in results}) == [0, 1, 2]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for run, title in (("forward KL", "**student after training**"), ("labels", "baseline: labels only, same start")):
        rows = [found["student_after"] for found in results if found["run"] == run]
        (line,) = [line for line in readme.splitlines() if line.startswith(f"| {title}")]
        shown = figures(line)
        for (mean, deviation), key, factor in zip(
            shown, ("nll", "forward_kl", "exact_match"), (1, 1, 100), strict=True
        ):
            values = [factor * row[key] for row in rows]
            assert mean == rounded(statistics.mean(values), mean), (run, key)
            assert deviation == rounded(statistics.stdev(values), deviation), (run, key)


def test_the_picture_of_the_gain_is_drawn_from_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    gain = importlib.import_module("gain")
    results = json.loads((ROOT / "benchmarks" / "results" / "gain.json").read_text(encoding="utf-8"))
    gain.draw(results, tmp_path / "gain.svg")
    assert (tmp_path / "gain.svg").read_text(encoding="utf-8").count("<path") > 10
    table = (ROOT / "benchmarks" / "results" / "gain.md").read_text(encoding="utf-8")
    assert table.splitlines()[1:] == gain.report(results).splitlines()[1:]  # without the line on this machine
