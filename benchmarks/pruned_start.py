"""A student cut from the teacher against the same student from random weights, on the bundled rows at equal steps.

`kd-lightning prune` keeps some layers of the bundled teacher; forward KL trains the result, from its weights or from
random ones, with the `quickstart` config. Every run is a separate process.

    python benchmarks/pruned_start.py --layers 2 --steps 400 --seeds 0 1 2 --jobs 2 --output build/pruned_start

writes OUTPUT/results.json after each run (a repeated call resumes) and OUTPUT/report.md. `--quick` checks in about a
minute that the script runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from measuring import fit_arguments, machine, mean_and_spread, program, run_fits, short_fit

RUNS = {"layers of the teacher": "pretrained", "random weights": "random"}
COLUMNS = {"nll": 3, "forward_kl": 3, "exact_match": 1}


def report(results: list[dict[str, Any]], layers: str) -> str:
    """Mean ± standard deviation over the seeds of each start, before and after training."""
    seeds = ", ".join(map(str, sorted({r["seed"] for r in results})))
    lines = [f"{machine(1)}; layers {layers} of the bundled teacher; seeds {seeds}", ""]
    lines += [
        "| start | steps | seeds | NLL | forward KL to the teacher | exact match, % |",
        "|---|---|---|---|---|---|",
    ]
    teacher = " | ".join(_cell([results[0]["teacher"][column]], column) for column in COLUMNS)
    lines.append(f"| the teacher | | | {teacher} |")
    for run in RUNS:
        found = sorted((r for r in results if r["run"] == run), key=lambda r: int(r["seed"]))
        for when, steps in (("student_before", 0), ("student_after", found[0]["steps"])) if found else ():
            cells = " | ".join(_cell([r[when][column] for r in found], column) for column in COLUMNS)
            lines.append(f"| {run} | {steps} | {len(found)} | {cells} |")
    return "\n".join(lines) + "\n"


def _cell(values: list[float], column: str) -> str:
    return mean_and_spread(values, COLUMNS[column], 100 if column == "exact_match" else 1)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="2", help="a number, or a list of indices such as 0,3")
    arguments = fit_arguments(parser, words, 400, "pruned_start", "two steps of one seed")
    arguments.output.mkdir(parents=True, exist_ok=True)
    student = arguments.output / f"layers_{arguments.layers.replace(',', '_')}"
    if not student.exists():
        program("prune", "--model", "asset:teacher", "--layers", arguments.layers, "--output", str(student))
    keys = [(run, seed, arguments.steps) for seed in arguments.seeds for run in RUNS]

    def fit(run: str, seed: int, steps: int) -> dict[str, Any]:
        words = ("--model.student", str(student), "--model.student_init", RUNS[run], "--model.optimizer.lr", "3e-3")
        return short_fit("quickstart", seed, steps, arguments.output / f"{RUNS[run]}-{seed}-{steps}", *words)

    run_fits(keys, fit, lambda results: report(results, arguments.layers), arguments.output, arguments.jobs)


if __name__ == "__main__":
    main()
