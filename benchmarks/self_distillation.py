"""Self-distillation with a context, compared with labels: what the student gains from a teacher that reads more.

Every run is a separate process with the shipped config `self_distillation`, evaluated on its 800 test rows: NLL of the
labels, forward KL to the teacher with the context, exact match.

    python benchmarks/self_distillation.py --steps 300 --seeds 0 1 2 3 4 --jobs 2 --output build/self_distillation

writes OUTPUT/results.json after each run (a repeated call resumes) and OUTPUT/report.md. `--quick` checks in about a
minute that the script runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from measuring import machine

SELF = "--model.teacher.init_args."
ON_POLICY = ("--model.responses", "OnPolicy", "--model.responses.share", "1", "--model.responses.max_new_tokens", "8")
RUNS: dict[str, tuple[str, ...]] = {
    "frozen, on the data": (),
    "average (decay 0.99), on the data": (f"{SELF}mode", "ema", f"{SELF}decay", "0.99"),
    "frozen, on-policy, reverse KL": ("--model.objective", "ReverseKL", *ON_POLICY),
    "labels only": ("--model.ce_weight", "1"),
}
COLUMNS = ("nll", "forward_kl", "exact_match")


def one(run: str, seed: int, steps: int, root: Path) -> dict[str, Any]:
    """Train, and read the closing table of the run."""
    words = [sys.executable, "-m", "kd_lightning", "fit", "--config", "self_distillation"]
    words += ["--seed_everything", str(seed), "--trainer.max_steps", str(steps), *RUNS[run]]
    words += ["--trainer.val_check_interval", str(steps), "--generation.every_n_validations", "0"]
    words += ["--trainer.default_root_dir", str(root), "--trainer.accelerator", "cpu"]
    words += ["--export.overwrite", "true"]
    done = subprocess.run(words, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise SystemExit(f"{run}: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads((root / "results.json").read_text(encoding="utf-8"))
    return found


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
            cells = [_spread([r["student_after"][column] for r in found], column) for column in COLUMNS]
            lines.append(f"| {run} | {found[0]['steps']} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float], column: str) -> str:
    factor, digits = (100, 1) if column == "exact_match" else (1, 3)
    text = f"{factor * statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {factor * statistics.stdev(values):.{digits}f}"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--jobs", type=int, default=1, help="number of parallel runs")
    parser.add_argument("--output", type=Path, default=Path("build/self_distillation"))
    parser.add_argument("--quick", action="store_true", help="two steps of the first run: meaningless figures")
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.steps, arguments.seeds, arguments.runs = 2, [0], list(RUNS)[:1]
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "results.json"
    results: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    there = {(r["run"], r["seed"], r["steps"]) for r in results}
    wanted = [(run, seed, arguments.steps) for seed in arguments.seeds for run in arguments.runs]

    def work(key: tuple[str, int, int]) -> dict[str, Any]:
        run, seed, steps = key
        root = arguments.output / f"{list(RUNS).index(run)}-{seed}-{steps}"
        return {"run": run, "seed": seed, "steps": steps, **one(run, seed, steps, root)}

    with ThreadPoolExecutor(arguments.jobs) as pool:
        for future in as_completed([pool.submit(work, key) for key in wanted if key not in there]):
            found = future.result()
            results.append(found)
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            (arguments.output / "report.md").write_text(report(results), encoding="utf-8")
            print(found["run"], found["seed"], found["student_after"], flush=True)


if __name__ == "__main__":
    main()
