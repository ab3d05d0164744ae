"""Extra cost of a logged step, compared with steps that are not logged.

    logged / not logged     every second step is logged, so that the two kinds alternate; medians. A logged step also
                            computes the components of the loss and the gradient norm, and runs the logger
    a step at every N       average extra cost per step if every N-th step is logged, in percent

on the bundled models and data with the quickstart's settings, using a Trainer with TensorBoard. In addition, for a
large vocabulary, the cost of the components relative to the loss alone: everything else in a step makes their share
smaller. CPU seconds; the rounds are interleaved over all objectives.

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
LARGE = (50257, 512, 512, 1024)  # vocabulary, hidden sizes of student and teacher, tokens


def run(objective: str, steps: int, batch_size: int) -> dict[str, float]:
    """Median CPU seconds of a logged step and of a step that is not logged."""
    marks = starts(*parts(batch_size, OBJECTIVES[objective]()), 2 * steps, every=2)
    seconds = [b - a for a, b in itertools.pairwise(marks)]  # of step i + 1; even steps are logged
    kinds: dict[str, list[float]] = {"logged": [], "plain": []}
    for i, taken in enumerate(seconds[WARM:], start=WARM):
        kinds["logged" if i % 2 else "plain"].append(taken)
    return {kind: statistics.median(values) for kind, values in kinds.items()}


def alone(objective: str, shape: tuple[int, ...]) -> dict[str, float]:
    """CPU seconds of the training loss and its gradient from hidden states, without and with the components."""
    made = OBJECTIVES[objective]()
    loss, components, given = kd.DistillationLoss(made), component_loss(made), inputs(shape)
    student = kd.Head(given["w"])
    teacher = kd.Head(4 * given["wt"])  # an entropy of 2 to 3 nats, as for a language model, instead of that of noise

    def train() -> None:
        loss.from_hidden(given["h"][None], student, given["ht"][None], teacher, given["labels"][None]).mean.backward()

    @torch.no_grad()
    def measure() -> None:
        components.from_hidden(given["h"][None], student, given["ht"][None], teacher, given["labels"][None])

    for call in (train, measure):
        call()
    plain = cpu(train)
    return {"logged": plain + cpu(measure), "plain": plain}


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Ratios and extra cost per step, as a Markdown table."""
    lines = [
        f"| objective | logged / not logged | extra cost per step, logging every {EVERY}, % | limit | |",
        "|---|---|---|---|---|",
    ]
    for name, rounds in results.items():
        ratios = [found["logged"] / found["plain"] for found in rounds]
        more = [100 * (ratio - 1) / EVERY for ratio in ratios]
        met = "" if statistics.median(more) <= LIMIT else "missed"
        limit = "| |" if "alone" in name else f"{LIMIT:.2f} | {met} |"  # the limit is for a full step
        lines.append(f"| {name} | {spread(ratios)} | {spread(more)} | {limit}")
    return "\n".join(lines) + "\n"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="number of steps of each kind")
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
    heading = f"# Cost of a logged step on the bundled models, batches of {args.batch_size}\n\n"
    heading += f"Medians of {args.steps} steps of each kind; {args.rounds} rounds. {on}.\n\n"
    write(args.output, {"machine": on, "threads": args.threads, "results": results}, heading + table(results))
    print(args.output.with_suffix(".md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
