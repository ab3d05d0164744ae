"""Cost of padding: the same steps on padded and on packed rows of mixed length.

    packed / padded     CPU seconds of the same step (teacher, student, loss, gradient, optimizer), paired by batch

on the bundled models, on short rows and rows with a context together. "random" shuffles the rows, "similar length" is
the default order, in which rows of similar length share a batch. Padding is the share of the positions that the models
read for nothing: behind short rows in a padded batch, and at the ends of sequences in a packed one.

    python benchmarks/packing.py --steps 40 --threads 2 --output build/packing
    python benchmarks/packing.py --quick
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from measuring import machine, spread, write

import kd_lightning as kd
from kd_lightning.models.packing.layout import PackedLayout

WARM = 2  # steps before the timed ones
ORDERS = {"random": False, "similar length": True}
SIZES: dict[str, dict[str, int]] = {
    "32 rows": {"batch_size": 32},
    "8 rows": {"batch_size": 8},
    "2048 tokens": {"batch_size": 256, "batch_tokens": 2048},
}


def module() -> kd.DistillationModule:
    """The bundled pair with forward KL, loaded."""
    found = kd.DistillationModule(
        "asset:student", "asset:teacher", optimizer=functools.partial(torch.optim.AdamW, lr=1e-4)
    )
    found.configure_model()
    return found


def rows(grouped: bool, size: dict[str, int]) -> kd.InstructionDataModule:
    """Short rows and rows with a context, about as many of each."""
    data = kd.InstructionDataModule(
        train=["asset:train", "asset:context_train"],
        tokenizer="asset:student",
        max_length=256,
        group_by_length=grouped,
        packing=True,
        **size,
    )
    data.prepare_data()
    data.setup("fit")
    return data


def pair() -> dict[str, Any]:
    """A step on padded rows and one on packed rows, each with models of its own."""
    steps = {}
    for name in ("padded", "packed"):
        own = module()
        if name == "packed":
            own.model.pack_rows()
            assert own.teacher is not None
            own.teacher.attach(own.run_context())
        steps[name] = functools.partial(step, own, own.configure_optimizers())
    return steps


def step(own: kd.DistillationModule, optimizer: Any, batch: dict[str, torch.Tensor]) -> float:
    """CPU seconds of a step."""
    started = time.process_time()
    loss = own.model(batch, own.teacher).mean
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return time.process_time() - started


def measured(grouped: bool, size: dict[str, int], steps: int) -> dict[str, Any]:
    """Ratios of the steps, tokens per second and shares of padding."""
    data, both = rows(grouped, size), pair()
    seconds: dict[str, list[float]] = {"padded": [], "packed": []}
    tokens, positions, packed = 0, 0, 0
    for n, batch in zip(range(WARM + steps), data.train_dataloader(), strict=False):
        order = list(both) if n % 2 else list(reversed(both))
        taken = {name: both[name](batch) for name in order}
        if n < WARM:
            continue
        for name, value in taken.items():
            seconds[name].append(value)
        mask = batch["attention_mask"]
        tokens, positions = tokens + int(mask.sum()), positions + mask.numel()
        packed += PackedLayout(mask).position_ids.numel()
    return {
        "ratios": [a / b for a, b in zip(seconds["packed"], seconds["padded"], strict=True)],
        "total_ratio": sum(seconds["packed"]) / sum(seconds["padded"]),
        "tokens_per_second": {name: tokens / sum(values) for name, values in seconds.items()},
        "padding": {"padded": 1 - tokens / positions, "packed": 1 - tokens / packed},
    }


def table(results: list[dict[str, Any]]) -> str:
    """One line for each order and size."""
    names = ("order", "batch", "padding, padded", "padding, packed", "tokens per CPU second, padded", "packed")
    lines = [f"| {' | '.join(names)} | packed / padded |", "|---|---|---|---|---|---|---|"]
    for one in results:
        padding, speed = one["padding"], one["tokens_per_second"]
        lines.append(
            f"| {one['order']} | {one['size']} | {padding['padded']:.0%} | {padding['packed']:.0%} | "
            f"{speed['padded']:.0f} | {speed['packed']:.0f} | {spread(one['ratios'])} |"
        )
    return "\n".join(lines) + "\n"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("build/packing"))
    parser.add_argument("--quick", action="store_true", help="a few steps")
    args = parser.parse_args(words)
    if args.quick:
        args.steps = 2
    torch.set_num_threads(args.threads)
    results = [
        {"order": order, "size": size, **measured(grouped, SIZES[size], args.steps)}
        for order, grouped in ORDERS.items()
        for size in SIZES
    ]
    on = machine(args.threads)
    heading = "# Packed and padded rows of mixed length\n\n"
    heading += f"{args.steps} steps of each, paired batch by batch; median [least–most] of the ratios. {on}.\n\n"
    write(args.output, {"machine": on, "threads": args.threads, "results": results}, heading + table(results))
    print(args.output.with_suffix(".md").read_text(encoding="utf-8"))
    print(f"medians: {[round(statistics.median(one['ratios']), 2) for one in results]}")


if __name__ == "__main__":
    main()
