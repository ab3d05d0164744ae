"""Hugging Face's Trainer with the mixin: a step is the Lightning module's, whatever the accumulation and the ranks."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from architectures import VOCABULARY, tiny
from kd_lightning import DistillationModule, DistillationStep, ForwardKL, Linear, ReverseKL, SkewKL
from kd_lightning.integrations.transformers import DistillationMixin
from locations import ROOT
from tiny_fits import SGD, Batch, fit, rows, split

FIELDS = ("input_ids", "attention_mask", "labels")


class KDTrainer(DistillationMixin, Trainer):
    """As in the documentation."""


def pair() -> tuple[Any, Any]:
    torch.manual_seed(0)
    return tiny("llama"), tiny("qwen3", hidden_size=48)


def trainer(folder: Path, student: Any, batches: list[Batch], accumulate: int, **kwargs: Any) -> KDTrainer:
    """A trainer whose items are batches, in their order, with plain SGD."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": accumulate,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "max_grad_norm": 0,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
    }
    items = [{name: batch[name] for name in FIELDS} for batch in batches]
    return KDTrainer(
        student,
        TrainingArguments(str(folder), **{**settings, **kwargs.pop("settings", {})}),
        data_collator=lambda found: found[0],
        train_dataset=items,
        optimizers=(SGD(student.parameters()), None),
        **kwargs,
    )


def parameters(model: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("accumulate", [1, 2, 3])  # with 5 batches the last window is shorter
@pytest.mark.parametrize("objective", [ForwardKL, ReverseKL])
def test_steps_are_those_of_the_lightning_module(accumulate: int, objective: Any, tmp_path: Path) -> None:
    batches = split(rows(12, VOCABULARY), 1, 4, 2, 3, 2)
    student, teacher = pair()
    ours = copy.deepcopy(student)
    settings: dict[str, Any] = {"ce_weight": 0.3, "temperature": 1.5}
    trainer(tmp_path, student, batches, accumulate, teacher=teacher, objective=objective(), **settings).train()
    module = DistillationModule(ours, copy.deepcopy(teacher), objective(), optimizer=SGD, **settings)
    fit(module, batches, accumulate_grad_batches=accumulate)
    for x, y in zip(parameters(student), parameters(ours), strict=True):
        torch.testing.assert_close(x, y, atol=2e-5, rtol=0)


def test_schedules_move_and_the_terms_are_logged(tmp_path: Path) -> None:
    student, teacher = pair()
    weight = Linear(0.0, 0.5)
    found = trainer(tmp_path, student, split(rows(8, VOCABULARY), 2, 2, 2, 2), 1, teacher=teacher, ce_weight=weight)
    found.train()
    assert float(weight()) == pytest.approx(0.5)
    logged = [entry for entry in found.state.log_history if "loss" in entry]
    assert len(logged) == 4
    assert all(math.isfinite(entry["kd"]) and math.isfinite(entry["ce"]) for entry in logged)


def test_without_a_teacher_it_is_the_trainer_itself(tmp_path: Path) -> None:
    batches = split(rows(6, VOCABULARY), 1, 3, 2)
    student, _ = pair()
    plain = copy.deepcopy(student)
    trainer(tmp_path / "a", student, batches, 2, ce_weight=1.0).train()
    other = trainer(tmp_path / "b", plain, batches, 2, ce_weight=1.0)
    Trainer(
        plain,
        other.args,
        data_collator=lambda found: found[0],
        train_dataset=other.train_dataset,
        optimizers=(SGD(plain.parameters()), None),
    ).train()
    for x, y in zip(parameters(student), parameters(plain), strict=True):
        torch.testing.assert_close(x, y, atol=2e-5, rtol=0)


def test_evaluation_gives_the_same_loss_and_whole_logits(tmp_path: Path) -> None:
    (batch,) = split(rows(3, VOCABULARY), 3)
    student, teacher = pair()
    found = trainer(tmp_path, student, [batch], 1, teacher=teacher, objective=SkewKL(0.2))
    loss, outputs = found.compute_loss(student.eval(), {name: batch[name] for name in FIELDS}, return_outputs=True)
    assert outputs.logits.shape[:2] == batch["labels"].shape
    step = DistillationStep(copy.deepcopy(student), teacher, SkewKL(0.2))
    torch.testing.assert_close(loss, step(**{name: batch[name] for name in FIELDS}).divided(), rtol=1e-5, atol=1e-6)
    assert found.evaluate([{name: batch[name] for name in FIELDS}])["eval_loss"] == pytest.approx(
        float(loss.detach()), rel=1e-4
    )


def test_bad_input_is_refused(tmp_path: Path) -> None:
    student, teacher = pair()
    batches = split(rows(3, VOCABULARY), 3)
    with pytest.raises(ValueError, match="teacher must be given unless ce_weight is 1"):
        trainer(tmp_path, student, batches, 1)
    with pytest.raises(ValueError, match="two objects"):
        trainer(tmp_path, student, batches, 1, teacher=student)
    found = trainer(tmp_path, student, batches, 1, teacher=teacher)
    ids = batches[0]["input_ids"]
    with pytest.raises(ValueError, match="packed rows"):
        found.compute_loss(student, {"input_ids": ids, "labels": ids, "position_ids": ids})
    with pytest.raises(ValueError, match="labels must be in the batch"):
        found.compute_loss(student, {"input_ids": ids})


SCRIPT = """
import sys
import torch
from pathlib import Path
from test_hf_trainer import VOCABULARY, pair, parameters, rows, split, trainer

torch.set_num_threads(1)
folder = Path(sys.argv[1])
student, teacher = pair()
batches = split(rows(12, VOCABULARY), 1, 4, 2, 5)
settings = {"ddp_backend": "gloo"}
found = trainer(folder, student, batches, 2, teacher=teacher, ce_weight=0.3, settings=settings)
found.train()
torch.save(parameters(student), folder / f"{found.args.process_index}.pt")
"""


@pytest.mark.slow
def test_two_ranks_are_one_process(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    paths = [ROOT / "tests" / "integrations", ROOT / "tests" / "support", ROOT]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "script.py"), str(tmp_path)], env=environment, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    student, teacher = pair()
    whole = split(rows(12, VOCABULARY), 12)
    trainer(tmp_path / "one", student, whole, 1, teacher=teacher, ce_weight=0.3).train()
    for rank in (0, 1):
        for x, y in zip(torch.load(tmp_path / f"{rank}.pt", weights_only=True), parameters(student), strict=True):
            torch.testing.assert_close(x, y, atol=2e-5, rtol=0)
