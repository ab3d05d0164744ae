"""Runs that are killed or signalled at random times, again and again, end as a run that nobody touched."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import runs
from kd_lightning.teachers.cache_format import CacheManifest

SEED = 20261128
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
STARTUP = 8.0  # seconds in which a program has not begun to write
AFTER = {signal.SIGKILL: (-9,), signal.SIGTERM: (143, -15), signal.SIGINT: (1, 130, -2)}


def fit(folder: Path, data: Path) -> tuple[list[str], Path]:
    words = [*runs.little(folder / "root", "taid", steps=150), "--data.train", str(data), "--data.batch_size", "4"]
    words += ["--checkpoint.every_n_train_steps", "7", "--trainer.val_check_interval", "31"]
    return [*words, "--trainer.accumulate_grad_batches", "2"], folder / "root" / "checkpoints"


def generate(folder: Path, data: Path) -> tuple[list[str], Path]:
    output = folder / "out.jsonl"
    words = ["generate", "--model", "asset:teacher", "--data", str(data), "--output", str(output), "--batch_size", "1"]
    return [*words, "--max_new_tokens", "24", "--temperature", "0.8"], output


def cache(folder: Path, data: Path) -> tuple[list[str], Path]:
    given = runs.little(folder / "root")[1:]
    given[given.index("--data.batch_size") + 1] = "1"
    words = ["cache", *given, "--data.train", str(data), "--data.val", str(data), "--data.test", "null"]
    return [*words, "--output", str(folder / "cache"), "--shard_mib", "1"], folder / "cache"


def resumed(words: list[str]) -> list[str]:
    """The words that resume: those of `fit` name a checkpoint as soon as there is one."""
    if words[0] != "fit":
        return words
    root = Path(words[words.index("--trainer.default_root_dir") + 1])
    return [*words, "--ckpt_path", "last"] if list(root.glob("checkpoints/*.ckpt")) else words


def interrupted(words: list[str], sign: Path, number: int, share: float, span: float) -> bool:
    """Start the program and send it a signal; whether it arrived before the end.

    Args:
        words: of the program.
        sign: exists when it has begun to write.
        number: the signal.
        share: when the signal is sent, from −0.2 (as the program starts) to 1 (at its end).
        span: seconds from the first file to the end.
    """
    there = sign.exists()
    process = runs.start(words)
    begin = time.monotonic()
    while process.poll() is None and share > 0 and not there and not sign.exists():
        time.sleep(0.02)
    if share > 0 and there:
        time.sleep(STARTUP)
    time.sleep(max(0.0, share * span if share > 0 else -5 * share * STARTUP))
    if process.poll() is None:
        os.kill(process.pid, number)
    _, err = process.communicate(timeout=300)
    assert process.returncode in (0, *AFTER[signal.Signals(number)]), (process.returncode, err)
    assert "Traceback" not in err or time.monotonic() - begin < STARTUP or process.returncode == -number, err
    return process.returncode != 0


def same_student(one: Path, other: Path) -> None:
    first, second = runs.student(one / "root"), runs.student(other / "root")
    assert all(torch.equal(first[name], second[name]) for name in first)


def same_responses(one: Path, other: Path) -> None:
    assert (one / "out.jsonl").read_bytes() == (other / "out.jsonl").read_bytes()


def same_cache(one: Path, other: Path) -> None:
    assert CacheManifest.read(one / "cache") == CacheManifest.read(other / "cache")
    keys = []
    for path in sorted((other / "cache").glob("shard-*")):
        with safe_open(path, framework="pt") as file:
            keys.append(file.get_tensor("keys"))
    rows = torch.cat(keys)
    assert len(rows.unique(dim=0)) == len(rows)  # no row twice


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "kills", "compare"), [(fit, 4, same_student), (generate, 3, same_responses), (cache, 3, same_cache)]
)
def test_killed_at_random_times(
    make: Callable[[Path, Path], tuple[list[str], Path]],
    kills: int,
    compare: Callable[[Path, Path], None],
    tmp_path: Path,
) -> None:
    choose = random.Random(f"{SEED} {make.__name__}")
    data = runs.little_data(tmp_path, rows=90)
    words, sign = make(tmp_path / "whole", data)
    process = runs.start(words)
    while process.poll() is None and not sign.exists():
        time.sleep(0.02)
    begin = time.monotonic()
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    span = time.monotonic() - begin
    words, sign = make(tmp_path / "cut", data)
    for _ in range(kills):
        interrupted(resumed(words), sign, choose.choice(SIGNALS), choose.uniform(-0.2, 1) / 2, span)
        if make is fit and (tmp_path / "cut" / "root" / "student").exists():
            break  # it ended before the signal
    if not (make is fit and (tmp_path / "cut" / "root" / "student").exists()):
        code, _, err = runs.finish(resumed(words))
        assert code == 0, err
    compare(tmp_path / "whole", tmp_path / "cut")
    assert not list((tmp_path / "cut").rglob(".*.part")) and not list((tmp_path / "cut").rglob(".lock"))
