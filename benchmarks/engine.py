"""Cost of a loss relative to its four unavoidable matmuls: CPU time and peak memory, as ratios.

Every measurement is a new process: a warm-up call (which compiles), then timed calls. Rounds are interleaved, so that a
slowdown of the machine affects all cases alike. Cases that cannot run (a peer library is not installed) are skipped.

    python benchmarks/engine.py --shape 50257,576,960,1024 --rounds 3 --threads 2 --output build/V50257
    python benchmarks/engine.py --rounds 2 --cases own,taid --add ...   # two more rounds of these
    python benchmarks/engine.py --quick

writes OUTPUT.json and OUTPUT.md; benchmarks/README.md says how to read them. Linux only. A case is LOSS[+EXTRA][:HOW]:

    EXTRA  40% (of the tokens have a label), 4x (the tokens), ce (half of the weight on the labels), t (temperature 2),
           monitors (three of them), the name of one monitor, or map (a teacher with another tokenizer: 70 % of the
           student's tokens have a partner)
    HOW    eager, naive, trl_kernel, trl_gkd; default: compiled
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import in_a_process, machine, spread, timed, write
from subjects import OBJECTIVES, Inputs, inputs, naive, peer, products

import kd_lightning as kd

MONITORS = ("reverse_kl", "jsd", "total_variation")
EAGER = ("forward_kl", "reverse_kl", "taid", "jsd", "skew_reverse_kl", "amid", "own")
MAPPED = ("forward_kl", "jsd")
LOSSES = tuple(name for name in OBJECTIVES if name not in ("symmetric_kl", "total_variation"))
CASES = (
    *("plain", "best", "plain+40%"),
    *LOSSES,
    *(f"{name}:eager" for name in EAGER),
    *("forward_kl:naive", "jsd:naive", "forward_kl:trl_kernel", "jsd:trl_gkd"),
    *("jsd+40%", "jsd+40%:naive", "forward_kl+4x"),
    *(f"forward_kl+{extra}" for extra in (*MONITORS, "monitors", "ce", "t")),
    *(f"{name}+map" for name in MAPPED),
)
QUICK = ("plain", "best", "forward_kl:eager", "amid+monitors:eager", "jsd:naive", "jsd+40%:eager", "jsd+40%:naive")

Results = dict[str, list[dict[str, float]]]


def prepared(
    case: str, shape: tuple[int, ...], chunk: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Callable[[], Any], Inputs]:
    """The function to measure and its inputs."""
    rest, _, how = case.partition(":")
    name, _, extra = rest.partition("+")
    n = shape[3] * (4 if extra == "4x" else 1)
    x = inputs((*shape[:3], n), 0.4 if extra == "40%" else 1.0, dtype, device)
    leaves = (x["h"], x["w"])
    if name in ("plain", "best"):
        return lambda: products(x, chunk, padded=name == "best"), x
    if how == "naive":
        objective = OBJECTIVES[name]()
        return lambda: torch.autograd.grad(naive(x, objective).mean(), leaves), x
    if how.startswith("trl"):
        other = peer(how, name)
        return lambda: torch.autograd.grad(other(x).mean(), leaves), x
    watched = MONITORS if extra == "monitors" else [extra] if extra in MONITORS else []
    loss = kd.DistillationLoss(
        OBJECTIVES[name](),
        ce_weight=0.5 if extra == "ce" else 0.0,
        temperature=2.0 if extra == "t" else 1.0,
        monitors={f"monitor_{monitor}": OBJECTIVES[monitor]() for monitor in watched},
        chunk=chunk,
        compile=how != "eager",
    )

    vocabulary_map = mapped(shape[0]) if extra == "map" else None

    def run() -> Any:
        parts = loss.from_hidden(x["h"], x["w"], x["ht"], x["wt"], x["labels"], vocabulary_map=vocabulary_map)
        return torch.autograd.grad(parts.mean, leaves)

    return run, x


def mapped(vocabulary: int) -> kd.VocabularyMap:
    """A map of 70 % of the tokens, at random, to a teacher's vocabulary that is 2 % smaller."""
    generator = torch.Generator().manual_seed(0)
    sizes = vocabulary, vocabulary - vocabulary // 50
    student, teacher = (torch.randperm(size, generator=generator)[: int(0.7 * vocabulary)] for size in sizes)
    return kd.VocabularyMap(student, teacher, *sizes)


