"""Cost of a loss beside the cost of its four matrix products: CPU time and peak memory, as ratios.

Every measurement is a fresh process: a warm-up call (which compiles), then one timed call. Rounds are interleaved, so
that a machine that slows down slows all of them down. `plain` is the four products (student's logits, teacher's logits,
hidden gradient, head gradient) in chunks, into fresh tiles, with no loss; `best` the same into reused, padded tiles;
`naive:X` both logits whole, plain autograd; `X` this package, compiled; `X:eager` the same without a compiler.

    python benchmarks/engine.py --shape 50257,576,960,1024 --rounds 3 --output build/engine

writes build/engine.json and build/engine.md. Linux only: the peak is the kernel's high-water mark, reset after the
warm-up, above what was resident then. `floor` = head gradient + hidden gradient + two fp32 tiles.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kd_lightning as kd

CASES = (
    *("plain", "best", "naive:forward_kl", "naive:jsd"),
    *("forward_kl", "reverse_kl", "taid", "jsd", "skew_kl", "skew_reverse_kl", "alpha", "alpha_beta", "amid"),
    *("adaptive_kl", "own", "forward_kl+monitor", "forward_kl+ce", "forward_kl+t"),
    *("forward_kl:eager", "reverse_kl:eager", "jsd:eager", "skew_reverse_kl:eager", "amid:eager"),
)


class Hellinger(kd.Divergence):
    """A user's own divergence."""

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Squared Hellinger distance."""
        return 1 - ((log_p + log_q) / 2).exp().sum(-1)


OBJECTIVES: dict[str, Callable[[], kd.Divergence]] = {
    "forward_kl": lambda: kd.ForwardKL(),
    "reverse_kl": lambda: kd.ReverseKL(),
    "jsd": lambda: kd.GeneralizedJSD(0.5),
    "skew_kl": lambda: kd.SkewKL(0.1),
    "skew_reverse_kl": lambda: kd.SkewReverseKL(0.1),
    "taid": lambda: kd.TAID(),
    "alpha": lambda: kd.AlphaDivergence(0.5),
    "alpha_beta": lambda: kd.AlphaBeta(0.2, 0.7),
    "amid": lambda: kd.AMiD(kd.AlphaBeta(0.2, 0.7), alpha=-3.0, teacher_weight=0.1, pair=("teacher", "assistant")),
    "adaptive_kl": lambda: kd.AdaptiveKL(),
    "own": Hellinger,
}


def products(inputs: dict[str, Tensor], chunk: int, padded: bool) -> Any:
    """The four matrix products, and no loss."""
    h, w, ht, wt = (inputs[name].detach() for name in ("h", "w", "ht", "wt"))
    vocabulary, dh, dw = len(w), torch.empty_like(h), None
    width = -(-vocabulary // 64) * 64 + 16
    tiles = [torch.empty(chunk, width)[:, :vocabulary] for _ in range(2)] if padded else []
    for a in range(0, len(h), chunk):
        x, xt = h[a : a + chunk], ht[a : a + chunk]
        if padded:
            z = torch.mm(x, w.t(), out=tiles[0][: len(x)])
            torch.mm(xt, wt.t(), out=tiles[1][: len(x)])
        else:
            z, y = x @ w.t(), xt @ wt.t()
            assert y.shape == z.shape
        torch.mm(z, w, out=dh[a : a + chunk])
        dw = z.t() @ x if dw is None else dw.addmm_(z.t(), x)
    return dh, dw


def naive(inputs: dict[str, Tensor], objective: kd.Divergence) -> Any:
    """What one writes first: whole logits, autograd."""
    log_q = torch.log_softmax(inputs["h"] @ inputs["w"].t(), -1)
    log_p = torch.log_softmax(inputs["ht"] @ inputs["wt"].t(), -1)
    return torch.autograd.grad(objective(log_p, log_q).mean(), (inputs["h"], inputs["w"]))


def case(name: str, inputs: dict[str, Tensor], labels: Tensor, chunk: int) -> Callable[[], Any]:
    """The function that is measured."""
    if name in ("plain", "best"):
        return lambda: products(inputs, chunk, padded=name == "best")
    if name.startswith("naive:"):
        objective = OBJECTIVES[name.removeprefix("naive:")]()
        return lambda: naive(inputs, objective)
    name, _, mode = name.partition(":")
    name, _, extra = name.partition("+")
    loss = kd.DistillationLoss(
        OBJECTIVES[name](),
        ce_weight=0.5 if extra == "ce" else 0.0,
        temperature=2.0 if extra == "t" else 1.0,
        monitors={"monitor": kd.ReverseKL()} if extra == "monitor" else None,
        chunk=chunk,
        compile=mode != "eager",
    )

    def run() -> Any:
        parts = loss.from_hidden(inputs["h"], inputs["w"], inputs["ht"], inputs["wt"], labels)
        return torch.autograd.grad(parts.mean, (inputs["h"], inputs["w"]))

    return run


def status(key: str) -> int:
    """Kilobytes from the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def measure(name: str, shape: tuple[int, ...], chunk: int, threads: int) -> dict[str, float]:
    """One case in this process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    vocabulary, student, teacher, n = shape
    inputs = {
        "h": torch.randn(n, student).requires_grad_(),
        "w": (torch.randn(vocabulary, student) / student**0.5).requires_grad_(),
        "ht": torch.randn(n, teacher),
        "wt": torch.randn(vocabulary, teacher) / teacher**0.5,
    }
    run = case(name, inputs, torch.randint(0, vocabulary, (n,)), chunk)
    started = time.perf_counter()
    run()
    first = time.perf_counter() - started
    Path("/proc/self/clear_refs").write_text("5")
    resident, cpu, wall = status("VmRSS"), time.process_time(), time.perf_counter()
    kept = run()  # the gradients are part of the peak
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    floor = 4 * (vocabulary * student + n * student + 2 * min(chunk, n) * vocabulary)
    del kept
    return {"cpu": cpu, "wall": wall, "first": first, "peak": (status("VmHWM") - resident) * 1024 / floor}


def table(results: dict[str, list[dict[str, float]]], heading: str) -> str:
    """Medians, with the least and the most, as Markdown."""

    def spread(values: list[float]) -> str:
        return f"{statistics.median(values):.2f} [{min(values):.2f}–{max(values):.2f}]"

    unit = {name: statistics.median(r["cpu"] for r in results[name]) for name in ("plain", "best")}
    lines = [
        heading,
        "",
        "| case | time / plain | time / best | peak / floor | first call, s |",
        "|---|---|---|---|---|",
    ]
    for name, rounds in results.items():
        columns = [spread([r["cpu"] / unit[u] for r in rounds]) for u in ("plain", "best")]
        columns += [spread([r["peak"] for r in rounds]), f"{statistics.median(r['first'] for r in rounds):.1f}"]
        lines.append(f"| {name} | {' | '.join(columns)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="50257,576,960,1024", help="vocabulary, student's width, teacher's, tokens")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path("build/engine"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = tuple(int(x) for x in args.shape.split(","))
    if args.one:
        print(json.dumps(measure(args.one, shape, args.chunk, args.threads)))
        return
    names = list(dict.fromkeys(["plain", "best", *args.cases.split(",")]))
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            done = subprocess.run([sys.executable, *sys.argv, "--one", name], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr}")
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{name:24} {results[name][-1]}", flush=True)
    machine = f"{platform.processor() or platform.machine()}, {args.threads} threads, torch {torch.__version__}"
    heading = f"V {shape[0]}, widths {shape[1]} and {shape[2]}, {shape[3]} tokens, chunk {args.chunk}, fp32; {machine}"
    args.output.parent.mkdir(parents=True, exist_ok=True)
    record = {"shape": shape, "chunk": args.chunk, "machine": machine, "results": results}
    args.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(table(results, heading))
    print(table(results, heading))


if __name__ == "__main__":
    main()
