"""A loss that is not finite: the run stops, and the message says which of its terms is not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import runs
from kd_lightning import Divergence, LabelLoss
from kd_lightning.assets import resolve
from kd_lightning.cli.checks.preflight_model_checks import check_finite_loss
from kd_lightning.cli.prepared_run import PreparedFit
from kd_lightning.cli.program import run
from kd_lightning.teachers.hf import HFTeacher
from kd_lightning.training.finite_check import non_finite_terms
from tiny_fits import STILL, Run, bundled, fit, rows, split

BATCHES = split(rows(8, vocabulary=1000), 3, 5)


def model(name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(resolve(f"asset:{name}"), dtype=torch.float32)


def overflowing(name: str, dtype: torch.dtype = torch.float16) -> Any:
    """A model whose weights are finite, and whose activations exceed the range of half precision."""
    found = model(name)
    with torch.no_grad():
        found.model.layers[0].mlp.down_proj.weight.mul_(3e4)
        found.model.layers[0].mlp.up_proj.weight.mul_(3e2)
    return found.to(dtype)


class Unsplit(nn.Module):
    """A layer behind the logits, so that the model cannot be split and full logits are used."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head, self.factor = head, nn.Parameter(torch.ones((), dtype=head.weight.dtype))  # type: ignore[arg-type]

    @property
    def weight(self) -> Any:
        return self.head.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head(hidden) * self.factor


def unsplit(found: Any) -> Any:
    found.lm_head = Unsplit(found.lm_head)
    return found


class Broken(Divergence):
    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_p.exp() * (log_p - log_q)).sum(-1) / 0.0


class BrokenLabels(LabelLoss):
    def forward(self, log_q_label: Tensor, rows: Any) -> Tensor:
        return log_q_label * math.inf


class Poisoned(Run):
    """The student's weights are not finite from the second step on."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if self.trainer.global_step == 1:
            with torch.no_grad():
                self.student.model.layers[0].mlp.up_proj.weight[0, 0] = math.inf  # type: ignore[union-attr,operator]


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "teacher": ({"teacher": lambda: overflowing("teacher")}, "the teacher's logits"),
    "teacher, full logits": ({"teacher": lambda: unsplit(overflowing("teacher"))}, "the teacher's logits"),
    "student in half precision": ({"student": lambda: overflowing("student")}, "the student's logits"),
    "student, full logits": ({"student": lambda: unsplit(overflowing("student"))}, "the student's logits"),
    "both": (
        {"student": lambda: overflowing("student"), "teacher": lambda: overflowing("teacher")},
        "the teacher's logits, the student's logits",
    ),
    "divergence": ({"objective": Broken}, "the divergence"),
    "divergence alone": ({"objective": Broken, "ce_weight": lambda: 0.0}, "the divergence"),
    "label loss": ({"label_loss": BrokenLabels}, "the label loss"),
    "no teacher": ({"student": lambda: overflowing("student"), "teacher": lambda: None}, "the student's logits"),
    "labels alone": ({"student": lambda: overflowing("student"), "ce_weight": lambda: 1.0}, "the student's logits"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_term_is_named(case: str) -> None:
    made = {name: make() for name, make in CASES[case][0].items()}
    if "teacher" in made and made["teacher"] is None:
        made["ce_weight"] = 1.0
    with pytest.raises(
        ValueError, match=rf"the loss is (nan|-?inf) at step 0.*: not finite: {CASES[case][1]}; "
    ) as error:
        fit(bundled(optimizer=STILL, **made), BATCHES)
    text = str(error.value)
    assert "\n" not in text and ("teacher_kwargs.dtype float32" in text) == ("teacher" in CASES[case][1])


def own_input(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch with an input of the teacher's own: three tokens more at the beginning."""
    first = {"input_ids": 5, "attention_mask": 1, "labels": -100}
    pad = torch.nn.functional.pad
    return {**batch, **{f"teacher_{name}": pad(batch[name], (3, 0), value=value) for name, value in first.items()}}


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_the_teacher_is_judged_by_its_own_input(role: str) -> None:
    batches = [own_input(batch) for batch in BATCHES]
    with pytest.raises(ValueError, match=f"not finite: the {role}'s logits; "):
        fit(bundled(optimizer=STILL, **{role: overflowing(role)}), batches)


def test_a_student_that_broke_in_the_run() -> None:
    module = Poisoned(student=model("student"), teacher=model("teacher"), optimizer=STILL)
    with pytest.raises(ValueError, match=r"at step 1, on rows .*: not finite: the student's logits; .*learning rate"):
        fit(module, BATCHES + BATCHES)


def test_a_teacher_that_is_sharded_is_not_run_by_one_rank_alone() -> None:
    nan, fine = torch.tensor([1.0, math.nan]), torch.ones(2)
    module = bundled()  # its teacher is not loaded: running it would fail
    for values, terms in (
        ({"kd": nan, "ce": fine}, "the teacher's logits or the divergence"),
        ({"kd": nan, "ce": nan}, "the student's logits"),
        ({"kd": fine, "ce": nan}, "the label loss"),
        ({"kd": fine, "ce": fine}, "the weighted sum of the terms"),
    ):
        assert non_finite_terms(module.loss, module.teacher, BATCHES[0], values, run_teacher=False) == terms


def test_nothing_is_computed_for_a_loss_that_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    hidden = HFTeacher.hidden
    monkeypatch.setattr(HFTeacher, "hidden", lambda self, batch: passes.append(1) or hidden(self, batch))
    fit(bundled(), BATCHES)
    assert len(passes) == len(BATCHES)


@pytest.mark.slow
def test_preflight_of_a_teacher_in_a_folder(tmp_path: Path) -> None:
    overflowing("teacher").save_pretrained(tmp_path / "teacher")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "teacher" / name).write_bytes((Path(resolve("asset:teacher")) / name).read_bytes())
    words = [*runs.little(tmp_path / "root", steps=2), "--model.teacher", str(tmp_path / "teacher")]
    words += ["--data.train", str(runs.little_data(tmp_path))]
    ((level, text),) = check_finite_loss(PreparedFit(run(words, start=False), "preflight"))
    assert level == "error"
    assert text.startswith("the loss of a batch is not finite: the teacher's logits: load the teacher in a dtype")
    words += ["--model.teacher_kwargs.dtype", "float32"]
    assert not list(check_finite_loss(PreparedFit(run(words, start=False), "preflight")))
