"""Runs whose teacher reads an input of its own: with the student's prompt bit for bit the plain run, with another one
the loss of two separate passes."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kd_lightning import DistillationModule, ForwardKL, ReverseKL
from kd_lightning.constants import IGNORE_INDEX, teacher_view
from kd_lightning.data import ContrastiveDataModule, InstructionDataModule
from kd_lightning.label_losses import ClippedPolicyGradient
from kd_lightning.models.loading import load_causal_lm
from kd_lightning.models.lora import LoRA
from kd_lightning.objectives import Contrastive
from kd_lightning.rollout import AdaptiveReplay, OnPolicy
from kd_lightning.rollout.minillm import MiniLLM
from kd_lightning.teachers import OffloadedTeacher
from kd_lightning.teachers.cache_writer import fill_cache
from kd_lightning.teachers.cached import CachedTeacher
from kd_lightning.teachers.hf import HFTeacher
from locations import ROOT
from tiny_fits import assert_same_student, fit_data

SGD = functools.partial(torch.optim.SGD, lr=0.1)
FRESH = {"max_new_tokens": 8}
FP32 = {"dtype": "float32"}  # bfloat16 rounds otherwise with other padding


def bundled_rows(count: int) -> list[dict[str, Any]]:
    lines = ROOT.joinpath("kd_lightning/assets/train.jsonl").read_text().splitlines()[:count]
    return [{**json.loads(line), "hint": f"hint {n} " * (n % 4)} for n, line in enumerate(lines)]


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def data_of(path: str, prompt: str | None, kind: Any = InstructionDataModule) -> Any:
    torch.manual_seed(0)
    return kind(path, tokenizer="asset:student", batch_size=6, max_length=96, shuffle=False, teacher_prompt=prompt)


def train(module: DistillationModule, data: Any, steps: int = 3) -> dict[str, Tensor]:
    return fit_data(module, data, steps, seed=3)


def module(**kwargs: Any) -> DistillationModule:
    return DistillationModule("asset:student", **{"teacher": "asset:teacher", "optimizer": SGD, **kwargs})


SOURCES: dict[str, Any] = {
    "dataset": dict,
    "on-policy": lambda: {"responses": OnPolicy(share=1.0, **FRESH)},
    "replay": lambda: {"responses": AdaptiveReplay(threshold=1.0, capacity=8, fresh_share=0.5, **FRESH)},
    "minillm": lambda: {
        "responses": MiniLLM(inner_epochs=2, **FRESH),
        "objective": ReverseKL(),
        "label_loss": ClippedPolicyGradient(),
        "ce_weight": 0.5,
    },
    "offloaded": lambda: {"teacher": OffloadedTeacher("asset:teacher")},
    "adapters": lambda: {"lora": LoRA(r=2)},
}


@pytest.mark.parametrize("source", SOURCES)
def test_the_students_prompt_gives_the_same_bits(source: str, tmp_path: Path) -> None:
    path = write(tmp_path, bundled_rows(18))
    plain, same, other = (
        train(module(**SOURCES[source]()), data_of(path, prompt)) for prompt in (None, "{prompt}", "{hint}{prompt}")
    )
    assert plain.keys() == same.keys()
    assert all(torch.equal(plain[name], same[name]) for name in plain)
    assert not all(torch.equal(plain[name], other[name]) for name in plain)


def test_the_students_prompt_gives_the_same_bits_on_pairs(tmp_path: Path) -> None:
    rows = [
        {"instruction": row["instruction"], "chosen": row["output"], "rejected": f"no {row['output']}", "hint": "x"}
        for row in bundled_rows(9)
    ]
    path = write(tmp_path, rows)
    plain, same, other = (
        train(module(objective=Contrastive()), data_of(path, prompt, ContrastiveDataModule))
        for prompt in (None, "{prompt}", "{hint}{prompt}")
    )
    assert all(torch.equal(plain[name], same[name]) for name in plain)
    assert not all(torch.equal(plain[name], other[name]) for name in plain)


def separate_step(path: str, prompt: str) -> dict[str, Tensor]:
    """One SGD step on half KL, half label loss by two separate passes and a loop over rows and tokens."""
    data = data_of(path, prompt)
    data.setup("fit")
    (batch, *_) = data.train_dataloader()
    student, teacher = load_causal_lm("asset:student").train(), load_causal_lm("asset:teacher", kwargs=FP32).eval()
    total, count = torch.zeros(()), 0
    for row in range(len(batch["labels"])):
        ids, labels, keep = (batch[name][row] for name in ("input_ids", "labels", "attention_mask"))
        view = {name: column[row] for name, column in teacher_view(batch).items()}
        log_q = student(input_ids=ids[keep.bool()][None]).logits[0].log_softmax(-1)
        with torch.no_grad():
            log_p = teacher(input_ids=view["input_ids"][view["attention_mask"].bool()][None]).logits[0].log_softmax(-1)
        ours = [n for n in range(1, len(labels)) if labels[n] != IGNORE_INDEX]
        theirs = [n for n in range(1, len(view["labels"])) if view["labels"][n] != IGNORE_INDEX]
        for one, other in zip(ours, theirs, strict=True):
            p, q = log_p[other - 1], log_q[one - 1]
            total = total + 0.5 * (p.exp() * (p - q)).sum() - 0.5 * q[labels[one]]
            count += 1
    (total / count).backward()
    torch.optim.SGD(student.parameters(), lr=0.1).step()
    return {name: parameter.detach() for name, parameter in student.named_parameters()}


@pytest.mark.parametrize("cut", [True, False], ids=["hidden", "logits"])
def test_a_step_is_that_of_two_separate_passes(cut: bool, tmp_path: Path) -> None:
    path = write(tmp_path, bundled_rows(6))
    prompt = "{hint} and {prompt} again"
    run = module(objective=ForwardKL(), ce_weight=0.5, teacher_kwargs=FP32)
    if not cut:

        def refuse(model: Any) -> Any:
            raise ValueError("whole logits")

        run.model.set_student = functools.partial(run.model.set_student, split=refuse)  # type: ignore[method-assign]
    assert_same_student(train(run, data_of(path, prompt), steps=1), separate_step(path, prompt), atol=2e-6)


@pytest.mark.parametrize("kind", ["hidden", "top_k"])
def test_a_cache_holds_the_teachers_own_input(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path, bundled_rows(18))
    data = data_of(path, "{hint}{prompt}")
    data.setup("fit")
    teacher = HFTeacher("asset:teacher", FP32)
    teacher.load()
    fill_cache(tmp_path / "cache", teacher, data, 2048, kind=kind, dtype="float32", k=2047, bar=False)
    live = train(module(teacher_kwargs=FP32), data_of(path, "{hint}{prompt}"))
    cached = train(module(teacher=CachedTeacher(str(tmp_path / "cache"))), data_of(path, "{hint}{prompt}"))
    assert_same_student(live, cached, atol=2e-6)
    for prompt in (None, "{prompt}", "{hint} {prompt}"):
        with pytest.raises(ValueError, match=r"teacher cache .* lacks .* rows of train"):
            train(module(teacher=CachedTeacher(str(tmp_path / "cache"))), data_of(path, prompt))


class Keeps(DistillationModule):
    """Keeps the batches that were trained on."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        draw, kept = self.rollout.draw, self.__dict__.setdefault("kept", [])

        def keep(*args: Any) -> Any:
            found = draw(*args)
            kept.append((args[0], found[0]))
            return found

        self.rollout.draw = keep  # type: ignore[method-assign]
        try:
            return super().training_step(batch, batch_idx)
        finally:
            self.rollout.draw = draw  # type: ignore[method-assign]


