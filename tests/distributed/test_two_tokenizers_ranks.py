"""A teacher with another tokenizer over two gloo ranks: ddp and fsdp2 are one process, with and without adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import processes
from architectures import VOCABULARY, tiny
from kd_lightning import DistillationModule, VocabularyMap
from kd_lightning.constants import TEACHER_FIELDS, TEACHER_POSITIONS
from kd_lightning.models.lora import LoRA
from sharded_fits import assert_ranks_are_one_process, joined, strategies, two_passes
from tiny_fits import SGD, Batch, rows

TEACHER_VOCABULARY, PAIRS, MORE = 56, 40, 3


def known() -> VocabularyMap:
    """A map that leaves tokens without a partner on both sides."""
    numbers = torch.Generator().manual_seed(6)
    sides = [torch.randperm(size, generator=numbers)[:PAIRS] for size in (VOCABULARY, TEACHER_VOCABULARY)]
    return VocabularyMap(*sides, VOCABULARY, TEACHER_VOCABULARY)


def two_tokenizers(batch: Batch, aligned: bool) -> Batch:
    """The batch with the teacher's tokens, `MORE` longer; it is read at two labels of three, or at none."""
    shape = (len(batch["labels"]), batch["labels"].shape[1] + MORE)
    ids = torch.randint(3, TEACHER_VOCABULARY, shape, generator=torch.Generator().manual_seed(5))
    labels = torch.cat([torch.full((shape[0], MORE), -100), batch["labels"]], 1)
    mask = torch.cat([torch.ones(shape[0], MORE, dtype=torch.long), batch["attention_mask"]], 1)
    teacher = {"input_ids": ids, "attention_mask": mask, "labels": torch.where(labels == -100, -100, ids)}
    column = torch.arange(batch["labels"].shape[1])
    read = (batch["labels"] != -100) & (column % 3 != 0) & aligned
    positions = torch.where(read, column + MORE, -1)
    return {**batch, **{own: teacher[name] for name, own in TEACHER_FIELDS.items()}, TEACHER_POSITIONS: positions}


def trained(
    folder: Path, strategy: Any, lora: bool, rank: int = 0, ranks: int = 1, aligned: bool = True
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    student, teacher = tiny("llama"), tiny("llama", hidden_size=48, vocab_size=TEACHER_VOCABULARY)
    adapters = LoRA(r=2) if lora else None
    module = DistillationModule(student, teacher, ce_weight=0.5, optimizer=SGD, lora=adapters)
    module.model.use_vocabulary_map(known())
    module.reporter.use_two_tokenizers()
    batch = two_tokenizers(rows(8, VOCABULARY), aligned)
    return two_passes(module, batch, folder, strategy, rank, ranks)


def on_two_ranks(rank: int, folder: str, lora: bool) -> dict[str, dict[str, Tensor]]:
    joined(rank, 2)
    return {kind: trained(Path(folder) / kind, strategy, lora, rank, 2) for kind, strategy in strategies().items()}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "adapters"])
def test_two_ranks_are_one_process(lora: bool, tmp_path: Path) -> None:
    found = processes.run(on_two_ranks, str(tmp_path / "two"), lora)
    one = trained(tmp_path / "one", "auto", lora)
    unread = trained(tmp_path / "unread", "auto", lora, aligned=False)
    assert any((one[name] - unread[name]).abs().max() > 1e-4 for name in one)
    assert_ranks_are_one_process(found, one)
