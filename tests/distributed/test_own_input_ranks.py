"""A teacher with an input of its own over two gloo ranks: ddp and fsdp2 are one process, with and without adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import processes
from architectures import VOCABULARY, tiny
from kd_lightning import DistillationModule
from kd_lightning.constants import TEACHER_FIELDS
from kd_lightning.models.lora import LoRA
from sharded_fits import assert_ranks_are_one_process, joined, strategies, two_passes
from tiny_fits import SGD, Batch, rows


def own_input(batch: Batch) -> Batch:
    """The batch with a longer prompt for the teacher: three more tokens before each row."""
    first = torch.randint(3, VOCABULARY, (len(batch["labels"]), 3), generator=torch.Generator().manual_seed(5))
    more = {"input_ids": first, "attention_mask": torch.ones_like(first), "labels": torch.full_like(first, -100)}
    return {**batch, **{own: torch.cat([more[name], batch[name]], 1) for name, own in TEACHER_FIELDS.items()}}


def trained(
    folder: Path, strategy: Any, lora: bool, rank: int = 0, ranks: int = 1, own: bool = True
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    student, teacher = tiny("llama"), tiny("llama", hidden_size=48)
    adapters = LoRA(r=2) if lora else None
    module = DistillationModule(student, teacher, ce_weight=0.5, optimizer=SGD, lora=adapters)
    batch = rows(8, VOCABULARY)
    return two_passes(module, own_input(batch) if own else batch, folder, strategy, rank, ranks)


def on_two_ranks(rank: int, folder: str, lora: bool) -> dict[str, dict[str, Tensor]]:
    joined(rank, 2)
    return {kind: trained(Path(folder) / kind, strategy, lora, rank, 2) for kind, strategy in strategies().items()}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "adapters"])
def test_two_ranks_are_one_process(lora: bool, tmp_path: Path) -> None:
    found = processes.run(on_two_ranks, str(tmp_path / "two"), lora)
    one = trained(tmp_path / "one", "auto", lora)
    plain = trained(tmp_path / "plain", "auto", lora, own=False)
    assert any((one[name] - plain[name]).abs().max() > 1e-4 for name in one)
    assert_ranks_are_one_process(found, one)
