"""Cost of what is seen on a logged step, beside the steps that are not logged.

    logged / not logged     every second step is logged, so that the two kinds alternate; medians. What a logged step
                            has more: the components of the loss, the gradient's norm, and the logger's own work
    a step at every N       what that adds to a step on average where every N-th is logged, in percent

on the bundled models and data with the quickstart's settings, by a Trainer with TensorBoard. CPU seconds; the rounds go
through all objectives in turn.

    python benchmarks/components.py --steps 60 --rounds 3 --threads 2 --output build/components
    python benchmarks/components.py --quick
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import machine, spread, write
from step import WARM, parts, starts

import kd_lightning as kd

EVERY = 10  # the quickstart's log_every_n_steps
LIMIT = 5.0  # percent of a step
OBJECTIVES: dict[str, Callable[[], kd.Divergence]] = {
    "ForwardKL": kd.ForwardKL,
    "SymmetricKL": kd.SymmetricKL,
    "AdaptiveKL": kd.AdaptiveKL,
    "WeightedSum": lambda: kd.WeightedSum([kd.ForwardKL(), kd.GeneralizedJSD()], [0.5, 0.5]),
}
QUICK = ("ForwardKL",)


def run(objective: str, steps: int, batch_size: int) -> dict[str, float]:
    """Median CPU seconds of a logged step, and of one that is not."""
    marks = starts(*parts(batch_size, OBJECTIVES[objective]()), 2 * steps, every=2)
    seconds = [b - a for a, b in itertools.pairwise(marks)]  # of step i + 1; the even are logged
    kinds: dict[str, list[float]] = {"logged": [], "plain": []}
    for i, taken in enumerate(seconds[WARM:], start=WARM):
        kinds["logged" if i % 2 else "plain"].append(taken)
    return {kind: statistics.median(values) for kind, values in kinds.items()}


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Ratio, and share of a step."""
    lines = [
        f"| objective | logged / not logged | a step at every {EVERY}, % more | limit | |",
        "|---|---|---|---|---|",
    ]
    for name, rounds in results.items():
        ratios = [found["logged"] / found["plain"] for found in rounds]
        more = [100 * (ratio - 1) / EVERY for ratio in ratios]
        met = "" if statistics.median(more) <= LIMIT else "missed"
        lines.append(f"| {name} | {spread(ratios)} | {spread(more)} | {LIMIT:.2f} | {met} |")
    return "\n".join(lines) + "\n"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of each kind")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("build/components"))
    parser.add_argument("--quick", action="store_true", help="a few steps")
    args = parser.parse_args(words)
    names = tuple(OBJECTIVES)
    if args.quick:
        args.steps, args.rounds, args.batch_size, names = 3, 1, 4, QUICK
    torch.set_num_threads(args.threads)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            results[name].append(run(name, args.steps, args.batch_size))
    on = machine(args.threads)
    heading = f"# What a logged step costs, on the bundled models, batches of {args.batch_size}\n\n"
    heading += f"Medians of {args.steps} steps of each kind; {args.rounds} rounds. {on}.\n\n"
    write(args.output, {"machine": on, "threads": args.threads, "results": results}, heading + table(results))
    print(args.output.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
