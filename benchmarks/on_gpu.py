"""GPU validation script: checks exactness, speed, agreement across devices and the memory plan, in one page.

    python benchmarks/on_gpu.py --output build/on_gpu              # one to eight GPUs
    python benchmarks/on_gpu.py --device cpu --small --output …    # check that it runs

writes OUTPUT.json and OUTPUT.md: exactness in bf16 and fp32 (the matmul itself projects to fp32 logits), every loss
compared with its matmuls and with peer libraries where installed, a full step, fsdp2 on all devices compared with one
device, and `plan` compared with the measured peak. If a part fails, its section contains the error, and the exit status
is 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exactness
import step
import torch
from measuring import in_a_process, machine, spread, timed, write
from safetensors.torch import load_file

import engine
import kd_lightning as kd

SMALL = (1000, 32, 48, 256)
LARGE = (128_256, 2048, 4096, 8192)  # vocabulary, both hidden sizes, tokens; as for a 1B student and an 8B teacher
LOSSES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "taid", "alpha_beta", "amid", "adaptive_kl", "own")
PEERS = ("forward_kl:naive", "jsd:naive", "forward_kl:trl_kernel", "jsd:trl_gkd")
COMMON = ["--config", "quickstart", "--trainer.limit_val_batches", "0", "--trainer.limit_test_batches", "0"]
COMMON += ["--trainer.enable_progress_bar", "false", "--data.shuffle", "false", "--trainer.logger", "false"]
Part = Callable[[argparse.Namespace], tuple[Any, str]]


def where(device: str) -> str:
    """GPUs, driver, versions and date."""
    on = machine(torch.get_num_threads())
    if device == "cuda":
        cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = (
            subprocess.run(query, capture_output=True, text=True, encoding="utf-8").stdout.split()
            if shutil.which(query[0])
            else []
        )
        on = f"{len(cards)} × {cards[0]}, driver {(driver or ['?'])[0]}, CUDA {torch.version.cuda}; {on}"
    return f"{on}; kd_lightning {kd.__version__}, {datetime.date.today()}"


def clocked(call: Callable[[], Any], device: str, rounds: int) -> dict[str, Any]:
    """Seconds of each round and peak bytes of a call, after a warm-up call (which compiles)."""
    if device == "cpu":
        found = timed(call)
        return {"seconds": [found["cpu"]], "peak": found["peak"]}
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, seconds = torch.cuda.memory_allocated(), []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        kept = call()
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1000)
        del kept
    return {"seconds": seconds, "peak": float(torch.cuda.max_memory_allocated() - before)}


def exact(args: argparse.Namespace) -> tuple[Any, str]:
    """Errors against float64."""
    losses = ("forward_kl", "amid") if args.small else tuple(exactness.OBJECTIVES)
    shape = (211, 8, 12, 9) if args.small else exactness.SHAPE
    results = {
        name: {
            f"{label}, {'near' if near else 'far'}": exactness.measure(name, dtype, near, False, shape, args.device)
            for label, dtype in exactness.DTYPES.items()
            for near in (False, True)
        }
        for name in losses
    }
    return results, "Relative L2 error of the values ; of the gradient.\n\n" + exactness.table(results)


def losses(args: argparse.Namespace) -> tuple[Any, str]:
    """Every loss compared with the matmuls."""
    shape = SMALL if args.small else LARGE
    dtype, chunk = torch.bfloat16 if args.device == "cuda" else torch.float32, 64 if args.small else 4096
    names = ("forward_kl:eager", "jsd:naive") if args.small else (*LOSSES, "forward_kl:eager", *PEERS)
    results, left_out = {}, {}
    for name in ("plain", "best", *names):
        try:
            call, x = engine.prepared(name, shape, chunk, dtype, args.device)
            results[name] = clocked(call, args.device, args.rounds)
            results[name]["floor"] = x["w"].nbytes + x["h"].nbytes + 8 * min(chunk, shape[3]) * shape[0]
        except (ImportError, torch.OutOfMemoryError) as error:
            left_out[name] = str(error).splitlines()[0]
    plain, best = (statistics.median(results[name]["seconds"]) for name in ("plain", "best"))
    lines = ["| case | time / plain | time / best | peak / floor |", "|---|---|---|---|"]
    for name, found in results.items():
        ratios = [spread([s / unit for s in found["seconds"]]) for unit in (plain, best)]
        lines.append(f"| {name} | {' | '.join(ratios)} | {found['peak'] / found['floor']:.2f} |")
    lines += [f"\nSkipped: {name} ({why})." for name, why in left_out.items()]
    head = f"V {shape[0]}, widths {shape[1]} and {shape[2]}, {shape[3]} tokens, {dtype}, chunk {chunk}.\n\n"
    return {"shape": shape, "results": results, "left_out": left_out}, head + "\n".join(lines) + "\n"


def whole_step(args: argparse.Namespace) -> tuple[Any, str]:
    """A distillation step compared with a supervised step and the teacher's forward pass."""
    module, data = step.loaded(4 if args.small else 256)
    assert module.model is not None
    teacher: Any = module.teacher
    module.model.to(args.device)
    teacher.to(args.device)
    labels_only = kd.DistillationLoss(kd.ForwardKL(), ce_weight=1.0, reduction="sequence_mean")
    distil, supervise = step.stepper(module, None), step.stepper(module, labels_only)
    batch = {name: tensor.to(args.device) for name, tensor in next(iter(data.train_dataloader())).items()}
    calls: dict[str, Callable[[], Any]] = {
        "kd": lambda: distil(batch),
        "sft": lambda: supervise(batch),
        "teacher": lambda: teacher.logits(batch),
    }
    seconds = {name: clocked(call, args.device, args.rounds)["seconds"] for name, call in calls.items()}
    unit = statistics.median(seconds["sft"]) + statistics.median(seconds["teacher"])
    return seconds, f"KD step / (SFT step + teacher): {spread([s / unit for s in seconds['kd']])}\n"


