"""Cost of what is seen on a logged step, beside the steps that are not logged.

    logged / not logged     every second step is logged, so that the two kinds alternate; medians. What a logged step
                            has more: the components of the loss, the gradient's norm, and the logger's own work
    a step at every N       what that adds to a step on average where every N-th is logged, in percent

on the bundled models and data with the quickstart's settings, by a Trainer with TensorBoard; and, of a large
vocabulary, the components beside the loss alone: whatever else is in a step makes their share of it smaller. CPU
seconds; the rounds go through all objectives in turn.

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
from step import WARM, cpu, parts, starts
from subjects import inputs

import kd_lightning as kd
from kd_lightning.training.loss_components import component_loss

EVERY = 10  # the quickstart's log_every_n_steps
LIMIT = 5.0  # percent of a step
OBJECTIVES: dict[str, Callable[[], kd.Divergence]] = {
    "ForwardKL": kd.ForwardKL,
    "SymmetricKL": kd.SymmetricKL,
    "AdaptiveKL": kd.AdaptiveKL,
    "WeightedSum": lambda: kd.WeightedSum([kd.ForwardKL(), kd.GeneralizedJSD()], [0.5, 0.5]),
}
QUICK = ("ForwardKL",)
LARGE = (50257, 512, 512, 1024)  # vocabulary, widths of student and teacher, tokens


def run(objective: str, steps: int, batch_size: int) -> dict[str, float]:
    """Median CPU seconds of a logged step, and of one that is not."""
    marks = starts(*parts(batch_size, OBJECTIVES[objective]()), 2 * steps, every=2)
    seconds = [b - a for a, b in itertools.pairwise(marks)]  # of step i + 1; the even are logged
    kinds: dict[str, list[float]] = {"logged": [], "plain": []}
    for i, taken in enumerate(seconds[WARM:], start=WARM):
        kinds["logged" if i % 2 else "plain"].append(taken)
    return {kind: statistics.median(values) for kind, values in kinds.items()}


def alone(objective: str, shape: tuple[int, ...]) -> dict[str, float]:
    """CPU seconds of the training loss with its gradient, from hidden states, and with the components beside it."""
    made = OBJECTIVES[objective]()
    loss, beside, given = kd.DistillationLoss(made), component_loss(made), inputs(shape)
    student = kd.Head(given["w"])
    teacher = kd.Head(4 * given["wt"])  # a language model's entropy of 2 to 3 nats, not that of noise

    def train() -> None:
        loss.from_hidden(given["h"][None], student, given["ht"][None], teacher, given["labels"][None]).mean.backward()

    @torch.no_grad()
    def measure() -> None:
        beside.from_hidden(given["h"][None], student, given["ht"][None], teacher, given["labels"][None])

    for call in (train, measure):
        call()
    plain = cpu(train)
    return {"logged": plain + cpu(measure), "plain": plain}


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Ratio, and share of a step."""
    lines = [
        f"| of | logged / not logged | a step at every {EVERY}, % more | limit | |",
        "|---|---|---|---|---|",
    ]
    for name, rounds in results.items():
        ratios = [found["logged"] / found["plain"] for found in rounds]
        more = [100 * (ratio - 1) / EVERY for ratio in ratios]
        met = "" if statistics.median(more) <= LIMIT else "missed"
        limit = "| |" if "alone" in name else f"{LIMIT:.2f} | {met} |"  # which is of a step
        lines.append(f"| {name} | {spread(ratios)} | {spread(more)} | {limit}")
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
    shape = (301, 16, 16, 40) if args.quick else LARGE
    torch.set_num_threads(args.threads)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    results |= {f"{name}, the loss alone, V {shape[0]:,}": [] for name in names}
    for _ in range(args.rounds):
        for of, rounds in results.items():
            name = of.split(",")[0]
            rounds.append(run(name, args.steps, args.batch_size) if of == name else alone(name, shape))
    on = machine(args.threads)
    heading = f"# What a logged step costs, on the bundled models, batches of {args.batch_size}\n\n"
    heading += f"Medians of {args.steps} steps of each kind; {args.rounds} rounds. {on}.\n\n"
    write(args.output, {"machine": on, "threads": args.threads, "results": results}, heading + table(results))
    print(args.output.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
