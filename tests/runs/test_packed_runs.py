"""A step on packed rows is the step on padded ones, whatever the loss and the models; resumed runs are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from architectures import VOCABULARY, tiny
from kd_lightning import TAID, ClippedPolicyGradient, Contrastive, ForwardKL, MiniLLM, OnPolicy
from kd_lightning.constants import TEACHER_FIELDS, TEACHER_INDEX
from kd_lightning.data import ContrastiveDataModule, InstructionDataModule
from kd_lightning.models.lora import LoRA
from kd_lightning.module import DistillationModule
from kd_lightning.teachers.hf import HFTeacher
from kd_lightning.teachers.offloaded import OffloadedTeacher
from kd_lightning.teachers.routed import RoutedTeacher
from kd_lightning.teachers.self_teacher import SelfTeacher
from plans import planned
from tiny_fits import SGD, Batch, Run, assert_same_student, fit, rows, split, weights


class PackedRun(Run):
    """Reads the rows of plain loaders without padding."""

    def configure_model(self) -> None:
        if not self.model.has_student:
            self.model.pack_rows(check=False)
        super().configure_model()


def own_input(batch: Batch) -> Batch:
    """The batch with a longer prompt for the teacher."""
    first = torch.randint(3, VOCABULARY, (len(batch["labels"]), 3), generator=torch.Generator().manual_seed(5))
    more = {"input_ids": first, "attention_mask": torch.ones_like(first), "labels": torch.full_like(first, -100)}
    return {**batch, **{own: torch.cat([more[name], batch[name]], 1) for name, own in TEACHER_FIELDS.items()}}


def data(**columns: Tensor) -> list[Batch]:
    """Three batches; a row of the second has no labels."""
    batches = split({**rows(12, VOCABULARY), **columns}, 5, 5, 2)
    batches[1]["labels"][-1] = -100
    return batches


SOURCES = torch.tensor([1, 2, 1, 2, 2, 1, 1, 2, 1, 2, 1, 2])
CASES: dict[str, dict[str, Any]] = {
    "token mean": {"ce_weight": 0.5, "temperature": 2.0},
    "sequence mean": {"reduction": "sequence_mean", "ce_weight": 0.3},
    "sum": {"reduction": "sum", "optimizer": lambda p: torch.optim.SGD(p, lr=0.01)},
    "schedule": {"objective": TAID},
    "contrastive": {"objective": Contrastive, "reduction": "sequence_mean"},
    "adapters": {"lora": LoRA(r=2), "ce_weight": 0.5},
    "no teacher": {"teacher": None, "ce_weight": 1.0},
    "own input": {},
    "average of the student": {"teacher": "average", "ce_weight": 0.5},
    "whole logits": {"student": "modernbert-decoder", "teacher": "modernbert-decoder"},
    "learned positions": {"student": "gpt2", "teacher": "falcon"},
    "offloaded": {"teacher": "offloaded"},
    "recomputed": {"gradient_checkpointing": True},
    "routed": {"teacher": "routed", "ce_weight": 0.5},
    "on-policy": {"responses": lambda: OnPolicy(share=1.0, max_new_tokens=4)},
    "policy gradient": {
        "responses": lambda: MiniLLM(max_new_tokens=4),
        "label_loss": ClippedPolicyGradient,
        "ce_weight": 0.5,
        "optimizer": lambda p: torch.optim.SGD(p, lr=0.05),
    },
}


def model(name: Any, width: int) -> Any:
    torch.manual_seed(width)
    if name == "average":
        return SelfTeacher("ema", 0.5)
    if name == "routed":
        return RoutedTeacher({kind: tiny(kind, hidden_size=width) for kind in ("llama", "qwen2")})
    if name == "offloaded":
        return OffloadedTeacher(tiny("llama", hidden_size=width))
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if name == "gpt2" else {}
    return tiny(name, hidden_size=width, **dropout) if isinstance(name, str) else name


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_the_step_of_packed_rows_is_that_of_padded_ones(case: str, accumulate: int) -> None:
    columns = {"contrastive": {"source": SOURCES}, "routed": {TEACHER_INDEX: SOURCES - 1}}
    batches = data(**columns.get(case, {}))
    batches = [own_input(batch) for batch in batches] if case == "own input" else batches

    def trained(kind: type[Run]) -> Run:
        settings: dict[str, Any] = {"student": "llama", "teacher": "qwen2", "optimizer": SGD, **CASES[case]}
        settings |= {name: settings[name]() for name in ("objective", "responses", "label_loss") if name in settings}
        settings |= {"student": model(settings["student"], 32), "teacher": model(settings["teacher"], 48)}
        torch.manual_seed(0)
        module = kind(**settings)
        return fit(module, batches, batches[:2], accumulate_grad_batches=accumulate)

    padded, packed = trained(Run), trained(PackedRun)
    assert packed.model.packed and not padded.model.packed
    assert_same_student(weights(padded), weights(packed))
    one, other = ({**run.logged[-1], "train/generate_share": 0.0} for run in (padded, packed))  # a share of the time
    assert one.keys() == other.keys()
    assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


# ---------------------------------------------------------------------------------------------------- data modules
def write(folder: Path, count: int = 30) -> str:
    lines = [
        {"instruction": "define " + "word " * (n % 9), "output": f"answer {n} " * (n % 5 + 1)} for n in range(count)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(folder / "rows.jsonl")


def run(folder: Path, steps: int, ckpt: str | None = None, kind: Any = InstructionDataModule, **kwargs: Any) -> Any:
    """A run on the bundled pair; a checkpoint of every second step is in its folder."""
    L.seed_everything(3, verbose=False)
    cached = kwargs.pop("teacher_cache", False)
    exact = {"dtype": "float32"}
    module = DistillationModule(
        "asset:student", "asset:teacher", ce_weight=0.5, optimizer=SGD, teacher_kwargs=exact, teacher_cache=cached
    )
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        logger=False,
        callbacks=[saving],
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        accumulate_grad_batches=2,
    )
    settings = {"batch_size": 6, "max_length": 64, **kwargs}
    trainer.fit(module, kind(write(folder.parent), tokenizer="asset:student", **settings), ckpt_path=ckpt)
    return module


@pytest.mark.parametrize("extra", [{}, {"batch_tokens": 90}, {"teacher_cache": True}], ids=str)
def test_packing_of_a_data_module(extra: dict[str, Any], tmp_path: Path) -> None:
    order = {"shuffle": False}  # the limit counts padding only where there is some
    padded = run(tmp_path / "padded", 2, **({} if "batch_tokens" in extra else extra), **order)
    packed = run(tmp_path / "packed", 2, packing=True, **({} if "batch_tokens" in extra else extra), **order)
    assert_same_student(weights(padded), weights(packed))
    if "batch_tokens" in extra:
        limited = run(tmp_path / "limited", 2, packing=True, **extra, **order)
        assert any(not torch.equal(x, weights(limited)[name]) for name, x in weights(packed).items())


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_run_resumed_in_a_pass_is_the_same_bit_for_bit(packing: bool, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"packing": packing, "batch_tokens": 100, "batch_size": 20}
    whole = weights(run(tmp_path / "whole", 4, **settings))
    again = weights(run(tmp_path / "again", 4, ckpt=str(tmp_path / "whole" / "step=2.ckpt"), **settings))
    assert all(torch.equal(x, again[name]) for name, x in whole.items())


def test_the_number_of_batches_is_known_before(tmp_path: Path) -> None:
    for packing in (False, True):
        data = InstructionDataModule(
            write(tmp_path), tokenizer="asset:student", batch_size=20, batch_tokens=100, packing=packing, max_length=64
        )
        data.setup("fit")
        loader = data.train_dataloader()
        for _ in range(3):
            batches = list(loader)
            assert len(batches) == len(loader) == data.batches_per_pass(L.Trainer(logger=False, accelerator="cpu"))
            masks = [batch["attention_mask"] for batch in batches]
            assert all((int(mask.sum()) if packing else mask.numel()) <= 100 or len(mask) == 1 for mask in masks)


def test_a_limit_of_tokens_counts_both_halves_of_pairs(tmp_path: Path) -> None:
    pairs = [{"prompt": f"say {n}", "chosen": "word " * (n % 7 + 1), "rejected": f"no {n}"} for n in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    data = ContrastiveDataModule(
        str(tmp_path / "pairs.jsonl"), tokenizer="asset:student", batch_size=20, batch_tokens=160, max_length=64
    )
    data.setup("fit")
    sizes = [batch["input_ids"].numel() for batch in data.train_dataloader()]
    assert max(sizes) <= 160 and len(sizes) > 2
    assert data.rows_per_batch == 2
    assert data.batches_per_pass(L.Trainer(logger=False, accelerator="cpu")) == len(sizes)


@pytest.mark.parametrize("value", [0, -5, 2.5, "many"])
def test_limits_that_are_none(value: Any) -> None:
    with pytest.raises(ValueError, match=f"batch_tokens must be an integer of at least 1 or None, got {value!r}"):
        InstructionDataModule("rows.jsonl", batch_tokens=value)
    with pytest.raises(ValueError, match="packing must be"):
        InstructionDataModule("rows.jsonl", packing=value)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_models_that_cannot_be_packed_are_refused_before_the_first_step(role: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    good, bad = tiny("llama", vocab_size=4096), tiny("mamba2", vocab_size=4096)
    pair = (bad, good) if role == "student" else (good, bad)
    module = DistillationModule(pair[0], HFTeacher(pair[1]), ForwardKL(), optimizer=SGD)
    trainer = L.Trainer(accelerator="cpu", devices=1, max_steps=1, logger=False, enable_checkpointing=False)
    data = InstructionDataModule(write(tmp_path), tokenizer="asset:student", max_length=64, packing=True)
    with pytest.raises(ValueError, match=f"packing must be false for the {role} Mamba2ForCausalLM"):
        trainer.fit(module, data)


def test_a_plan_counts_packed_rows(tmp_path: Path) -> None:
    for name in ("padded", "packed", "limited"):
        (tmp_path / name).mkdir()
    padded = planned(tmp_path / "padded", "--world_size", "1", "--data.max_length", "64")
    packed = planned(tmp_path / "packed", "--world_size", "1", "--data.max_length", "64", "--data.packing", "true")
    limited = planned(
        tmp_path / "limited", "--world_size", "1", "--data.max_length", "64", "--data.batch_tokens", "128"
    )
    assert padded["peak"] <= packed["peak"] < 1.2 * padded["peak"]
    assert limited["activations"] < 0.5 * padded["activations"]
