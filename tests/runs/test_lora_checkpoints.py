"""A checkpoint of a student with adapters holds what learns, and goes on with the weights that it learnt on, or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import processes
from architectures import VOCABULARY, tiny
from kd_lightning import TAID, DistillationModule
from kd_lightning.distributed.checkpoint_io import open_checkpoint
from kd_lightning.distributed.dtensor import full_state_dict
from kd_lightning.models.lora import LoRA
from kd_lightning.strategies import FSDP2Strategy
from sharded_fits import joined, train
from tiny_fits import rows, split

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")  # resumed runs write elsewhere

EXPORT = ("student/model.safetensors", "adapter/adapter_model.safetensors")


def written(folder: Path, seed: int = 0) -> str:
    """A folder with a small model whose weights are those of this seed."""
    torch.manual_seed(seed)
    model = tiny("llama", tie_word_embeddings=True)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    return str(folder)


def run(folder: Path, student: Any, start: Path | None = None, rank: int = 0, ranks: int = 1, **strategy: Any) -> Any:
    """Three steps under AdamW, with a checkpoint of each and the export; the module."""
    torch.manual_seed(0)
    module = DistillationModule(student, tiny("llama", hidden_size=48), TAID(), lora=LoRA(2))
    batch = split(rows(8, VOCABULARY), *([8 // ranks] * ranks))[rank]
    sharded = FSDP2Strategy(**strategy) if ranks > 1 else "auto"
    train(module, batch, folder, start, devices=ranks, strategy=sharded, max_epochs=3)
    return module


def on_two_ranks(rank: int, folder: str) -> list[dict[str, Tensor]]:
    """Students of runs that are not cut and of those that go on, with checkpoints of one file and of a folder."""
    joined(rank, 2)
    found = []
    for kind in (False, True):
        whole, again = Path(folder) / str(kind), Path(folder) / f"{kind} again"
        for place, start in ((whole, None), (again, whole / "epoch=1.ckpt")):
            module = run(place, f"{folder}/start", start, rank, 2, save_distributed_checkpoint=kind)
            found.append(full_state_dict(module.student))
    return found


def learnt(checkpoint: Path) -> set[str]:
    return {name for name in open_checkpoint(checkpoint)["state_dict"] if name.startswith("model.student.")}


def same_export(one: Path, other: Path) -> bool:
    return all((one / file).read_bytes() == (other / file).read_bytes() for file in EXPORT)


def test_one_device(tmp_path: Path) -> None:
    start = written(tmp_path / "start")
    run(tmp_path / "whole", start)
    names = learnt(tmp_path / "whole" / "epoch=1.ckpt")
    assert names
    assert all(".lora_" in name for name in names)
    run(tmp_path / "again", start, tmp_path / "whole" / "epoch=1.ckpt")
    assert same_export(tmp_path / "whole", tmp_path / "again")


def test_sharded_ranks_and_one_device_go_on_with_theirs(tmp_path: Path) -> None:
    start = written(tmp_path / "start")
    for file, file_again, folder, folder_again in processes.run(on_two_ranks, str(tmp_path)):
        for name, tensor in file.items():
            assert torch.equal(file_again[name], tensor), name
            assert torch.equal(folder[name], tensor), name
            assert torch.equal(folder_again[name], tensor), name
    assert same_export(tmp_path / "False", tmp_path / "True again")
    for kind in ("False", "True"):
        assert all(".lora_" in name for name in learnt(tmp_path / kind / "epoch=1.ckpt"))
        run(tmp_path / f"{kind} over", start, tmp_path / kind / "epoch=2.ckpt")  # no step left but the export
        assert same_export(tmp_path / kind, tmp_path / f"{kind} over")


def test_adapters_of_other_weights_are_refused(tmp_path: Path) -> None:
    run(tmp_path / "whole", written(tmp_path / "start"))
    other = written(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"adapters of another model than .*other: its base weights have digest"):
        run(tmp_path / "again", other, tmp_path / "whole" / "epoch=1.ckpt")


def test_weights_without_a_source_are_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = run(tmp_path, tiny("llama", tie_word_embeddings=True))
    assert learnt(tmp_path / "epoch=1.ckpt") == {f"model.student.{name}" for name in module.student.state_dict()}
