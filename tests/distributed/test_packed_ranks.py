"""Packed rows over two gloo ranks: ddp and fsdp2 are one process with padded rows, with and without adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import processes
from architectures import VOCABULARY, tiny
from kd_lightning import DistillationModule
from kd_lightning.models.lora import LoRA
from sharded_fits import assert_ranks_are_one_process, joined, strategies, two_passes
from tiny_fits import SGD, rows


class PackedModule(DistillationModule):
    def configure_model(self) -> None:
        if not self.model.has_student:
            self.model.pack_rows(check=False)
        super().configure_model()


def trained(
    folder: Path, strategy: Any, lora: bool, rank: int = 0, ranks: int = 1, packed: bool = True
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    student, teacher = tiny("llama"), tiny("llama", hidden_size=48)
    kind = PackedModule if packed else DistillationModule
    module = kind(student, teacher, ce_weight=0.5, optimizer=SGD, lora=LoRA(r=2) if lora else None)
    found = two_passes(module, rows(8, VOCABULARY), folder, strategy, rank, ranks)
    assert module.model.packed is packed
    return found


def on_two_ranks(rank: int, folder: str, lora: bool) -> dict[str, dict[str, Tensor]]:
    joined(rank, 2)
    return {kind: trained(Path(folder) / kind, strategy, lora, rank, 2) for kind, strategy in strategies().items()}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "adapters"])
def test_two_packed_ranks_are_one_padded_process(lora: bool, tmp_path: Path) -> None:
    found = processes.run(on_two_ranks, str(tmp_path / "two"), lora)
    assert_ranks_are_one_process(found, trained(tmp_path / "one", "auto", lora, packed=False))
