"""The step as a module: equal to whole logits, synchronized by DDP, refused where it cannot be."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForSequenceClassification, LlamaConfig

import processes
from architectures import VOCABULARY, tiny
from kd_lightning import (
    AlphaDivergence,
    DistillationLoss,
    DistillationStep,
    ForwardKL,
    ReverseKL,
    body_and_head,
    distillation_loss,
    hidden_states,
    shift_labels,
)
from tiny_fits import Batch, rows, split

FIELDS = ("input_ids", "attention_mask", "labels")


def pair(student: str = "llama") -> tuple[Any, Any]:
    torch.manual_seed(0)
    return tiny(student), tiny("qwen3", hidden_size=48)


def fields(batch: Batch) -> Batch:
    return {name: batch[name] for name in FIELDS}


@pytest.mark.parametrize("kind", ["llama", "gemma2", "modernbert-decoder"])  # the last one cannot be split
@pytest.mark.parametrize("objective", [ForwardKL(), ReverseKL(), AlphaDivergence(0.3)], ids=lambda x: type(x).__name__)
def test_it_is_the_loss_of_whole_logits(kind: str, objective: Any) -> None:
    student, teacher = pair(kind)
    other = copy.deepcopy(student)
    batch = rows(5, VOCABULARY)
    step = DistillationStep(student, teacher, DistillationLoss(objective, ce_weight=0.3, temperature=1.5))
    inputs = {name: batch[name] for name in FIELDS[:2]}
    with torch.no_grad():
        known = teacher(**inputs, use_cache=False).logits
    expected = distillation_loss(
        other(**inputs, use_cache=False).logits,
        known,
        shift_labels(batch["labels"]),
        objective=objective,
        ce_weight=0.3,
        temperature=1.5,
    )
    expected.backward()
    parts = step(**fields(batch))
    parts.divided().backward()
    torch.testing.assert_close(parts.divided(), expected, rtol=1e-5, atol=1e-6)
    for (name, x), y in zip(student.named_parameters(), other.parameters(), strict=True):
        if y.grad is not None:
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=2e-5, msg=name)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_teacher_is_in_no_state_and_the_student_keeps_its_mode() -> None:
    student, teacher = pair()
    student.train()
    step = DistillationStep(student, teacher, ForwardKL())
    assert student.training
    assert not teacher.training
    count = sum(1 for _ in student.named_parameters())
    assert sum(1 for _ in step.named_parameters()) == count
    assert step.student is student


@pytest.mark.parametrize("sizes", [(7,), (3, 4), (1, 2, 4), (5, 1, 1)])
def test_a_step_does_not_depend_on_its_batches(sizes: tuple[int, ...]) -> None:
    student, teacher = pair()
    step = DistillationStep(student, teacher, DistillationLoss(ForwardKL(), ce_weight=0.5))
    whole = rows(7, VOCABULARY)
    step(**fields(whole)).divided().backward()
    expected = [p.grad.clone() for p in student.parameters() if p.grad is not None]
    student.zero_grad()
    parts = [step(**fields(part)) for part in split(whole, *sizes)]
    total = torch.stack([part.divisor for part in parts]).sum()
    for part in parts:
        part.divided(by=total).backward()
    for x, y in zip([p.grad for p in student.parameters() if p.grad is not None], expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_without_a_teacher_it_is_supervised_fine_tuning() -> None:
    student, _ = pair()
    batch = rows(4, VOCABULARY)
    parts = DistillationStep(student, None, DistillationLoss(ForwardKL(), ce_weight=1.0))(**fields(batch))
    expected = student(**fields(batch), use_cache=False).loss
    torch.testing.assert_close(parts.divided(), expected, rtol=1e-5, atol=1e-6)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def on_rank(rank: int) -> list[Tensor]:
    student, teacher = pair()
    step = DistillationStep(student, teacher, DistillationLoss(ForwardKL(), ce_weight=0.5))
    part = split(rows(7, VOCABULARY), 5, 2)[rank]
    wrapped = DistributedDataParallel(step)
    wrapped(**fields(part)).divided(group=torch.distributed.group.WORLD).backward()
    return gradients(student)


@pytest.mark.slow
def test_two_ranks_of_ddp_with_uneven_rows_are_one_process() -> None:
    first, second = processes.run(on_rank)
    student, teacher = pair()
    step = DistillationStep(student, teacher, DistillationLoss(ForwardKL(), ce_weight=0.5))
    step(**fields(rows(7, VOCABULARY))).divided().backward()
    for x, y, z in zip(first, second, gradients(student), strict=True):
        assert torch.equal(x, y)
        torch.testing.assert_close(x, z, rtol=1e-4, atol=2e-6)


def test_fabric_wraps_it() -> None:
    student, teacher = pair()
    fabric = L.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    step = fabric.setup(DistillationStep(student, teacher, ForwardKL()))
    loss = step(**fields(rows(4, VOCABULARY))).divided()
    fabric.backward(loss)
    assert all(torch.isfinite(x).all() for x in gradients(student))
    with pytest.raises(ValueError, match="wrap a DistillationStep"):
        body_and_head(fabric.setup(pair()[0]))


def test_bad_input_is_refused() -> None:
    student, teacher = pair()
    with pytest.raises(ValueError, match="student and teacher must be two objects"):
        DistillationStep(student, student, ForwardKL())
    classifier = AutoModelForSequenceClassification.from_config(
        LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match=r"must be a causal language model, .* got LlamaForSequenceClassification"):
        DistillationStep(classifier, teacher, ForwardKL())
    with pytest.raises(ValueError, match=r"LlamaForSequenceClassification .*no output embeddings"):
        body_and_head(classifier)
    step = DistillationStep(student, teacher, ForwardKL())
    with pytest.raises(ValueError, match="labels must be given"):
        step(torch.zeros(1, 3, dtype=torch.long))


def test_hidden_states_are_those_that_the_head_reads() -> None:
    student, _ = pair()
    body, head = body_and_head(student)
    batch = rows(3, VOCABULARY)
    hidden = hidden_states(body, batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(head.logits(hidden), student(**fields(batch), use_cache=False).logits)
