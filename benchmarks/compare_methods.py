"""Compare every method with baselines on the bundled rows, at equal steps and then at equal time.

Every run is a separate process with the shipped config. Methods start from the bundled supervised student. The
baselines (labels only) start from random weights and from that student, which is also trained on a quarter of the rows,
to compare distillation with labels on four times as many rows. With `--same_time`, each method whose mean CPU time
differs from forward KL's by more than a fifth runs again with as many steps as fit into forward KL's time. Generation
before or between the steps is part of a run and of its time. Evaluated on the test rows as in `on_policy.py`.

    python benchmarks/compare_methods.py --steps 400 --seeds 0 1 2 3 4 --same_time --jobs 2 --output build/methods

writes build/methods/results.json after each run (a repeated call resumes; another number of steps needs another
folder), build/methods/report.md and build/methods/chart.svg.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib
from measuring import in_a_process, machine
from on_policy import Bench, command

matplotlib.use("agg")
import matplotlib.pyplot as plt

from kd_lightning.assets import resolve

SOURCES = ("seqkd", "gkd", "distillm", "distillm2", "minillm", "opd", "opd_topk", "eopd")
OBJECTIVES = ("reverse_kl", "jsd", "akl", "alpha", "abkd", "skew_kl", "skew_reverse_kl", "taid", "amid")
LABELS = ("--model.objective", "ForwardKL", "--model.ce_weight", "1")
QUARTER = "every fourth row"  # placeholder for the path of a file with these rows
METHODS: dict[str, tuple[str, ...]] = {
    "forward_kl": ("quickstart",),
    **{name: (name,) for name in OBJECTIVES},
    "symmetric_kl": ("quickstart", "--model.objective", "SymmetricKL"),
    "total_variation": ("quickstart", "--model.objective", "TotalVariation"),
    **{name: (name,) for name in SOURCES},
}
BASELINES: dict[str, tuple[str, ...]] = {
    "labels, random start, last step": ("sft",),
    "labels, random start, best step": ("sft", "--export.which", "best"),
    "labels, same start, last step": ("quickstart", *LABELS),
    "labels, same start, best step": ("quickstart", *LABELS, "--export.which", "best"),
    "labels, 1,000 rows": ("quickstart", *LABELS, "--data.train", QUARTER),
    "forward_kl, 1,000 rows": ("quickstart", "--data.train", QUARTER),
    "forward_kl, rate 2e-3": ("quickstart", "--model.optimizer.lr", "2e-3"),
}
RUNS = {**METHODS, **BASELINES}
COLUMNS = {"forward_kl": 3, "reverse_kl": 3, "nll": 3, "exact_match": 3, "sample_nll": 2}
NOTES = """
Mean ± standard deviation over seeds. \\*: the difference from forward KL exceeds twice its standard deviation. †:
worse than the student before.

- *Equal time*: the methods whose mean CPU time differs from forward KL's by more than a fifth, their steps scaled by
  the ratio of the times; for the others, the first table already is equal time. The time of generation before the first
  step is not scaled: distillm2 (and, by a little, minillm) still needs more time than forward KL.
- This is low-data transfer: the teacher was trained on 206,465 related rows, the student on 4,000.
- Seeds vary the order of the rows, the sampled responses and the random start of a baseline, not data, teacher or
  tokenizer: the standard deviations understate the uncertainty.
- Learning rates are those of the configs: 8e-3, but 2e-3 for seqkd, gkd, distillm and minillm, which train on sampled
  responses, and 3e-3 from a random start. They were chosen by hand, not searched for each method, so **the ranking of
  the methods is not significant**, least of all within the spread. *Rate 2e-3* is forward KL at the lower learning
  rate. Forward KL is also the metric of one column.
- Evaluated on 500 of the 2,000 test rows, every fourth one.
- *Labels* is the baseline, at its last step and where its validation loss is lowest; if both are the same student, they
  share a line. *1,000 rows* are every fourth row: compared with distillation on them, the other baselines use labels on
  four times as many rows.