def same_step(args: argparse.Namespace) -> tuple[Any, str]:
    """Four steps sharded over all devices, and on one device with as many micro-batches per step."""
    ranks = 2 if args.device == "cpu" else torch.cuda.device_count()
    if ranks < 2:
        return None, "One device: nothing to compare.\n"
    students = {}
    with tempfile.TemporaryDirectory() as root:
        start = load_file(Path(kd.assets.resolve("asset:student")) / "model.safetensors")
        for name, devices, words in (
            ("one", 1, ["--trainer.accumulate_grad_batches", str(ranks)]),
            ("all", ranks, ["--trainer.strategy", "fsdp2"]),
        ):
            words += [
                "--trainer.devices",
                str(devices),
                "--trainer.accelerator",
                "gpu" if args.device == "cuda" else "cpu",
            ]
            words += [
                "--trainer.default_root_dir",
                f"{root}/{name}",
                "--trainer.max_steps",
                "4",
                "--data.batch_size",
                "8",
            ]
            words += ["--model.optimizer.class_path", "torch.optim.SGD", "--model.optimizer.lr", "0.1"]
            command = [sys.executable, "-m", "kd_lightning", "fit", *COMMON, *words]
            done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
            if done.returncode:
                raise RuntimeError(done.stderr.strip().splitlines()[-1])
            students[name] = load_file(f"{root}/{name}/student/model.safetensors")
    flat = {name: torch.cat([(s[k] - start[k]).flatten().double() for k in start]) for name, s in students.items()}
    error = float((flat["all"] - flat["one"]).norm() / flat["one"].norm())
    text = f"Relative difference of the update of four steps, fsdp2 on {ranks} devices compared with one: {error:.1e}\n"
    return error, text


def planned(args: argparse.Namespace) -> tuple[Any, str]:
    """The memory plan of the quickstart compared with the measured peak."""
    words = [*COMMON, "--trainer.max_steps", "3", "--data.batch_size", "4" if args.small else "256"]
    with tempfile.TemporaryDirectory() as root:
        words += [
            "--trainer.default_root_dir",
            root,
            "--trainer.accelerator",
            "gpu" if args.device == "cuda" else "cpu",
        ]
        file = f"{root}/plan.json"
        command = [sys.executable, "-m", "kd_lightning", "plan", *words, "--world_size", "1", "--json", file]
        subprocess.run(command, check=True, capture_output=True)
        peak = json.loads(Path(file).read_text(encoding="utf-8"))["peak"]
        found = in_a_process(__file__, ["--device", args.device, "--fit", json.dumps(words)])
    if isinstance(found, str):
        raise RuntimeError(found)
    text = f"plan {peak / 2**20:.0f} MiB, measured {found['peak'] / 2**20:.0f} MiB"
    note = "" if args.device == "cuda" else " (growth of the process; not meaningful for a small model)"
    return {"plan": peak, "measured": found["peak"]}, f"{text}{note}\n"


def fit(device: str, words: list[str]) -> None:
    """Run `fit` in this process and print the peak memory."""
    from measuring import status

    from kd_lightning.cli.program import run

    before = status("VmRSS")
    run(["fit", *words])
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else status("VmHWM") - before
    print(json.dumps({"peak": float(peak)}))


PARTS: dict[str, Part] = {
    "Exactness": exact,
    "Losses compared with their matmuls": losses,
    "A full step": whole_step,
    "All devices compared with one": same_step,
    "Plan compared with measurement": planned,
}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes: check that the script runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("build/on_gpu"))
    parser.add_argument("--fit", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU found; pass --device cpu --small to check that the script runs")
    if args.fit:
        fit(args.device, args.fit)
        return 0
    on, record, failed = where(args.device), {}, 0
    text = f"# GPU validation\n\n{on}.\n"
    for title, part in PARTS.items():
        started = time.perf_counter()
        try:
            record[title], section = part(args)
        except Exception as error:  # keep what was already measured
            traceback.print_exc()
            section, failed = f"Failed: {' '.join(str(error).split())[:500]}\n", 1
        text += f"\n## {title}\n\n{section}"
        print(f"{title}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        write(args.output, {"machine": on, "parts": record}, text)
    print(text)
    return failed


if __name__ == "__main__":
    sys.exit(main())
