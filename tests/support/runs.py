"""Start the program as a user does, on little data."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch  # noqa: F401 - its log handler keeps the stream it meets at import, which must outlive one test
from safetensors.torch import load_file
from torch import Tensor

from kd_lightning.assets import resolve
from locations import ROOT

CONFIGS = ROOT / "configs"
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
CPU = ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]


# DistiLLM-2's objective as a word of the command line: each response has its own skew
GAPS = {
    "class_path": "Contrastive",
    "init_args": {
        "teacher_responses": {"class_path": "SkewKL", "init_args": {"alpha": {"class_path": "ResponseGap"}}},
        "student_responses": {
            "class_path": "SkewReverseKL",
            "init_args": {"alpha": {"class_path": "ResponseGap", "init_args": {"side": "student"}}},
        },
    },
}


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk of its own that is soon full, in a folder that is there."""
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def bundled(split: str, config: str = "quickstart") -> Path:
    """The bundled file of a split that a shipped config reads."""
    kind = {"self_distillation": "context_", "pretraining": "text_"}.get(config, "")
    return Path(resolve(f"asset:{kind}{split}"))


def little_data(folder: Path, rows: int = 48, config: str = "quickstart") -> Path:
    """A file with the first rows of the bundled training data."""
    path = folder / "train.jsonl"
    lines = bundled("train", config).read_text(encoding="utf-8").splitlines()[:rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def little(root: Path, config: str = "quickstart", steps: int = 4, test: bool = False) -> list[str]:
    """Words of a short fit under `root`; without the closing table unless asked."""
    words = ["fit", "--config", str(CONFIGS / f"{config}.yaml"), "--trainer.default_root_dir", str(root)]
    words += [*CPU, *QUIET, "--trainer.max_steps", str(steps), "--trainer.num_sanity_val_steps", "0"]
    words += ["--trainer.limit_val_batches", "2", "--data.batch_size", "8"]
    return words if test else [*words, "--trainer.limit_test_batches", "0"]


def start(words: list[str], program: tuple[str, ...] = ("-m", "kd_lightning"), **kwargs: Any) -> subprocess.Popen[str]:
    """The program in a process of its own."""
    return subprocess.Popen(
        [sys.executable, *program, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        **kwargs,
    )


def finish(words: list[str], **kwargs: Any) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the program."""
    process = start(words, **kwargs)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def kill_when(
    words: list[str], path: Path, timeout: float = 300, program: tuple[str, ...] = ("-m", "kd_lightning")
) -> None:
    """Start the program and `kill -9` it as soon as `path` is there."""
    process = start(words, program)
    end = time.monotonic() + timeout
    while not path.exists():
        if process.poll() is not None:
            raise AssertionError(f"the run ended before {path} was there: {process.communicate()[1]}")
        if time.monotonic() > end:
            process.kill()
            raise AssertionError(f"{path} did not appear")
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"


def student(root: Path) -> dict[str, Tensor]:
    """Weights of the exported student."""
    return load_file(root / "student" / "model.safetensors")


def results(root: Path) -> dict[str, Any]:
    """The closing table."""
    return json.loads((root / "results.json").read_text(encoding="utf-8"))