"""


def one(run: str, seed: int, steps: int, root: Path) -> dict[str, float]:
    """Train in a child process and evaluate in this one; CPU seconds are those of the child."""
    shutil.rmtree(root, ignore_errors=True)  # left by an interrupted run
    config, *extra = RUNS[run]
    if QUARTER in extra:
        some = root.with_suffix(".jsonl")
        lines = Path(resolve("asset:train")).read_text(encoding="utf-8").splitlines(keepends=True)
        some.write_text("".join(lines[::4]), encoding="utf-8")
        extra = [str(some) if word == QUARTER else word for word in extra]
    words = command(root, config, steps, seed, max(1, min(100, steps // 4)))
    done = subprocess.Popen(
        [*words, *extra], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )
    assert done.stderr is not None
    errors = done.stderr.read()
    _, status, used = os.wait4(done.pid, 0)
    if status:
        raise SystemExit(f"{run}: {errors.strip().splitlines()[-1]}")
    found = Bench(500).measure(str(root / "student"))
    shutil.rmtree(root)
    return {"seconds": used.ru_utime + used.ru_stime, **found}


def groups(results: list[dict[str, Any]], part: str) -> dict[str, list[dict[str, Any]]]:
    """The results of one part, grouped by run, in the order of the methods."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in ("student before", "teacher", *RUNS):
        if rows := [r for r in results if r["part"] == part and r["run"] == name]:
            found[name] = rows
    return found


def merged(found: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """The same, with one entry for variants of a baseline that ended with the same student (the best step is the last).

    Variants differ in what follows the last comma of their names.
    """
    variants: dict[tuple[str, tuple[float, ...]], list[str]] = {}
    for name, rows in found.items():
        baseline = name.rpartition(", ")[0] or name
        variants.setdefault((baseline, tuple(row[column] for row in rows for column in COLUMNS)), []).append(name)
    joined = {
        " and ".join([first, *(name.rpartition(", ")[2] for name in same)]): first for first, *same in variants.values()
    }
    return {name: found[first] for name, first in joined.items()}


def cell(rows: list[dict[str, Any]], base: list[dict[str, Any]], start: float, column: str, digits: int) -> str:
    """Mean ± spread; a star if further from the base than twice their spread, a dagger if worse than the start."""
    values, others = ([r[column] for r in part] for part in (rows, base))
    mean = statistics.mean(values)
    worse = "†" if (mean < start if column == "exact_match" else mean > start) else ""
    if len(values) == 1:
        return f"{mean:.{digits}f}{worse}"
    spread = statistics.stdev(values)
    text = f"{mean:.{digits}f} ± {spread:.{digits}f}"
    if len(others) > 1 and rows is not base:
        both = (spread**2 + statistics.stdev(others) ** 2) ** 0.5
        text += "\\*" if abs(mean - statistics.mean(others)) > 2 * both else ""
    return text + worse


def report(results: list[dict[str, Any]]) -> str:
    """Two tables, and notes on what they do not show; runs that ended with the same student share a line."""
    text = f"# Methods and baselines\n\n{machine(1)}.\n"
    for part in ("equal steps", "equal time"):
        if not (found := groups(results, part)):
            continue
        base = groups(results, "equal steps").get("forward_kl", [])
        before = groups(results, "equal steps").get("student before", [])
        starts = {column: before[0][column] if before else math.nan for column in COLUMNS}
        names = "forward KL | reverse KL | NLL | exact match | teacher's NLL of samples"
        text += f"\n## {part.capitalize()}\n\n| run | steps | seeds | CPU s | {names} |\n|{'---|' * 9}\n"
        for name, rows in merged(found).items():
            start = [name, str(round(statistics.mean(r["steps"] for r in rows))), str(len(rows))]
            start += [f"{statistics.mean(r['seconds'] for r in rows):.0f}"]
            cells = [cell(rows, base, starts[column], column, digits) for column, digits in COLUMNS.items()]
            text += f"| {' | '.join(start + cells)} |\n"
    return text + NOTES


def chart(results: list[dict[str, Any]], path: Path) -> None:
    """Forward KL and exact match of every run at equal steps, with their spread."""
    found = merged({name: rows for name, rows in groups(results, "equal steps").items() if name != "teacher"})
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.3 * len(found) + 1.2), sharey=True, layout="constrained")
    for axis, column, label in zip(
        axes, ("forward_kl", "exact_match"), ("forward KL to the teacher", "exact match of the category"), strict=True
    ):
        for i, (name, rows) in enumerate(found.items()):
            values = [r[column] for r in rows]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            color = "C0" if name in METHODS else "C7"  # gray: baselines
            axis.errorbar(statistics.mean(values), i, xerr=spread, fmt="o", color=color, capsize=3)
        axis.set(yticks=range(len(found)), yticklabels=list(found), xlabel=label)
        axis.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    steps, seeds = max(rows[0]["steps"] for rows in found.values()), max(len(rows) for rows in found.values())
    figure.suptitle(f"{steps} steps, mean ± standard deviation of {seeds} seeds; gray: baselines")
    for rows in groups(results, "equal steps").get("teacher", []):
        axes[1].axvline(rows["exact_match"], color="gray", linestyle=":", label="teacher")
        axes[1].legend(loc="lower right")
    figure.savefig(path)
    plt.close(figure)