def measure(case: str, shape: tuple[int, ...], chunk: int, threads: int) -> dict[str, float]:
    """Measure one case in this process."""
    torch.set_num_threads(threads)
    call, x = prepared(case, shape, chunk)
    result = timed(call)
    labeled = int((x["labels"] != -100).sum())
    floor = 4 * (x["w"].numel() + x["h"].numel() + 2 * min(chunk, labeled) * len(x["w"]))
    return {**result, "floor": float(floor)}


def quantities(vocabulary: int) -> list[tuple[str, str, str, str, str, float]]:
    """Rows of the table: label, case, reference case, measured figure, case to subtract, and limit.

    Where plain tiles already have a good row stride, padding gains nothing, and compiled losses get 0.2 more.
    """
    well = 0.2 if vocabulary % 16 == 0 else 0.0
    limits = {"forward_kl": 1.0, "reverse_kl": 1.0, "taid": 1.0, "alpha_beta": 1.25, "amid": 1.25, "adaptive_kl": 1.3}
    limits |= {"own": 1.1}
    eager = {"jsd": 1.4, "skew_reverse_kl": 1.4, "amid": 1.9, "own": 1.4}
    rows = [(f"{name}, time / plain", name, "plain", "cpu", "", limits.get(name, 1.05) + well) for name in LOSSES]
    rows += [(f"{name}, peak / floor", name, name, "peak", "", 1.2) for name in LOSSES]
    rows += [
        (f"{name} uncompiled, time / plain", f"{name}:eager", "plain", "cpu", "", eager.get(name, 1.15))
        for name in EAGER
    ]
    rows += [("forward_kl, time / best", "forward_kl", "best", "cpu", "", 1.3)]
    rows += [("forward_kl, peak at 4 × the tokens / peak", "forward_kl+4x", "forward_kl", "bytes", "", 1.15)]
    for name, how in (("forward_kl", "naive"), ("forward_kl", "trl_kernel"), ("jsd", "trl_gkd")):
        time, peak = {"naive": (0.9, 0.2), "trl_kernel": (0.5, None), "trl_gkd": (0.4, 0.15)}[how]
        rows += [(f"{name}, time / {how}", name, f"{name}:{how}", "cpu", "", time)]
        rows += [(f"{name}, peak / {how}", name, f"{name}:{how}", "bytes", "", peak)] if peak else []
    rows += [("jsd, 40 % of the tokens labeled, time / naive", "jsd+40%", "jsd+40%:naive", "cpu", "", 0.4)]
    rows += [(f"{name} across tokenizers, time / {name}", f"{name}+map", name, "cpu", "", 1.3) for name in MAPPED]
    rows += [
        (f"monitor {name}, added time / plain", f"forward_kl+{name}", "plain", "cpu", "forward_kl", 0.1)
        for name in MONITORS
    ]
    return rows


def table(results: Results, vocabulary: int) -> str:
    """Every measured quantity: median and spread over the rounds, and its limit."""
    lines = ["| quantity | median [least–most] | limit | |", "|---|---|---|---|"]
    for label, case, over, figure, less, limit in quantities(vocabulary):
        if not all(results.get(name) for name in (case, over)):
            continue
        if figure == "peak":
            ratios = [r["peak"] / r["floor"] for r in results[case]]
        else:
            key = "cpu" if figure == "cpu" else "peak"
            base = statistics.median(r[key] for r in results[less]) if less else 0.0
            ratios = [(r[key] - base) / statistics.median(s[key] for s in results[over]) for r in results[case]]
        met = "" if statistics.median(ratios) <= limit else "missed"
        lines.append(f"| {label} | {spread(ratios)} | {limit:.2f} | {met} |")
    return "\n".join(lines) + "\n"


