"""Teacher and student with two tokenizers in a run: bundled rows, the loss of a slow loop, caches, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kd_lightning import (
    TAID,
    AdaptiveKL,
    CachedTeacher,
    ChunkLikelihood,
    Contrastive,
    ContrastiveDataModule,
    DistillationModule,
    ForwardKL,
    InstructionDataModule,
    OnPolicy,
    ReverseKL,
    SelfTeacher,
    WeightedSum,
)
from kd_lightning.cli import main
from kd_lightning.constants import TEACHER_FIELDS, TEACHER_POSITIONS
from kd_lightning.models.backbone import logits
from kd_lightning.objectives import SOURCES
from kd_lightning.teachers.batches import teacher_batch
from tiny_fits import SGD, STILL, assert_same_student, fit_data

STUDENT, TEACHER = "asset:student_byte_fallback", "asset:teacher"


def data(**kwargs: Any) -> InstructionDataModule:
    settings: dict[str, Any] = {"batch_size": 3, "max_length": 64, "shuffle": False}
    return InstructionDataModule("asset:validation", **{**settings, **kwargs})


def module(**kwargs: Any) -> DistillationModule:
    settings: dict[str, Any] = {"optimizer": SGD, "teacher_kwargs": {"dtype": "float32"}}
    return DistillationModule(STUDENT, TEACHER, **{**settings, **kwargs})


def kl_of_pairs(p: Tensor, q: Tensor, pairs: list[tuple[int, int]]) -> Tensor:
    """Forward KL on the shared tokens and one outcome more, from probabilities."""
    first, second = map(list, zip(*pairs, strict=True))
    q_shared, p_shared = q[first], p[second]
    q_all = torch.cat([q_shared, (1 - q_shared.sum()).clamp_min(1e-12).view(1)])
    p_all = torch.cat([p_shared, (1 - p_shared.sum()).clamp_min(1e-12).view(1)])
    return (p_all * (p_all.log() - q_all.log())).sum()


def test_a_step_is_that_of_a_slow_loop() -> None:
    rows = data()
    found = module(objective=ForwardKL(), optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    after = fit_data(found, rows, steps=1, seed=0)
    fresh = module()
    fresh.configure_model()
    assert fresh.teacher is not None
    student: Any = fresh.student
    before = {name: x.detach().clone() for name, x in student.named_parameters()}
    batch = next(iter(rows.train_dataloader()))
    known = rows.vocabulary_map
    assert known is not None
    pairs = list(zip(known.student_ids.tolist(), known.teacher_ids.tolist(), strict=True))
    q = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double().softmax(-1)
    own = [batch[TEACHER_FIELDS[name]] for name in ("input_ids", "attention_mask")]
    with torch.no_grad():
        teacher: Any = fresh.teacher.model
        p = teacher(input_ids=own[0], attention_mask=own[1]).logits.double().softmax(-1)
    labeled = (batch["labels"] != -100).nonzero().tolist()
    losses = []
    for b, t in labeled:
        if (s := int(batch[TEACHER_POSITIONS][b, t])) >= 0:
            losses.append(kl_of_pairs(p[b, s - 1], q[b, t - 1], pairs))
    assert 0 < len(losses) < len(labeled)
    (torch.stack(losses).sum() / len(labeled)).backward()
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(after[name], before[name] - 0.5 * parameter.grad, atol=2e-5, rtol=1e-4, msg=name)


def test_a_teacher_is_read_where_the_student_is_compared_with_it() -> None:
    rows = data()
    found = module()
    fit_data(found, rows, steps=1, seed=0)
    batch = next(iter(rows.train_dataloader()))
    view = teacher_batch(batch)
    for b, t in (batch["labels"] != -100).nonzero().tolist():
        if (s := int(batch[TEACHER_POSITIONS][b, t])) >= 0:
            assert view["labels"][b, s] == view["input_ids"][b, s]


def test_the_students_own_tokenizer_given_for_the_teacher_changes_no_bit() -> None:
    settings: dict[str, Any] = {"batch_size": 3, "max_length": 64, "shuffle": False}
    states = []
    for name in (None, "asset:teacher"):
        rows = InstructionDataModule("asset:validation", teacher_tokenizer=name, **settings)
        states.append(fit_data(DistillationModule("asset:student", TEACHER, optimizer=SGD), rows, steps=2, seed=0))
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())


@pytest.mark.parametrize(
    "objective",
    [TAID(), ChunkLikelihood(), WeightedSum([ForwardKL(), ChunkLikelihood()], [0.5, 0.5])],
    ids=["TAID", "ChunkLikelihood", "both"],
)
def test_other_objectives_train(objective: Any) -> None:
    after = fit_data(module(objective=objective), data(), steps=2, seed=0)
    fresh = module()
    fresh.configure_model()
    assert any((after[name] - x.detach()).abs().max() > 0 for name, x in fresh.student.named_parameters())
    assert all(torch.isfinite(x).all() for x in after.values())


def test_responses_of_the_student_are_compared_in_the_teachers_tokens() -> None:
    source = OnPolicy(1.0, max_new_tokens=6)
    found = module(responses=source)
    after = fit_data(found, data(), steps=2, seed=0)
    assert all(torch.isfinite(x).all() for x in after.values())
    batch = found.take_generated_batch()
    assert batch is not None
    labeled = batch["labels"] != -100
    read = batch[TEACHER_POSITIONS]
    assert (read[~labeled] == -1).all()
    assert (read[labeled] >= 0).any()
    first = labeled.int().argmax(1)
    for row, t in enumerate(first.tolist()):  # both have read nothing of the response before its first token
        own = (batch[TEACHER_FIELDS["labels"]][row] != -100).int()
        if labeled[row].any() and own.any():
            assert int(read[row, t]) == int(own.argmax())


def test_a_cache_of_the_teacher_is_the_teacher(tmp_path: Path) -> None:
    live = fit_data(module(), data(), steps=2, seed=0)
    words = ["cache", "--config", "cross_tokenizer", "--data.train", "asset:validation", "--data.val", "null"]
    words += ["--data.test", "null", "--data.max_length", "64", "--model.teacher_kwargs", '{"dtype": "float32"}']
    assert (
        main([*words, "--dtype", "float32", "--output", str(tmp_path / "cache"), "--trainer.accelerator", "cpu"]) == 0
    )
    cached = DistillationModule(STUDENT, CachedTeacher(str(tmp_path / "cache")), optimizer=SGD)
    rows = data(teacher_tokenizer=TEACHER)
    assert_same_student(fit_data(cached, rows, steps=2, seed=0), live, atol=2e-6)


def test_pairs_of_responses_are_compared_in_the_teachers_tokens(tmp_path: Path) -> None:
    answers = [("a tall building", "a small bird of the sea"), ("any of several plants", "a wide building")]
    rows = [
        {"instruction": f"say {n}", "teacher_response": one, "student_response": other}
        for n, (one, other) in enumerate(answers)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pairs = ContrastiveDataModule(str(path), batch_size=2, max_length=64, shuffle=False)
    objective = Contrastive(ForwardKL(), ReverseKL())  # with equal shares each has the factor 1
    found = module(objective=objective, optimizer=STILL)
    fit_data(found, pairs, steps=1, seed=0)
    (batch,) = pairs.train_dataloader()
    assert set(batch["source"].tolist()) == {SOURCES.index("teacher"), SOURCES.index("student")}
    known, teacher = pairs.vocabulary_map, found.teacher
    assert known is not None and teacher is not None
    with torch.no_grad():
        total = found.model(batch, teacher).mean
        q = logits(found.student, batch["input_ids"], batch["attention_mask"]).double().softmax(-1)
        p = teacher.logits(teacher_batch(batch)).double().softmax(-1)
    losses, ids = [], (known.teacher_ids, known.student_ids)
    for b, t in (batch["labels"] != -100).nonzero().tolist():
        losses.append(0.0)
        if (s := int(batch[TEACHER_POSITIONS][b, t])) >= 0:
            both = [
                torch.cat([x[of], 1 - x[of].sum().view(1)]) for x, of in ((p[b, s - 1], ids[0]), (q[b, t - 1], ids[1]))
            ]
            one, other = both if batch["source"][b] == SOURCES.index("teacher") else both[::-1]
            losses[-1] = float((one * (one.log() - other.log())).sum())
    assert losses.count(0.0) < len(losses)
    assert float(total) == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_what_cannot_be_computed_is_refused_before_the_first_step() -> None:
    with pytest.raises(ValueError, match="AdaptiveKL cannot be computed"):
        fit_data(module(objective=AdaptiveKL()), data(), steps=1, seed=0)
    own = DistillationModule(STUDENT, SelfTeacher("frozen"), optimizer=SGD)
    with pytest.raises(ValueError, match="teacher_tokenizer must not be given with a SelfTeacher"):
        fit_data(own, data(teacher_tokenizer=TEACHER), steps=1, seed=0)
