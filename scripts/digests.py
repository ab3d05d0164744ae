"""SHA-256 of what the program computes, to see that a change of the code changes no bit.

    python scripts/digests.py before.json          # before the change
    python scripts/digests.py after.json before.json  # after it: exit status 1 where a digest differs

Of every shipped config: the student's weights, the logged curves and the closing table after 30 steps on a part of the
bundled data. Then the output of `generate`, the files of a `cache`, and the JSON of a `plan`. Seeds are fixed and torch
has one thread; digests are comparable on one machine only.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
STEPS, ROWS = 30, 256
TIMINGS = ("seconds", "time", "per_second", "memory", "generate_share")  # curves that no two runs share


def program(words: list[str], folder: Path) -> None:
    """Run `kd-lightning` in a process with one thread, and refuse to go on where it fails."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {**os.environ, **threads, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets")}
    environment["PYTHONPATH"] = str(PROJECT)
    command = [sys.executable, "-m", "kd_lightning", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, encoding="utf-8")
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr[-2000:]}")


def sha(*parts: bytes) -> str:
    """SHA-256 over all of it."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.hexdigest()[:16]


def some_rows(folder: Path) -> Path:
    """The first bundled training rows."""
    path = folder / "train.jsonl"
    lines = (PROJECT / "kd_lightning/assets/train.jsonl").read_text(encoding="utf-8").splitlines()[:ROWS]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def curves(root: Path) -> bytes:
    """Every scalar of the run's event files but times."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(root / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    tags = sorted(tag for tag in events.Tags()["scalars"] if not any(word in tag for word in TIMINGS))
    return json.dumps({tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}).encode()


def fit(name: str, folder: Path) -> dict[str, str]:
    """Digests of one shipped config."""
    folder.mkdir()
    root = folder / "root"
    words = ["fit", "--config", str(PROJECT / "configs" / f"{name}.yaml"), "--trainer.default_root_dir", str(root)]
    words += ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.max_steps", str(STEPS)]
    words += [
        "--trainer.val_check_interval",
        "10",
        "--trainer.limit_val_batches",
        "2",
        "--trainer.log_every_n_steps",
        "5",
    ]
    words += ["--trainer.limit_test_batches", "2", "--trainer.enable_progress_bar", "false"]
    program([*words, "--data.train", str(some_rows(folder))], folder)
    weights = sha((root / "student" / "model.safetensors").read_bytes())
    return {"weights": weights, "curves": sha(curves(root)), "results": sha((root / "results.json").read_bytes())}


def generate(name: str, folder: Path) -> dict[str, str]:
    """Digest of sampled responses."""
    folder.mkdir()
    words = [
        "generate",
        "--model",
        "asset:teacher",
        "--data",
        str(some_rows(folder)),
        "--output",
        str(folder / "out.jsonl"),
    ]
    program([*words, "--max_new_tokens", "16", "--temperature", "0.8", "--top_p", "0.9", "--seed", "7"], folder)
    return {"responses": sha((folder / "out.jsonl").read_bytes())}


def cache(name: str, folder: Path) -> dict[str, str]:
    """Digest of a teacher cache's arrays."""
    folder.mkdir()
    out, kind = folder / "cache", name.removeprefix("cache_")
    words = ["cache", "--config", str(PROJECT / "configs/quickstart.yaml"), "--output", str(out), "--kind", kind]
    words += ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--data.train", str(some_rows(folder))]
    program(words, folder)
    files = sorted(file for file in out.rglob("*") if file.is_file() and file.suffix not in (".json", ".lock"))
    return {"files": sha(*(str(file.relative_to(out)).encode() + file.read_bytes() for file in files))}


def plan(name: str, folder: Path) -> dict[str, str]:
    """Digest of a plan's JSON."""
    folder.mkdir()
    words = ["plan", "--config", str(PROJECT / "configs/quickstart.yaml"), "--trainer", "fsdp2", "--world_size", "8"]
    program([*words, "--json", str(folder / "plan.json")], folder)
    return {"json": sha((folder / "plan.json").read_bytes())}


def main(output: str, before: str | None = None) -> int:
    """Write all digests; compare them with an earlier file."""
    jobs: dict[str, Callable[[str, Path], dict[str, str]]] = {
        path.stem: fit for path in sorted((PROJECT / "configs").glob("*.yaml"))
    }
    jobs |= {"generate": generate, "cache_hidden": cache, "cache_top_k": cache, "plan": plan}
    with tempfile.TemporaryDirectory(prefix="digests-") as temporary, ThreadPoolExecutor(2) as pool:
        running = {name: pool.submit(job, name, Path(temporary) / name) for name, job in jobs.items()}
        digests = {name: future.result() for name, future in running.items()}
    Path(output).write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")
    if before is None:
        return 0
    known = json.loads(Path(before).read_text(encoding="utf-8"))
    changed = [name for name in known.keys() | digests.keys() if known.get(name) != digests.get(name)]
    for name in sorted(changed):
        print(f"{name}: {known.get(name)} before, {digests.get(name)} after")
    print(f"{len(digests) - len(changed)} of {len(digests)} unchanged")
    return int(bool(changed))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
