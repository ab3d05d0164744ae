"""A plan of teacher and student with two tokenizers, compared with the run that it plans."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import runs
from kd_lightning import ChunkLikelihood, DistillationModule, Divergence, ForwardKL, InstructionDataModule, WeightedSum
from kd_lightning.assets import resolve
from kd_lightning.cli.program import main as program
from kd_lightning.constants import TEACHER_FIELDS, TEACHER_POSITIONS
from kd_lightning.engine.alignment import label_log_probs
from kd_lightning.models.lora import LoRA
from kd_lightning.training.teacher_setup import use_two_tokenizers
from plans import Watch, moments, planned
from tiny_fits import fit

STUDENT, TEACHER = "asset:student_byte_fallback", "asset:teacher"
ROWS, LENGTH = 16, 64  # more tokens than one chunk holds
SHIPPED = WeightedSum([ForwardKL(), ChunkLikelihood(tau=100.0)], [1.0, 100.0])
WORDS = ["--config", str(runs.CONFIGS / "cross_tokenizer.yaml"), "--world_size", "1"]
WORDS += ["--trainer.accelerator", "cpu", "--data.batch_size", str(ROWS), "--data.max_length", str(LENGTH)]


def model_folders(folder: Path) -> list[str]:
    """Words that name folders with a configuration and the files of a tokenizer, without weights."""
    words = []
    for role, name in (("student", STUDENT), ("teacher", TEACHER)):
        path = Path(shutil.copytree(resolve(name), folder / role, ignore=shutil.ignore_patterns("*.safetensors")))
        assert (path / "tokenizer.json").is_file()
        assert not list(path.glob("*.safetensors"))
        words += [f"--model.{role}", str(path)]
    return words


def measured(objective: Divergence, lora: LoRA | None = None) -> tuple[Watch, dict[str, int]]:
    """The second step of a run on full rows of the longest length, each label with a position of the teacher."""
    data = InstructionDataModule("asset:train", tokenizer=STUDENT, teacher_tokenizer=TEACHER)
    assert data.load_tokenizers()
    found = DistillationModule(STUDENT, TEACHER, objective, reduction="sequence_mean", lora=lora)
    use_two_tokenizers(data, found.teacher, found.model, found.reporter)
    known = data.vocabulary_map
    assert known is not None
    ids = torch.randint(3, known.student_size, (ROWS, LENGTH))
    own = torch.randint(3, known.teacher_size, (ROWS, LENGTH))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    fields = {"input_ids": own, "attention_mask": torch.ones_like(own), "labels": own}
    batch |= {TEACHER_FIELDS[name]: column for name, column in fields.items()}
    batch |= {TEACHER_POSITIONS: torch.arange(LENGTH).expand(ROWS, -1).clone(), "source": torch.zeros(ROWS).long()}
    watch = Watch(1, [known.student_size, known.teacher_size])
    fit(found, [batch] * 2, callbacks=[watch], gradient_clip_val=1.0, log_every_n_steps=50)
    learning = [x for x in found.student.parameters() if x.requires_grad]
    sizes = {
        "parameters": sum(x.nbytes for x in found.student.parameters()),
        "gradients": sum(x.nbytes for x in learning),
        "optimizer": sum(x.nbytes for x in moments(found.trainer)),
    }
    return watch, sizes


def test_the_shipped_config_holds_what_was_planned(tmp_path: Path) -> None:
    watch, sizes = measured(SHIPPED)
    plan = planned(tmp_path, *WORDS, *model_folders(tmp_path))
    assert plan["notes"] == []
    assert {name: plan["student"][name] for name in sizes} == sizes
    assert plan["peak"] == pytest.approx(watch.tracker.peak, rel=0.1)
    assert plan["tiles"] == watch.tracker.most["tiles"]


def test_adapters_hold_what_was_planned(tmp_path: Path) -> None:
    watch, sizes = measured(SHIPPED, LoRA(r=2))
    plan = planned(tmp_path, *WORDS, "--model.lora.r", "2")
    assert {name: plan["student"][name] for name in sizes} == sizes
    assert 0 < sizes["gradients"] < 0.2 * sizes["parameters"]
    assert plan["peak"] == pytest.approx(watch.tracker.peak, rel=0.1)


def test_the_plan_sees_the_second_projection_of_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    projected: list[int] = []

    def counted(source: Any, *args: Any) -> Any:
        projected.append(source.vocabulary)
        return label_log_probs(source, *args)

    monkeypatch.setattr("kd_lightning.losses.batch.label_log_probs", counted)
    alone = measured(ForwardKL())[0]
    plain = planned(tmp_path, *WORDS, "--model.objective", "ForwardKL")
    assert plain["tiles"] == alone.tracker.most["tiles"]
    assert plain["peak"] == pytest.approx(alone.tracker.peak, rel=0.1)
    assert projected == []
    planned(tmp_path, *WORDS)
    assert sorted(projected) == [1024, 2048]


def test_a_gpu_and_two_ranks_are_planned(tmp_path: Path) -> None:
    large = [*WORDS, "--data.batch_size", "16", "--data.max_length", "256"]
    cpu, gpu = planned(tmp_path, *large), planned(tmp_path, *large, "--trainer.accelerator", "auto")
    assert gpu["tiles"] > cpu["tiles"]  # larger chunks
    two = planned(tmp_path, *WORDS, "--world_size", "2", "--trainer.strategy", "fsdp2")
    one = planned(tmp_path, *WORDS)
    assert 2 * two["student"]["parameters"] == pytest.approx(one["student"]["parameters"], rel=1e-3)
    assert two["tiles"] == one["tiles"]


def test_a_folder_without_a_tokenizer_is_noted(tmp_path: Path) -> None:
    words = model_folders(tmp_path)
    for path in (tmp_path / "student").glob("*token*"):
        path.unlink()
    plan = planned(tmp_path, *WORDS, *words, "--model.objective", "ForwardKL")
    assert plan["notes"] == ["no tokenizer files for student: both models are assumed to read the same tokens"]
    plan = planned(tmp_path, *WORDS, *words, "--data.tokenizer", STUDENT)
    assert plan["notes"] == []


def test_a_cache_of_top_k_is_planned(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    words = ["cache", "--config", "cross_tokenizer", "--data.train", "asset:validation", "--data.val", "null"]
    words += ["--data.test", "null", "--data.max_length", "64", "--kind", "top_k", "--k", "4"]
    words += ["--model.objective", "ForwardKL", "--output", str(cache), "--trainer.accelerator", "cpu"]
    assert program(words) == 0
    own = ["--model.teacher", "CachedTeacher", "--model.teacher.path", str(cache), "--model.objective", "ForwardKL"]
    plan = planned(tmp_path, *WORDS, *own, "--data.teacher_tokenizer", TEACHER)
    assert plan["tiles"] > 0
    assert json.loads((tmp_path / "plan.json").read_text(encoding="utf-8")) == plan


def test_what_a_run_refuses_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", *WORDS, "--trainer.default_root_dir", str(tmp_path), "--model.objective", "AdaptiveKL"]
    assert program(words) == 1
    assert "AdaptiveKL cannot be computed" in capsys.readouterr().err
