"""Self-distillation with a context, compared with labels: what the student gains from a teacher that reads more.

Every run is a separate process with the shipped config `self_distillation`, evaluated on its 800 test rows: NLL of the
labels, forward KL to the teacher with the context, exact match.

    python benchmarks/self_distillation.py --steps 300 --seeds 0 1 2 3 4 --jobs 2 --output build/self_distillation

writes OUTPUT/results.json after each run (a repeated call resumes) and OUTPUT/report.md. `--quick` checks in about a
minute that the script runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from measuring import fit_arguments, machine, mean_and_spread, run_fits, short_fit

SELF = "--model.teacher.init_args."
ON_POLICY = ("--model.responses", "OnPolicy", "--model.responses.share", "1", "--model.responses.max_new_tokens", "8")
RUNS: dict[str, tuple[str, ...]] = {
    "frozen, on the data": (),
    "average (decay 0.99), on the data": (f"{SELF}mode", "ema", f"{SELF}decay", "0.99"),
    "frozen, on-policy, reverse KL": ("--model.objective", "ReverseKL", *ON_POLICY),
    "labels only": ("--model.ce_weight", "1"),
}
COLUMNS = ("nll", "forward_kl", "exact_match")


def report(results: list[dict[str, Any]]) -> str:
    """Mean ± standard deviation over the seeds of each run; the teacher and the student before are the same in all."""
    lines = [f"{machine(1)}; seeds {', '.join(map(str, sorted({r['seed'] for r in results})))}", ""]
    lines.append("| run | steps | seeds | NLL | forward KL to the teacher with context | exact match, % |")
    lines.append("|---|---|---|---|---|---|")
    for row in ("teacher", "student_before"):
        name = {"teacher": "the model, with context", "student_before": "the model, without context"}[row]
        nll, kl, match = (results[0][row][column] for column in COLUMNS)
        lines.append(f"| {name} | | | {nll:.3f} | {kl:.3f} | {100 * match:.1f} |")
    for run in RUNS:
        if found := sorted((r for r in results if r["run"] == run), key=lambda r: int(r["seed"])):
            cells = [_cell([r["student_after"][column] for r in found], column) for column in COLUMNS]
            lines.append(f"| {run} | {found[0]['steps']} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(values: list[float], column: str) -> str:
    return mean_and_spread(values, *((1, 100) if column == "exact_match" else (3, 1)))


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    arguments = fit_arguments(parser, words, 300, "self_distillation", "two steps of the first run")
    if arguments.quick:
        arguments.runs = list(RUNS)[:1]
    keys = [(run, seed, arguments.steps) for seed in arguments.seeds for run in arguments.runs]

    def fit(run: str, seed: int, steps: int) -> dict[str, Any]:
        root = arguments.output / f"{list(RUNS).index(run)}-{seed}-{steps}"
        return short_fit("self_distillation", seed, steps, root, *RUNS[run])

    run_fits(keys, fit, report, arguments.output, arguments.jobs)


if __name__ == "__main__":
    main()
