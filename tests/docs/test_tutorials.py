"""The notebooks: executed from top to bottom, saved as they ran, and written with public names alone."""

from __future__ import annotations

import ast
import datetime
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import kd_lightning
from locations import ROOT

BOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
MORE = {"10_a_real_pair"}  # needs a package with weights that nothing else here needs: run by hand, read by the tests
ALONE = [path for path in BOOKS if path.stem not in MORE]
PUBLIC = {
    "kd_lightning": set(kd_lightning.__all__),
    "kd_lightning.integrations.transformers": {"DistillationMixin"},  # not at the top level: it imports the Trainer
}
every_book = pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)


def execute(path: Path, folder: Path) -> None:
    """Run a copy with the script that made the committed outputs; a failed assert in a cell fails it."""
    copy = folder / path.name
    copy.write_bytes(path.read_bytes())
    script = ROOT / "scripts" / "run_notebooks.py"
    env = {**os.environ, "JUPYTER_PLATFORM_DIRS": "1", "HOME": str(folder)}
    result = subprocess.run([sys.executable, str(script), str(copy)], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]


def code(path: Path) -> list[nbformat.NotebookNode]:
    """The cells that run."""
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def of_the_day(day: datetime.date) -> Path:
    """The book that the quick tests run on a day; together they take a quarter of an hour of one core."""
    return ALONE[day.toordinal() % len(ALONE)]


def test_as_many_days_as_there_are_books_run_all_of_them() -> None:
    today = datetime.date.today()
    assert {of_the_day(today + datetime.timedelta(days=n)) for n in range(len(ALONE))} == set(ALONE)
    assert {path.stem for path in BOOKS} == {path.stem for path in ALONE} | MORE


def test_a_book_runs_in_an_empty_folder_each_day_another(tmp_path: Path) -> None:
    execute(of_the_day(datetime.date.today()), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("path", ALONE, ids=lambda path: path.stem)
def test_every_book_runs_in_an_empty_folder(path: Path, tmp_path: Path) -> None:
    execute(path, tmp_path)


@every_book
def test_outputs_are_those_of_one_run_from_top_to_bottom(path: Path) -> None:
    cells = code(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert path.stat().st_size < 800_000


@every_book
def test_every_plot_has_axes_named_and_a_claim_asserted_beside_it(path: Path) -> None:
    plots = [cell.source for cell in code(path) if "plt.show()" in cell.source]
    assert plots
    for source in plots:
        assert "assert " in source and "xlabel" in source and "ylabel" in source, source


@every_book
def test_only_public_names_are_used(path: Path) -> None:
    for cell in code(path):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kd_lightning"):
                assert {alias.name for alias in node.names} <= PUBLIC[str(node.module)]
            if isinstance(node, ast.Import):
                assert not [alias.name for alias in node.names if alias.name.startswith("kd_lightning.")]


@every_book
def test_the_commands_it_ends_with_name_shipped_configs(path: Path) -> None:
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    named = [line.split("--config ")[1].split()[0] for line in text.splitlines() if "--config " in line]
    assert named
    assert [name for name in named if not (ROOT / "configs" / f"{name}.yaml").is_file()] == []


@every_book
def test_it_begins_with_what_one_learns_and_needs_and_ends_with_where_to_go_next(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    assert [word for word in ("You will learn", "You need", "Papers") if f"**{word}**" in cells[0].source] == [
        "You will learn",
        "You need",
        "Papers",
    ]
    ends = [cell.source for cell in cells if "Next:" in cell.source]
    assert len(ends) == 1
    for name in re.findall(r"\]\((?!https)([^)#]+)", "\n".join([cells[0].source, *ends])):
        assert (path.parent / name).exists(), name


@every_book
def test_figures_and_warnings_are_set_by_the_file_that_all_share(path: Path) -> None:
    text = "\n".join(cell.source for cell in code(path))
    assert "quiet()" in text
    for own in ("filterwarnings", "rcParams.update", "setLevel"):
        assert own not in text, own
    assert [int(size) for size in re.findall(r"fontsize=(\d+)", text) if int(size) < 9] == []