def everything(results: Results) -> str:
    """Every case relative to plain, and the time of its first call (which compiles)."""
    lines = ["| case | time / plain | time / best | peak / floor | first call, s |", "|---|---|---|---|---|"]
    unit = {name: statistics.median(r["cpu"] for r in results[name]) for name in ("plain", "best")}
    for name, rounds in results.items():
        if rounds:
            columns = [spread([r["cpu"] / unit[u] for r in rounds]) for u in ("plain", "best")]
            columns += [spread([r["peak"] / r["floor"] for r in rounds]), spread([r["first"] for r in rounds], 1)]
            lines.append(f"| {name} | {' | '.join(columns)} |")
    return "\n".join(lines) + "\n"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", default="50257,576,960,1024", help="vocabulary, student's and teacher's hidden size, tokens"
    )
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("build/engine"))
    parser.add_argument("--add", action="store_true", help="add rounds to those in OUTPUT.json")
    parser.add_argument("--quick", action="store_true", help="tiny, one round, in this process, without compilation")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.quick:
        args.shape, args.cases, args.rounds, args.chunk = "1000,32,48,256", ",".join(QUICK), 1, 64
    shape = tuple(int(x) for x in args.shape.split(","))
    if args.one:
        print(json.dumps(measure(args.one, shape, args.chunk, args.threads)))
        return
    cases = dict.fromkeys(["plain", "best", *args.cases.split(",")])
    results = earlier(args, shape) if args.add else {}
    for name in cases:
        results.setdefault(name, [])
    left_out: dict[str, str] = {}
    settings = ["--shape", args.shape, "--chunk", str(args.chunk), "--threads", str(args.threads)]
    for _ in range(args.rounds):
        for name in cases:
            if name in left_out:
                continue
            if args.quick:
                found: dict[str, Any] | str = measure(name, shape, args.chunk, args.threads)
            else:
                found = in_a_process(__file__, [*settings, "--one", name])
            if isinstance(found, str):
                left_out[name] = found
            else:
                results[name].append(found)
            print(f"{name:28} {found}", file=sys.stderr, flush=True)
            report(args, shape, results, left_out)
    print(args.output.with_suffix(".md").read_text(encoding="utf-8"))


def earlier(args: argparse.Namespace, shape: tuple[int, ...]) -> Results:
    """The results in OUTPUT.json, measured with the same shape, chunk and machine.

    Raises:
        ValueError: If the file was measured with other settings.
    """
    record = json.loads(args.output.with_suffix(".json").read_text(encoding="utf-8"))
    wanted = {"shape": list(shape), "chunk": args.chunk, "machine": machine(args.threads)}
    found = {name: record[name] for name in wanted}
    if found != wanted:
        raise ValueError(
            f"cannot add to {args.output}.json: it was measured with {found}, this run has {wanted}; "
            "choose another --output"
        )
    results: Results = record["results"]
    return results


def report(args: argparse.Namespace, shape: tuple[int, ...], results: Results, left_out: dict[str, str]) -> None:
    """Write the results so far."""
    on = machine(args.threads)
    counts = sorted({len(found) for found in results.values() if found})
    rounds = " to ".join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))
    text = f"# V {shape[0]}, widths {shape[1]} and {shape[2]}, {shape[3]} tokens, fp32\n\n"
    text += f"Chunk {args.chunk}; medians of {rounds} interleaved rounds. {on}.\n\n{table(results, shape[0])}"
    text += "".join(f"\nSkipped: {name} ({why}).\n" for name, why in left_out.items())
    if results["best"]:
        text += f"\n{everything(results)}"
    record = {"shape": shape, "chunk": args.chunk, "threads": args.threads, "machine": on, "left_out": left_out}
    write(args.output, {**record, "results": results}, text)


if __name__ == "__main__":
    main()
