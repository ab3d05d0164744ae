"""A plan of large models costs little, and a process of a gigabyte needs what was planned."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

import runs
from plans import planned, shapes

LLAMA = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
LLAMA_8B = LLAMA | {
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
LLAMA_70B = LLAMA | {
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}


@pytest.mark.slow
def test_eight_billion_from_seventy_on_sixty_four_ranks(tmp_path: Path) -> None:
    words = ["plan", "--config", "quickstart", "--trainer.default_root_dir", str(tmp_path), "--world_size", "64"]
    words += [*shapes(tmp_path, student=LLAMA_8B, teacher=LLAMA_70B), "--json", str(tmp_path / "plan.json")]
    words += ["--data.batch_size", "4", "--data.max_length", "2048", "--trainer.strategy", "FSDP2Strategy"]
    words += ["--trainer.strategy.activation_checkpointing", "true", "--trainer.precision", "bf16-mixed"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    status, _, err = runs.finish(words)
    assert status == 0, err
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 120  # of one core: two have more time
    assert after.ru_maxrss < 4 << 20  # KiB, of the largest child so far
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["student"]["parameters"] == pytest.approx(8_030_261_248 * 4 / 64, rel=1e-3)
    assert plan["teacher"]["parameters"] == pytest.approx(70_553_706_496 * 2 / 64, rel=1e-3)


PROCESS = """
import functools
import sys
from pathlib import Path
import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader
from kd_lightning import DistillationModule

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if name in line)

def fit(folder, rows, length):
    optimizer = functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9)
    module = DistillationModule(folder, None, ce_weight=1, student_init="random", optimizer=optimizer)
    ids = torch.ones(rows, length, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    L.Trainer(accelerator="cpu", devices=1, max_epochs=1, **quiet).fit(module, DataLoader([batch] * 2, batch_size=None))

fit(sys.argv[1], 1, 8)  # what is imported at the first step
before = resident("VmRSS")
fit(sys.argv[2], 2, 256)
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
def test_a_process_needs_what_was_planned(tmp_path: Path) -> None:
    common = {"model_type": "llama", "vocab_size": 8192, "num_attention_heads": 8, "num_key_value_heads": 8}
    small = common | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    # Wide layers: the C library keeps what it frees of tensors below 32 MB, in pieces that others may not fit into.
    large = common | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 2}
    shapes(tmp_path, small=small, student=large)
    (tmp_path / "process.py").write_text(PROCESS)
    words = [str(tmp_path / "small"), str(tmp_path / "student")]
    status, out, err = runs.finish(words, program=(str(tmp_path / "process.py"),))
    assert status == 0, err
    plan = planned(
        tmp_path,
        *["--config", "sft", "--model.student", str(tmp_path / "student"), "--model.teacher", "null"],
        *["--model.optimizer", "torch.optim.SGD", "--model.optimizer.momentum", "0.9", "--world_size", "1"],
        *["--data.batch_size", "2", "--data.max_length", "256", "--model.lr_scheduler", "null"],
    )
    assert plan["student"]["parameters"] > 1e9
    assert plan["peak"] == pytest.approx(int(out.split()[-1]), rel=0.1)
