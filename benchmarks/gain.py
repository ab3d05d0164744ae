"""What the first command of the README gains: distillation and labels alone, from the same student, at equal steps.

Trains the bundled student with the config `quickstart`, and with all weight on the labels (`--model.ce_weight 1`).
Every run is a separate process, evaluated on the bundled test rows.

    python benchmarks/gain.py --seeds 0 1 2 --output build/gain --figure docs/images/gain.svg

writes OUTPUT/results.json after each run (a repeated call resumes), OUTPUT/report.md and the figure. `--quick` checks
in about a minute that the script runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from measuring import fit_arguments, machine, mean_and_spread, run_fits, short_fit

RUNS = {"forward KL": (), "labels": ("--model.ce_weight", "1")}
COLUMNS = {
    "nll": ("NLL", 3, 1),
    "forward_kl": ("forward KL to the teacher", 3, 1),
    "exact_match": ("exact match, %", 1, 100),
}
BARS = ("student before training", "trained on labels", "distilled", "teacher")


def found_by_model(results: list[dict[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """The metrics of each bar, one entry for each seed; the teacher and the student before have one."""
    seeds = {run: sorted((r for r in results if r["run"] == run), key=lambda r: int(r["seed"])) for run in RUNS}
    first = results[0]
    lists = (
        [first["student_before"]],
        [r["student_after"] for r in seeds["labels"]],
        [r["student_after"] for r in seeds["forward KL"]],
        [first["teacher"]],
    )
    return dict(zip(BARS, lists, strict=True))


def report(results: list[dict[str, Any]]) -> str:
    """Mean ± standard deviation over the seeds."""
    seeds = ", ".join(map(str, sorted({r["seed"] for r in results})))
    lines = [f"{machine(1)}; {results[0]['steps']:,} steps; seeds {seeds}", ""]
    lines += ["| | " + " | ".join(title for title, *_ in COLUMNS.values()) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name, rows in found_by_model(results).items():
        cells = (
            [mean_and_spread([row[key] for row in rows], *rule) for key, (_, *rule) in COLUMNS.items()] if rows else []
        )
        lines += [f"| {name} | {' | '.join(cells)} |"] if cells else []
    return "\n".join(lines) + "\n"


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Exact match and NLL of the four models; a dot is a seed."""
    rows = found_by_model(results)
    colors = ("#9aa0b5", "#c58b3b", "#3949ab", "#5f6368")
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.6), sharey=True, layout="constrained")
    titles = ("Right answers, % (higher is better)", "NLL per answer token (lower is better)")
    for axis, key, factor, title in zip(axes, ("exact_match", "nll"), (100, 1), titles, strict=True):
        for level, (name, color) in enumerate(zip(reversed(BARS), reversed(colors), strict=True)):
            values = [factor * row[key] for row in rows[name]]
            mean = statistics.mean(values)
            axis.barh(level, mean, color=color, height=0.62)
            if len(values) > 1:
                axis.plot(values, [level] * len(values), "o", color="black", markersize=3)
            axis.annotate(
                f"{mean:.{1 if factor == 100 else 2}f}",
                (max(values), level),
                (7, 0),
                va="center",
                textcoords="offset points",
            )
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(BARS)), list(reversed(BARS)))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=Path, default=Path("build/gain/gain.svg"))
    arguments = fit_arguments(parser, words, 2000, "gain", "two steps of one seed")
    keys = [(run, seed, arguments.steps) for seed in arguments.seeds for run in RUNS]

    def fit(run: str, seed: int, steps: int) -> dict[str, Any]:
        return short_fit(
            "quickstart", seed, steps, arguments.output / f"{run.replace(' ', '_')}-{seed}-{steps}", *RUNS[run]
        )

    run_fits(keys, fit, report, arguments.output, arguments.jobs)
    draw(json.loads((arguments.output / "results.json").read_text(encoding="utf-8")), arguments.figure)


if __name__ == "__main__":
    main()
