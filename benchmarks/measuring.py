"""CPU seconds and peak memory of a call, measured in separate processes; medians and spread."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

SECONDS = 0.5  # shorter calls are repeated

# Waiting threads sleep. By default they spin, and on a shared machine the spinning takes several times as long as the
# work. Child processes inherit the setting.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def status(key: str) -> int:
    """Memory of this process in bytes, as reported by the kernel under `key`: "VmRSS" or "VmHWM"."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def timed(call: Callable[[], Any]) -> dict[str, float]:
    """CPU seconds, wall seconds and peak bytes of a call, after a warm-up call (which compiles).

    The peak is the kernel's high-water mark above the resident memory before the call, after the allocator has returned
    its cached memory. The return value of the call is kept alive during the measurement.
    """
    started = time.perf_counter()
    call()
    first = time.perf_counter() - started
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the high-water mark starts here
    resident, cpu, wall = status("VmRSS"), time.process_time(), time.perf_counter()
    kept = call()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    peak = status("VmHWM") - resident
    del kept
    calls = int(SECONDS / max(cpu, 1e-3))
    if calls:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(calls):
            call()
        cpu, wall = (time.process_time() - cpu) / calls, (time.perf_counter() - wall) / calls
    return {"cpu": cpu, "wall": wall, "first": first, "peak": float(peak)}


def in_a_process(script: str, words: Sequence[str]) -> dict[str, Any] | str:
    """Run a script in a new process and parse its last output line as JSON; if it fails, return its last error line."""
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median [minimum–maximum]."""
    low, middle, high = (f"{x:.{digits}f}" for x in (min(values), statistics.median(values), max(values)))
    return f"{middle} [{low}–{high}]"


def mean_and_spread(values: Sequence[float], digits: int, factor: float = 1) -> str:
    """Mean ± standard deviation; the value alone if there is one."""
    text = f"{factor * statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {factor * statistics.stdev(values):.{digits}f}"


def fit_arguments(
    parser: argparse.ArgumentParser, words: Sequence[str] | None, steps: int, output: str, quick: str
) -> argparse.Namespace:
    """The arguments of a script that calls `run_fits`, after its own; with `--quick`, two steps of one seed.

    Args:
        parser: with the arguments of the script.
        words: of the command line.
        steps: default of `--steps`.
        output: default of `--output`, below `build`.
        quick: what `--quick` does, for `--help`.
    """
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="number of parallel runs")
    parser.add_argument("--output", type=Path, default=Path("build") / output)
    parser.add_argument("--quick", action="store_true", help=f"{quick}: meaningless figures")
    found = parser.parse_args(words)
    if found.quick:
        found.steps, found.seeds = 2, [0]
    return found


def run_fits(
    keys: Sequence[tuple[str, int, int]],
    fit: Callable[[str, int, int], dict[str, Any]],
    report: Callable[[list[dict[str, Any]]], str],
    output: Path,
    jobs: int,
) -> None:
    """Run what OUTPUT/results.json does not have yet; rewrite it and OUTPUT/report.md after each run.

    Args:
        keys: name of the run, seed and steps of each.
        fit: trains, given these, and returns the closing table.
        report: the page, given all results.
        output: the folder.
        jobs: number of parallel runs.
    """
    output.mkdir(parents=True, exist_ok=True)
    path = output / "results.json"
    results: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    there = {(result["run"], result["seed"], result["steps"]) for result in results}

    def work(key: tuple[str, int, int]) -> dict[str, Any]:
        return {**dict(zip(("run", "seed", "steps"), key, strict=True)), **fit(*key)}

    with ThreadPoolExecutor(jobs) as pool:
        for future in as_completed([pool.submit(work, key) for key in keys if key not in there]):
            found = future.result()
            results.append(found)
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            (output / "report.md").write_text(report(results), encoding="utf-8")
            print(found["run"], found["seed"], found["student_after"], flush=True)


def program(*words: str) -> None:
    """Run the program; exit with the last line of its error if it fails."""
    done = subprocess.run([sys.executable, "-m", "kd_lightning", *words], capture_output=True, encoding="utf-8")
    if done.returncode:
        raise SystemExit(f"{' '.join(words[:3])}: {done.stderr.strip().splitlines()[-1]}")


def short_fit(config: str, seed: int, steps: int, root: Path, *words: str) -> dict[str, Any]:
    """Train with a shipped config, without evaluation in between, and read the closing table of the run."""
    settings = ["--seed_everything", str(seed), "--trainer.max_steps", str(steps), *words]
    settings += ["--trainer.val_check_interval", str(steps), "--generation.every_n_validations", "0"]
    settings += ["--trainer.default_root_dir", str(root), "--trainer.accelerator", "cpu", "--export.overwrite", "true"]
    program("fit", "--config", config, *settings)
    found: dict[str, Any] = json.loads((root / "results.json").read_text(encoding="utf-8"))
    return found


def machine(threads: int) -> str:
    """Description of the machine."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")] or [platform.machine()]
    kind = torch.backends.cpu.get_cpu_capability()
    return f"{names[0]}, {kind}, {os.cpu_count()} cores, {threads} threads, torch {torch.__version__}"


def write(output: Path, record: dict[str, Any], text: str) -> None:
    """Write OUTPUT.json and OUTPUT.md."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(text, encoding="utf-8")
