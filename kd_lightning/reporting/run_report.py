"""The report of a run, `ROOT/report.md`: one Markdown page with embedded figures."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator

from kd_lightning.constants import moves_objective
from kd_lightning.reporting.figures import as_markdown, curves
from kd_lightning.reporting.markdown import code_block, code_span, markdown_table, markdown_text
from kd_lightning.reporting.run_dir import RunFolder, results_table

SETUP: tuple[str, ...] = (
    "model",
    "data",
    "trainer.max_steps",
    "trainer.max_epochs",
    "trainer.precision",
    "trainer.strategy",
)
SETUP += ("trainer.accumulate_grad_batches", "trainer.gradient_clip_val", "seed_everything", "export.which")
QUALITIES = ("rouge_l", "exact_match", "score", "response_length", "ends", "distinct_2")
CHARTS = {
    "validation NLL per answer token": ("val/ce", "teacher_nll", "student_before_nll", "run_nll"),
    "validation forward KL to the teacher": ("val/forward_kl", "student_before_forward_kl", "run_forward_kl"),
    "share of tokens with the same most likely token": ("val/agreement", "student_before_agreement", "run_agreement"),
}


def page(
    run: RunFolder, rows: dict[str, dict[str, int]], samples: list[dict[str, str]], notes: Iterable[str] = ()
) -> str:
    """The text of the report.

    Args:
        run: the run's folder.
        rows: the data module's report: counts of rows by split.
        samples: test rows, each with its prompt, its answer and the responses by name of the model.
        notes: further warnings.
    """
    out = [f"# {markdown_text(run.root.name)}"]
    if run.results is not None:
        out += ["## Test rows", results_table(run.results)]
    if answers := list(_answers(run)):
        out += ["## Responses to test rows", markdown_table(["", "student", "teacher"], answers)]
    found = [*map(markdown_text, notes), *warnings(run, rows)]
    out += ["## Warnings", "\n".join(f"- {text}" for text in found) or "None."]
    figures = list(_figures(run))
    out += ["## Curves", *(figures or ["No logger saved TensorBoard events or a metrics.csv in this folder."])]
    if samples:
        cells = [[_cell(sample[name]) for name in samples[0]] for sample in samples]
        out += ["## Samples", markdown_table(list(samples[0]), cells)]
    columns = list(dict.fromkeys(name for found in rows.values() for name in found))
    if rows:
        counts = [[split, *(str(found.get(name, 0)) for name in columns)] for split, found in rows.items()]
        out += ["## Rows", markdown_table(["split", *columns], counts)]
    setup = {name: value for name, value in run.config.items() if value is not None and name.startswith(SETUP)}
    out += ["## Setup", markdown_table(["argument", "value"], [[code_span(k), code_span(v)] for k, v in setup.items()])]
    config = shlex.quote(str(run.root / "config.yaml"))
    command = f"kd-lightning fit --config {config} --trainer.default_root_dir ANOTHER_FOLDER"
    out += ["## Reproduce", code_block(command, "sh")]
    return "\n\n".join(out) + "\n"


def _answers(run: RunFolder) -> Iterator[list[str]]:
    """Generation metrics: mean, and ± standard deviation over the seeds if responses were sampled."""
    for name in QUALITIES:
        cells = []
        for who in ("", "teacher_"):
            value, spread = run.last(f"test/{who}{name}"), run.last(f"test/{who}{name}_std")
            cells.append("–" if value is None else f"{value:.3f}" + ("" if spread is None else f" ± {spread:.3f}"))
        if set(cells) != {"–"}:
            yield [name.replace("_", " "), *cells]


def warnings(run: RunFolder, rows: dict[str, dict[str, int]]) -> Iterator[str]:
    """Problems that a reader of the figures must know about."""
    for split, counts in rows.items():
        lost = {name: counts[name] for name in ("empty", "truncated", "cut_away", "unlocated") if counts.get(name)}
        if lost:
            yield f"{split}: {', '.join(f'{count} rows {name}' for name, count in lost.items())}"
    names = (name.removeprefix("schedule/") for name in run.scalars if name.startswith("schedule/"))
    moves = any(moves_objective(name) for name in names)
    first = ("val/forward_kl", "forward KL") if moves else ("val/kd", "loss")
    for scalar, what in (first, ("val/ce", "NLL")):
        curve = run.scalars.get(scalar, [])
        if len(curve) > 1:
            step, lowest = min(curve, key=lambda point: point[1])
            if curve[-1][1] > 1.02 * lowest and run.config.get("export.which") != "best":
                yield (
                    f"validation {what} was lowest at step {step} ({lowest:.3f}) and ends at {curve[-1][1]:.3f}: "
                    "`--export.which best` keeps the lowest"
                )
    table = run.results or {}
    before, after, teacher = (table.get(name) for name in ("student_before", "student_after", "teacher"))
    if before and after and (after["nll"] or 0) > (before["nll"] or 0):
        yield "the student's NLL on the test rows is worse than before training"
    if teacher and before and (teacher["nll"] or 0) > (before["nll"] or 0):
        yield "the teacher's NLL on the test rows is worse than that of the untrained student"


def _figures(run: RunFolder) -> Iterator[str]:
    for title, (scalar, *levels) in CHARTS.items():
        baselines = {name: run.last(f"baseline/{name}") for name in levels}
        known = {name.replace("_", " "): value for name, value in baselines.items() if value is not None}
        if run.scalars.get(scalar):
            yield as_markdown(curves({scalar: run.scalars[scalar]}, title, known), title)
    terms = {name: run.scalars[name] for name in ("train/loss", "train/kd", "train/ce") if run.scalars.get(name)}
    if terms:
        yield as_markdown(curves(terms, "terms of the loss"), "terms of the loss")
    schedules = {name: curve for name, curve in run.scalars.items() if name.startswith("schedule/")}
    if schedules:
        yield as_markdown(curves(schedules, "schedules"), "schedules")


def _cell(text: str) -> str:
    """A text shortened to fit one cell of a table."""
    line = " ".join(text.split())
    return line if len(line) <= 160 else line[:159] + "…"