class Comparison:
    """All runs of a folder. Runs that are already there are not repeated."""

    def __init__(self, output: Path, jobs: int, threads: int) -> None:
        output.mkdir(parents=True, exist_ok=True)
        self.output, self.jobs, self.threads = output, jobs, threads
        path = output / "results.json"
        self.results: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []

    def keep(self, result: dict[str, Any]) -> None:
        """Add one result and rewrite all files."""
        self.results.append(result)
        self.write()

    def write(self) -> None:
        """Rewrite results, report and chart."""
        (self.output / "results.json").write_text(json.dumps(self.results, indent=1), encoding="utf-8")
        (self.output / "report.md").write_text(report(self.results), encoding="utf-8")
        chart(self.results, self.output / "chart.svg")

    def same_time(self, runs: list[str], steps: int) -> dict[str, int]:
        """Steps that fit into forward KL's time, for methods whose mean CPU time differs from it by over a fifth."""
        found = groups(self.results, "equal steps")
        seconds = {run: statistics.mean(r["seconds"] for r in found[run]) for run in runs if run in METHODS}
        ratios = {run: seconds["forward_kl"] / mean for run, mean in seconds.items()}
        return {run: max(1, round(steps * ratio)) for run, ratio in ratios.items() if abs(ratio - 1) > 0.2}

    def missing(self, wanted: list[tuple[str, str, int, int]]) -> list[tuple[str, str, int, int]]:
        """The wanted (part, run, seed, steps) that have no result yet."""
        there = {(r["part"], r["run"], r["seed"]) for r in self.results}
        return [key for key in wanted if key[:3] not in there]

    def do(self, wanted: list[tuple[str, str, int, int]]) -> None:
        """Run what is missing, several runs in parallel."""
        left, started = self.missing(wanted), time.perf_counter()
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(self.threads)

        def work(key: tuple[str, str, int, int]) -> tuple[tuple[str, str, int, int], dict[str, Any] | str]:
            part, run, seed, steps = key
            root = self.output / f"{part} {run} {seed}".replace(" ", "_")
            return key, in_a_process(__file__, ["--one", run, str(seed), str(steps), str(root)])

        with ThreadPoolExecutor(self.jobs) as pool:
            for n, (key, found) in enumerate(pool.map(work, left), start=1):
                if isinstance(found, str):
                    raise SystemExit(f"{key}: {found}")
                self.keep({"part": key[0], "run": key[1], "seed": key[2], "steps": key[3], **found})
                minutes = (time.perf_counter() - started) / n * (len(left) - n) / 60
                print(f"{key}: {found}; {minutes:.0f} min left", flush=True)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--same_time", action="store_true", help="also run each method for forward KL's time")
    parser.add_argument("--jobs", type=int, default=1, help="number of parallel runs")
    parser.add_argument("--threads", type=int, default=1, help="threads per run")
    parser.add_argument("--output", type=Path, default=Path("build/methods"))
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.one:
        run, seed, steps, root = args.one
        print(json.dumps(one(run, int(seed), int(steps), Path(root))))
        return
    if args.same_time and "forward_kl" not in args.runs:
        parser.error("--same_time needs the time of forward_kl: add forward_kl to --runs")
    comparison = Comparison(args.output, args.jobs, args.threads)
    for name, student in (("student before", "asset:student"), ("teacher", "asset:teacher")):
        if comparison.missing([("equal steps", name, 0, 0)]):
            found = {"seconds": 0.0, **Bench(500).measure(student)}
            comparison.keep({"part": "equal steps", "run": name, "seed": 0, "steps": 0, **found})
    for seed in args.seeds:
        comparison.do([("equal steps", run, seed, args.steps) for run in args.runs])
    if args.same_time:
        for run, steps in comparison.same_time(args.runs, args.steps).items():
            comparison.do([("equal time", run, seed, steps) for seed in args.seeds])
    comparison.write()


if __name__ == "__main__":
    main()
