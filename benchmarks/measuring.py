"""CPU seconds and peak memory of a call, measured in separate processes; medians and spread."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
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
