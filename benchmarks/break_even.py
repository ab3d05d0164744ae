"""When compiling pays: CPU seconds of a compilation, and the time saved per compiled entry (token × vocabulary).

    python benchmarks/break_even.py --threads 2 --output build/break_even
    python benchmarks/break_even.py --quick

Every line comes from two new processes with a separate disk cache: it is empty for the first (cold) and filled for the
second (warm). A compilation is amortized after (cost) / (time saved per entry) entries. Where this takes more steps
than a run has, compiling does not pay.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import in_a_process, machine, timed, write
from subjects import OBJECTIVES, inputs

import kd_lightning as kd

LOSSES = ("forward_kl", "jsd", "amid")
SIZES = ((4099, 16, 24, 256), (4099, 16, 24, 2560), (4099, 16, 24, 25600))  # 1e6, 1e7, 1e8 entries per call


def seconds() -> float:
    """CPU seconds of this process and of its finished child processes."""
    return sum(os.times()[:4])


def runner(loss: kd.DistillationLoss, shape: tuple[int, ...]) -> Callable[[], Any]:
    """One call with its gradient; the matmuls are small compared with the loss."""
    x = inputs(shape)

    def run() -> Any:
        parts = loss.from_hidden(x["h"], x["w"], x["ht"], x["wt"], x["labels"])
        return torch.autograd.grad(parts.loss, (x["h"], x["w"]))

    return run


def measure(name: str, sizes: list[tuple[int, ...]], compile: bool) -> dict[str, Any]:
    """Extra seconds of the first compiled call over an eager one, and nanoseconds per entry at each size."""
    eager, compiled = (kd.DistillationLoss(OBJECTIVES[name](), compile=c) for c in (False, compile))
    runner(eager, sizes[0])()  # imports, thread pool
    started = seconds()
    runner(compiled, sizes[0])()
    first = seconds() - started
    found: dict[str, Any] = {"first": first, "sizes": []}
    for shape in sizes:
        entries = shape[0] * shape[3]
        pair = {
            how: timed(runner(loss, shape))["cpu"] / entries * 1e9
            for how, loss in (("eager", eager), ("compiled", compiled))
        }
        found["sizes"].append({"entries": entries, **pair})
    return found


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Cost, time saved and break-even of every loss."""
    lines = ["| loss | entries | eager, ns | compiled, ns | cold: s, amortized after | warm: s, amortized after |"]
    lines += ["|---" * 6 + "|"]
    for name, runs in results.items():
        for i, at in enumerate(runs["cold"]["sizes"]):
            costs = []
            for kind in ("cold", "warm"):
                size = runs[kind]["sizes"][i]
                saved = (size["eager"] - size["compiled"]) * 1e-9
                after = f"{runs[kind]['first'] / saved:.0e} entries" if saved > 0 else "never"
                costs.append(f"{runs[kind]['first']:.1f}, {after}")
            lines.append(
                f"| {name} | {at['entries']:.0e} | {at['eager']:.1f} | {at['compiled']:.1f} | {' | '.join(costs)} |"
            )
    return "\n".join(lines) + "\n"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", default=",".join(LOSSES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("build/break_even"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, in this process, without compilation")
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="number of sizes to measure")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(measure(args.one, list(SIZES[: args.sizes]), True)))
        return
    results: dict[str, dict[str, Any]] = {}
    for name in ["forward_kl"] if args.quick else args.losses.split(","):
        results[name] = {}
        with tempfile.TemporaryDirectory() as cache:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
            for kind in ("cold", "warm"):
                if args.quick:
                    found: Any = measure(name, [(101, 4, 6, 32)], False)
                else:
                    settings = ["--threads", str(args.threads), "--sizes", str(args.sizes), "--one", name]
                    found = in_a_process(__file__, settings)
                if isinstance(found, str):
                    raise SystemExit(f"{name} failed: {found}")
                results[name][kind] = found
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]
        on = machine(args.threads)
        write(args.output, {"machine": on, "results": results}, f"# When compiling pays\n\n{on}.\n\n{table(results)}")
    print(args.output.with_suffix(".md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
