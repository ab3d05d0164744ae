"""A student cut from the teacher against the same student from random weights, on the bundled rows at equal steps.

`kd-lightning prune` keeps some layers of the bundled teacher; forward KL trains the result, from its weights or from
random ones, with the `quickstart` config. Every run is a separate process.

    python benchmarks/pruned_start.py --layers 2 --steps 400 --seeds 0 1 2 --jobs 2 --output build/pruned_start

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

RUNS = {"layers of the teacher": "pretrained", "random weights": "random"}
COLUMNS = {"nll": 3, "forward_kl": 3, "exact_match": 1}


def program(*words: str) -> None:
    """Run the program; exit with its error if it fails."""
    done = subprocess.run([sys.executable, "-m", "kd_lightning", *words], capture_output=True, encoding="utf-8")
    if done.returncode:
        raise SystemExit(f"{' '.join(words[:3])}: {done.stderr.strip().splitlines()[-1]}")


def one(run: str, seed: int, steps: int, student: Path, root: Path) -> dict[str, Any]:
    """Train, and read the closing table of the run."""
    words = ["fit", "--config", "quickstart", "--model.student", str(student), "--model.student_init", RUNS[run]]
    words += ["--seed_everything", str(seed), "--trainer.max_steps", str(steps), "--model.optimizer.lr", "3e-3"]
    words += ["--trainer.val_check_interval", str(steps), "--generation.every_n_validations", "0"]
    words += ["--trainer.default_root_dir", str(root), "--trainer.accelerator", "cpu", "--export.overwrite", "true"]
    program(*words)
    found: dict[str, Any] = json.loads((root / "results.json").read_text(encoding="utf-8"))
    return found


def report(results: list[dict[str, Any]], layers: str) -> str:
    """Mean ± standard deviation over the seeds of each start, before and after training."""
    seeds = ", ".join(map(str, sorted({r["seed"] for r in results})))
    lines = [f"{machine(1)}; layers {layers} of the bundled teacher; seeds {seeds}", ""]
    lines += [
        "| start | steps | seeds | NLL | forward KL to the teacher | exact match, % |",
        "|---|---|---|---|---|---|",
    ]
    teacher = " | ".join(_spread([results[0]["teacher"][column]], column) for column in COLUMNS)
    lines.append(f"| the teacher | | | {teacher} |")
    for run in RUNS:
        found = sorted((r for r in results if r["run"] == run), key=lambda r: int(r["seed"]))
        for when, steps in (("student_before", 0), ("student_after", found[0]["steps"])) if found else ():
            cells = " | ".join(_spread([r[when][column] for r in found], column) for column in COLUMNS)
            lines.append(f"| {run} | {steps} | {len(found)} | {cells} |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float], column: str) -> str:
    factor, digits = 100 if column == "exact_match" else 1, COLUMNS[column]
    text = f"{factor * statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {factor * statistics.stdev(values):.{digits}f}"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="2", help="a number, or a list of indices such as 0,3")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="number of parallel runs")
    parser.add_argument("--output", type=Path, default=Path("build/pruned_start"))
    parser.add_argument("--quick", action="store_true", help="two steps of one seed: meaningless figures")
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.steps, arguments.seeds = 2, [0]
    arguments.output.mkdir(parents=True, exist_ok=True)
    student = arguments.output / f"layers_{arguments.layers.replace(',', '_')}"
    if not student.exists():
        program("prune", "--model", "asset:teacher", "--layers", arguments.layers, "--output", str(student))
    path = arguments.output / "results.json"
    results: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    there = {(r["run"], r["seed"], r["steps"]) for r in results}
    keys = [(run, seed, arguments.steps) for seed in arguments.seeds for run in RUNS]

    def work(key: tuple[str, int, int]) -> dict[str, Any]:
        run, seed, steps = key
        root = arguments.output / f"{RUNS[run]}-{seed}-{steps}"
        return {"run": run, "seed": seed, "steps": steps, **one(run, seed, steps, student, root)}

    with ThreadPoolExecutor(arguments.jobs) as pool:
        for future in as_completed([pool.submit(work, key) for key in keys if key not in there]):
            found = future.result()
            results.append(found)
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            (arguments.output / "report.md").write_text(report(results, arguments.layers), encoding="utf-8")
            print(found["run"], found["seed"], found["student_after"], flush=True)


if __name__ == "__main__":
    main()
