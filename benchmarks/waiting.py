"""How waiting OpenMP threads affect a forward of the bundled teacher, alone and beside other work.

Wall seconds relative to the default alone. Each measurement is a separate process; rounds take turns. "Beside" means as
many other processes with the same settings as `--beside` says, each computing all the time.

    python benchmarks/waiting.py --threads 2 --rounds 5 --output build/waiting

writes OUTPUT.json and OUTPUT.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from measuring import machine, spread, write

from kd_lightning.assets import resolve
from kd_lightning.models.loading import load_causal_lm

POLICIES = {
    "default": {},
    "asleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
    "asleep after a short spin (the program)": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"},
}


def forward_seconds(calls: int) -> float:
    """Mean wall seconds of a forward of 8 × 128 tokens, after three for warm-up."""
    model = load_causal_lm(resolve("asset:teacher"), kwargs={"dtype": "float32"}, role="teacher").eval()
    tokens = torch.randint(0, 1000, (8, 128))
    with torch.inference_mode():
        for call in range(calls + 3):
            if call == 3:
                began = time.perf_counter()
            model(input_ids=tokens)
    return (time.perf_counter() - began) / calls


def measure(policy: str, threads: int, beside: int, calls: int) -> float:
    """One measurement, beside so many other processes."""
    variables = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}
    environment = {name: value for name, value in os.environ.items() if name not in variables}
    environment |= POLICIES[policy] | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--measure"]
    others = [subprocess.Popen([*command, "1000000"], env=environment, stdout=subprocess.PIPE) for _ in range(beside)]
    try:
        words = [*command, str(calls)]
        done = subprocess.run(words, env=environment, capture_output=True, encoding="utf-8", check=True)
    finally:
        for other in others:
            other.kill()
            other.communicate()
    return float(done.stdout.splitlines()[-1])


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """Wall seconds relative to the median of the default alone."""
    unit = statistics.median(results["default"]["alone"])
    lines = ["| waiting threads | alone | beside other work |", "|---|---|---|"]
    for policy, found in results.items():
        lines.append(f"| {policy} | {' | '.join(spread([x / unit for x in found[k]]) for k in ('alone', 'beside'))} |")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--beside", type=int, default=2, help="other processes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="check that the script runs")
    parser.add_argument("--output", type=Path, default=Path("build/waiting"))
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.measure:
        print(forward_seconds(arguments.measure))
        return
    rounds, calls = (1, 2) if arguments.quick else (arguments.rounds, 60)
    results: dict[str, dict[str, list[float]]] = {policy: {"alone": [], "beside": []} for policy in POLICIES}
    for _ in range(rounds):
        for policy, found in results.items():
            found["alone"].append(measure(policy, arguments.threads, 0, calls))
            found["beside"].append(measure(policy, arguments.threads, arguments.beside, calls))
    text = f"{machine(arguments.threads)}; {arguments.beside} other processes; wall seconds, the default alone = 1\n\n"
    record = {"machine": machine(arguments.threads), "beside": arguments.beside, "results": results}
    write(arguments.output, record, text + table(results) + "\n")
    print(text + table(results))


if __name__ == "__main__":
    main()