@pytest.mark.parametrize("source", ["on-policy", "replay", "minillm"])
def test_a_generated_response_follows_the_teachers_own_prompt(source: str, tmp_path: Path) -> None:
    path = write(tmp_path, bundled_rows(18))
    run = Keeps("asset:student", teacher="asset:teacher", optimizer=SGD, **SOURCES[source]())
    train(run, data_of(path, "{hint}{prompt}"), steps=3)
    prompts = {}
    for given, _ in run.kept:  # type: ignore[attr-defined]
        view = teacher_view(given)
        for row, ids, labels in zip(given["row_ids"].tolist(), view["input_ids"], view["labels"], strict=True):
            prompts[row] = ids[: int((labels != IGNORE_INDEX).nonzero()[0])].tolist()
    for _, drawn in run.kept:  # type: ignore[attr-defined]
        view = teacher_view(drawn)
        assert not torch.equal(view["input_ids"], drawn["input_ids"])
        parts = (drawn["row_ids"].tolist(), drawn["labels"], view["input_ids"], view["labels"])
        for row, ours, ids, theirs in zip(*parts, strict=True):
            tokens = ours[ours != IGNORE_INDEX].tolist()
            assert tokens == theirs[theirs != IGNORE_INDEX].tolist()
            assert ids[: len(prompts[row]) + len(tokens)].tolist() == prompts[row] + tokens
