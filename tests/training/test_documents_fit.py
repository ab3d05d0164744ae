"""Training on documents: the loss of a slow reference, a cache, and a run that resumes in mid-epoch."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

import runs
from kd_lightning import DistillationModule, ForwardKL, OnPolicy
from kd_lightning.assets import resolve
from kd_lightning.callbacks.generation_eval import GenerationQuality
from kd_lightning.cli.program import main
from kd_lightning.data import InstructionDataModule
from slow_reference import reduce, token_losses
from tiny_fits import SGD, assert_same_student, weights

FP32: dict[str, Any] = {"dtype": "float32"}


def documents(**kwargs: Any) -> InstructionDataModule:
    settings = {"tokenizer": "asset:student", "batch_size": 3, "max_length": 48, **kwargs}
    return InstructionDataModule("asset:text_validation", **settings)


def trainer(root: Path, **kwargs: Any) -> L.Trainer:
    settings: dict[str, Any] = {"max_steps": 6, "logger": False, "enable_checkpointing": False, "limit_val_batches": 0}
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=root,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **{**settings, **kwargs},
    )


def pair(**kwargs: Any) -> DistillationModule:
    return DistillationModule(
        **{"student": "asset:student", "teacher": "asset:teacher", "teacher_kwargs": FP32, "optimizer": SGD, **kwargs}
    )


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_a_step_equals_a_loop_over_the_tokens(reduction: str, tmp_path: Path) -> None:
    data = documents(shuffle=False)
    data.setup("fit")
    batch: dict[str, Tensor] = next(iter(data.train_dataloader()))
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(resolve(f"asset:{name}"), dtype=torch.float32).double()
        for name in ("student", "teacher")
    )
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        theirs = teacher(**inputs).logits[:, :-1]
    ours = student(**inputs).logits[:, :-1]
    reduce(token_losses(ours, theirs, batch["labels"][:, 1:], ForwardKL(), ce_weight=0.3), reduction).backward()
    expected = {name: (p - p.grad).detach().float() for name, p in student.named_parameters() if p.grad is not None}

    module = pair(ce_weight=0.3, reduction=reduction)
    trainer(tmp_path, max_steps=1).fit(module, datamodule=documents(shuffle=False))
    found = weights(module)
    assert_same_student({name: found[name] for name in expected}, expected)


def test_a_cached_teacher_gives_the_same_student(tmp_path: Path) -> None:
    found = []
    for name in ("live", "cached"):
        L.seed_everything(3, verbose=False)
        module = pair(teacher_cache=name == "cached")
        trainer(tmp_path / name).fit(module, datamodule=documents())
        found.append(weights(module))
    assert_same_student(*found)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")  # both runs save there
def test_a_run_resumes_in_mid_epoch_to_the_last_bit(tmp_path: Path) -> None:
    found = []
    for name, saved in (("whole", None), ("resumed", tmp_path / "saved" / "step=4.ckpt")):
        L.seed_everything(3, verbose=False)
        module = pair(optimizer=functools.partial(torch.optim.AdamW, lr=1e-3))
        saves = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=4, save_top_k=-1)
        run = trainer(tmp_path / name, max_steps=9, max_epochs=-1, callbacks=[saves], enable_checkpointing=True)
        run.fit(module, datamodule=documents(), ckpt_path=saved, weights_only=True)
        found.append(weights(module))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_responses_of_the_student_need_prompts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.responses must be null: the train rows are documents .*data.train"):
        trainer(tmp_path).fit(pair(responses=OnPolicy(1.0)), datamodule=documents(max_length=256))


def test_generation_metrics_need_prompts(tmp_path: Path) -> None:
    run = trainer(tmp_path, limit_val_batches=1, callbacks=[GenerationQuality(every_n_validations=1)])
    with pytest.raises(ValueError, match=r"generation.every_n_validations must be 0: the val rows are documents"):
        run.fit(pair(), datamodule=documents(val="asset:text_test"))


def test_a_folder_of_text_files_from_the_command_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for n in range(6):
        (tmp_path / f"{n}.txt").write_text(f"Chapter {n}. Once upon a time there was a town by the sea.\n" * 9)
    root = tmp_path / "root"
    words = runs.little(root, "pretraining", steps=2, test=True)
    assert main([*words, "--data.train", str(tmp_path), "--trainer.limit_test_batches", "2"]) == 0
    assert {row["exact_match"] for row in runs.results(root).values()} == {None}
    assert all(row["nll"] > 0 for row in runs.results(root).values())
    assert "no exact match, as the test rows are documents" in caplog.text


def test_two_tokenizers_from_the_command_line(tmp_path: Path) -> None:
    root, data = tmp_path / "root", ["--data.train", "asset:text_validation", "--data.val", "asset:text_test"]
    words = [*runs.little(root, "cross_tokenizer", steps=3), *data, "--data.max_length", "40"]
    assert main([*words, "--data.test", "null", "--trainer.val_check_interval", "3"]) == 0
    assert (root / "student").is_dir()
    check = ["preflight", *words[1:], "--data.test", "null", "--json", str(tmp_path / "found.json")]
    assert main([*check, "--trainer.default_root_dir", str(tmp_path / "other")]) == 0
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert not [finding for finding in found if finding["level"] == "error"], found
