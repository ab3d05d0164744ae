"""Compare runs: `kd-lightning compare ROOT… --output report.md`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kd_lightning.atomic_io import atomic_file
from kd_lightning.cli.command_parser import CommandParser, path_argument
from kd_lightning.console import printable, progress_bar
from kd_lightning.paths import expand_path
from kd_lightning.reporting.figures import as_markdown, curves
from kd_lightning.reporting.markdown import code_span, markdown_table, markdown_text
from kd_lightning.reporting.redaction import redact_text
from kd_lightning.reporting.run_dir import DATA, SHARES, RunFolder, differing, headings, repetitions, resolved_source

CURVES = {
    "val/ce": "validation NLL per answer token",
    "val/forward_kl": "validation forward KL to the teacher",
    "val/agreement": "share of tokens with the same most probable token",
}
ALIGNED = "val/aligned_share"  # logged with two tokenizers
TOKENIZERS = ("model.student", "model.teacher", "data.tokenizer", "data.teacher_tokenizer")  # begin the arguments
SHARED = {"teacher": "teacher", "student_before": "student before"}
SAME = 1e-3  # relative difference: the same rows in batches of another size
Cell: TypeAlias = tuple[float, float] | None  # mean and standard deviation over repetitions (NaN for one run)


def main(args: Sequence[str]) -> int:
    """Compare finished or running runs by their folders. Runs that differ only in seeds are averaged.

    Args:
        args: folders, `--output FILE` for a Markdown page, `--different_data` to allow runs on different rows.

    Raises:
        ValueError: a folder is not that of a run; the runs were evaluated on different rows; the page exists.
    """
    parser = CommandParser(
        prog="kd-lightning compare", description="Compare runs. Runs that differ only in seeds are averaged."
    )
    parser.add_argument("roots", nargs="+", metavar="ROOT", help="folder of a run (--trainer.default_root_dir)")
    parser.add_argument("--output", type=path_argument, help="write a Markdown page with curves to this file")
    parser.add_argument("--different_data", action="store_true", help="allow runs on different rows, with a note")
    given = parser.parse_args(list(args))
    if given.output is not None and given.output.exists():
        raise ValueError(f"--output {given.output} exists: choose another name, or remove it first")
    roots = {Path(expand_path(root)).resolve(): root for root in reversed(given.roots)}  # without duplicates
    runs = [RunFolder.read(root) for root in progress_bar(list(reversed(roots.values())), "Runs")]
    notes = same_rows(runs, given.different_data)
    groups, repeated = other_seeds(repetitions(runs))
    notes += repeated + tokenizer_notes(runs)
    names = titles(groups)
    rows = table(groups, names)
    _print(rows, notes)
    if given.output is not None:
        with atomic_file(given.output) as part:
            part.write_text(page(groups, names, rows, notes), encoding="utf-8")
    return 0


def same_rows(runs: Sequence[RunFolder], allowed: bool) -> list[str]:
    """Notes on data that differ between the runs.

    Raises:
        ValueError: the data differ, and this is not allowed.
    """
    notes = []
    for name in DATA:
        split = f"{name.removeprefix('data.')} rows"
        hashed = all(split in run.rows for run in runs)
        found: dict[str, str] = {}
        for run in runs:
            rows = f" ({run.rows[split]})" if hashed else ""
            found.setdefault(rows or str(resolved_source(run.config.get(name))), f"{run.config.get(name)}{rows}")
        if len(found) > 1:
            notes.append(f"{name} differs: {', '.join(sorted(found.values()))}")
    teachers: dict[str, list[float]] = {}
    for run in runs:
        if run.results is not None and run.results["teacher"] is not None:
            same = repr([run.config.get(name) for name in ("model.teacher", "model.teacher_kwargs")])
            teachers.setdefault(same, []).append(run.results["teacher"]["nll"] or 0.0)
    if any(max(nlls) - min(nlls) > SAME * max(nlls) for nlls in teachers.values()) and not notes:
        notes.append("the results of one teacher differ between the runs: its files, or the test rows, have changed")
    if notes and not allowed:
        raise ValueError(
            f"the runs are not on the same data ({'; '.join(notes)}): pass --different_data to compare them anyway"
        )
    return [f"Not the same data: {note}" for note in notes]


def tokenizer_notes(runs: Sequence[RunFolder]) -> list[str]:
    """A note on runs whose forward KL may be over other outcomes, because teacher and student have two tokenizers."""

    def models(run: RunFolder) -> dict[str, object]:
        named = run.config.items() if ALIGNED in run.scalars else ()
        return {name: resolved_source(value) for name, value in named if name.startswith(TOKENIZERS)}

    if all(models(run) == models(runs[0]) for run in runs):
        return []
    return [
        "Two tokenizers: forward KL is over the tokens that both have, where both have read the same text; compare it "
        "only between runs with the same two tokenizers"
    ]


def other_seeds(groups: Sequence[Sequence[RunFolder]]) -> tuple[list[list[RunFolder]], list[str]]:
    """Drop runs with equal seeds, which are no repetitions.

    Returns:
        The groups, with one run per seed (a finished one if there is one), and a note on each run that was dropped.
    """
    kept, notes = [], []
    for group in groups:
        first: dict[tuple[object, object], RunFolder] = {}
        for run in sorted(group, key=lambda run: not run.ended):
            if run is not first.setdefault(run.seeds, run):
                notes.append(f"Left out: {run.root} has the seed of {first[run.seeds].root}, {run.seeds[0]}")
        kept.append([run for run in group if first[run.seeds] is run])
    return kept, notes


def titles(groups: Sequence[Sequence[RunFolder]]) -> list[str]:
    """A name for each group: the folder's, or the common prefix of the folders'."""
    names = []
    for group in groups:
        folders = [run.root.name for run in group]
        common = folders[0]
        while not all(folder.startswith(common) for folder in folders):
            common = common[:-1]
        names.append(common.rstrip("_-.0123456789") or common or folders[0] if len(group) > 1 else folders[0])
    names = [f"{name} (run)" if name in SHARED.values() else name for name in names]
    return [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]


def table(groups: Sequence[Sequence[RunFolder]], names: Sequence[str]) -> dict[str, dict[str, Cell]]:
    """Mean and standard deviation of the results tables, by row and column; rows that all runs share come first."""
    rows: dict[str, dict[str, Cell]] = {}
    runs = [run for group in groups for run in group]
    for key, title in SHARED.items():
        kept = [run for run in runs if run.results is not None and run.results.get(key) is not None]
        if kept and (key == "teacher" or len({repr((run.results or {})[key]) for run in kept}) == 1):
            rows[title] = _means(kept[:1], key)
    for group, name in zip(groups, names, strict=True):
        finished = [run for run in group if run.results is not None]
        count = f" ({len(finished)} runs)" if len(finished) > 1 else ""
        running = [run for run in group if not run.ended]
        status = f", {len(running)} at step {max(run.step for run in running)}" if running else ""
        status += ", no test rows" if not finished and not running else ""
        rows[f"{name}{count}{status}"] = _means(finished, "student_after")
    return rows


def _means(runs: Sequence[RunFolder], key: str) -> dict[str, Cell]:
    cells: dict[str, Cell] = {}
    tables = [run.results for run in runs if run.results is not None]
    for column in headings(row for table in tables for row in table.values()):
        values = [table[key] for table in tables]
        found = [value.get(column) for value in values if value is not None]
        numbers = [number for number in found if number is not None]
        spread = statistics.stdev(numbers) if len(numbers) > 1 else float("nan")
        cells[column] = (statistics.mean(numbers), spread) if numbers else None
    return cells


def text_of(column: str, cell: Cell, best: Cell) -> str:
    """A cell as text: mean ± standard deviation, and a star if it differs significantly from the best."""
    if cell is None:
        return "–"
    scale, unit = (100, " %") if column in SHARES else (1, "")
    mean, spread = cell
    digits = 1 if unit else 3
    known = spread == spread
    text = f"{mean * scale:.{digits}f}" + (f" ± {spread * scale:.{digits}f}" if known else "") + unit
    if best is None or best == cell or not known or best[1] != best[1]:
        return text
    apart = abs(mean - best[0]) > (spread**2 + best[1] ** 2) ** 0.5
    return f"{text} *" if apart else text


def _cells(rows: dict[str, dict[str, Cell]]) -> list[list[str]]:
    columns = headings(rows.values())
    best: dict[str, Cell] = {}
    for column in columns:
        students = [cells.get(column) for name, cells in rows.items() if name not in SHARED.values()]
        found = [cell for cell in students if cell is not None]
        key = (lambda cell: -cell[0]) if column in SHARES else (lambda cell: cell[0])
        best[column] = min(found, key=key) if found else None
    return [
        [name, *(text_of(column, cells.get(column), best[column]) for column in columns)]
        for name, cells in rows.items()
    ]


EXPLAINED = (
    "Mean ± standard deviation if a run was repeated with other seeds. A star: the difference from the best of the "
    "column exceeds √(s² + s²) of both standard deviations. Without a star, or with one run per row, a difference is "
    "not meaningful."
)


def _print(rows: dict[str, dict[str, Cell]], notes: Sequence[str]) -> None:
    shown = Table(title="test rows")
    for heading in ("run", *headings(rows.values()).values()):
        shown.add_column(heading, justify="left" if heading == "run" else "right")
    for cells in _cells(rows):
        shown.add_row(*(Text(printable(cell)) for cell in cells))
    console = Console()
    console.print(shown)
    for line in (*notes, EXPLAINED):
        console.print(printable(redact_text(line)), highlight=False, markup=False)


def page(
    groups: Sequence[Sequence[RunFolder]],
    names: Sequence[str],
    rows: dict[str, dict[str, Cell]],
    notes: Sequence[str],
) -> str:
    """The comparison as one Markdown page with embedded figures."""
    labeled = (note.partition(": ") for note in notes)
    shown = [f"**{label}**: {markdown_text(redact_text(text))}" for label, _, text in labeled]
    out = [
        "# Runs side by side",
        *shown,
        markdown_table(["run", *headings(rows.values()).values()], _cells(rows)),
        EXPLAINED,
    ]
    changed = differing([group[0] for group in groups])
    if changed:
        cells = [[code_span(name), *(code_span(group[0].method.get(name)) for group in groups)] for name in changed]
        out += ["## What differs", markdown_table(["argument", *names], cells)]
    out.append("## Curves")
    for scalar, title in CURVES.items():
        lines = {
            name if len(group) == 1 else f"{name}, {run.root.name}": run.scalars.get(scalar, [])
            for group, name in zip(groups, names, strict=True)
            for run in group
        }
        if any(lines.values()):
            out.append(as_markdown(curves(lines, title), title))
    folders = [
        f"- {markdown_text(name)}: " + ", ".join(code_span(run.root) for run in group)
        for group, name in zip(groups, names, strict=True)
    ]
    return "\n\n".join([*out, "## Folders", "\n".join(folders)]) + "\n"
