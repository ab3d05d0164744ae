"""A run is its formula: one step per window, however its rows are split; the student learns and no one else."""

from __future__ import annotations

import copy
import functools
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import processes
from architectures import VOCABULARY, tiny
from kd_lightning import TAID, DistillationModule, ReverseKL
from kd_lightning.models.loading import load_causal_lm
from tiny_fits import SGD, STILL, Batch, Run, assert_same_student, bundled, fit, of_rank, rows, split, weights

REDUCTIONS = ("token_mean", "sequence_mean")


@functools.cache
def start() -> dict[str, Tensor]:
    """The bundled student before training."""
    return {name: p.detach() for name, p in load_causal_lm("asset:student").named_parameters()}


@functools.cache
def trained(reduction: str, sizes: tuple[int, ...], accumulate: int = 1) -> dict[str, Tensor]:
    return weights(fit(bundled(reduction=reduction), split(rows(), *sizes), accumulate_grad_batches=accumulate))


def change(one: dict[str, Tensor]) -> Tensor:
    return torch.cat([(one[name] - before).flatten() for name, before in start().items()])


# -------------------------------------------------------------------------------------------------------- accumulation
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("sizes", "accumulate"), [((4, 4, 4), 3), ((2,) * 6, 6), ((1, 7, 3, 1), 4)])
def test_a_step_is_the_same_however_its_rows_are_split(reduction: str, sizes: tuple[int, ...], accumulate: int) -> None:
    whole = trained(reduction, (12,))
    assert change(whole).norm() > 0.1
    assert_same_student(trained(reduction, sizes, accumulate), whole)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_last_window_that_is_shorter(reduction: str) -> None:
    assert_same_student(trained(reduction, (4, 4, 4), 2), trained(reduction, (8, 4)))


def test_a_sum_is_not_divided() -> None:
    tokens = int((rows()["labels"] != -100).sum())
    module = bundled(reduction="sum", optimizer=functools.partial(torch.optim.SGD, lr=1 / tokens))
    fit(module, split(rows(), *(2,) * 6), accumulate_grad_batches=6)
    assert_same_student(weights(module), trained("token_mean", (12,)))


def test_clipping_acts_on_the_divided_gradient() -> None:
    free = change(trained("token_mean", (12,)))
    norm = float(free.norm())
    for bound in (0.5 * norm, 1.1 * norm):
        module = fit(bundled(), split(rows(), 4, 4, 4), accumulate_grad_batches=3, gradient_clip_val=bound)
        found = change(weights(module))
        assert float(found.norm()) == pytest.approx(min(bound, norm), rel=1e-4)
        torch.testing.assert_close(found, free * min(1, bound / norm), atol=2e-5, rtol=0)


def on_a_rank(rank: int) -> dict[str, Any]:
    """Train as one of two; student, losses and number of steps for each reduction."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", GROUP_RANK="0")
    os.environ.update(TORCHELASTIC_RUN_ID="test", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    found = {}
    for reduction in REDUCTIONS:
        module = bundled(reduction=reduction)
        fit(module, of_rank(rows(), rank), accumulate_grad_batches=2, devices=2, strategy="ddp")
        assert module.trainer.world_size == 2
        found[reduction] = {"student": weights(module), "logged": [module.logged[1], module.logged[3]]}
    return found


@pytest.mark.slow
def test_two_ranks_are_one_process() -> None:
    ranks = processes.run(on_a_rank)
    for reduction in REDUCTIONS:
        module = fit(bundled(reduction=reduction), split(rows(), 8, 4))
        for found in ranks:
            assert_same_student(found[reduction]["student"], weights(module))
            for step, logged in enumerate(module.logged):
                for name in ("train/loss", "train/kd", "train/ce"):
                    assert found[reduction]["logged"][step][name] == pytest.approx(logged[name], rel=1e-5)


# ----------------------------------------------------------------------------------------------------------- schedules
def test_a_schedule_moves_once_per_optimizer_step() -> None:
    student, teacher = tiny("llama"), tiny("llama")
    batches = split(rows(vocabulary=VOCABULARY), *(2,) * 6)
    schedule = (objective := TAID()).assistant.teacher_weight
    seen: list[float] = []
    update = schedule.update
    schedule.update = lambda progress, stats: (seen.append(progress), update(progress, stats))  # type: ignore[assignment]
    module = Run(student, teacher, objective, optimizer=STILL)
    fit(module, batches, batches[:2], max_epochs=2, accumulate_grad_batches=3, val_check_interval=3)
    assert seen == pytest.approx([0.25, 0.5, 0.75, 1.0])

    t, trend, previous = 0.4, 0.0, None
    for step in range(4):  # the student stands still: the window's kd follows from t alone
        log_p, log_q, _ = counted(teacher, student, batches[:3] if step % 2 == 0 else batches[3:])
        log_r = (t * log_p + (1 - t) * log_q).log_softmax(-1)
        kd = float((log_r.exp() * (log_r - log_q)).sum(-1).mean())
        assert module.logged[3 * step + 2]["train/kd"] == pytest.approx(kd, rel=1e-4)
        if previous is not None:
            trend = 0.99 * trend + 0.01 * (previous - kd) / previous
            risen = t + 5e-4 * (1 - t) / (1 + float(torch.tensor(-trend).exp()))
            t = min(1.0, max(0.4 + 0.6 * (step + 1) / 4, risen))
        previous = kd
        assert module.logged[3 * step + 2]["schedule/assistant.teacher_weight"] == pytest.approx(t, rel=1e-6)


# -------------------------------------------------------------------------------------------------------------- models
def counted(teacher: nn.Module, student: nn.Module, batches: list[Batch]) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of both models and the label at every counted token, float64."""
    found = []
    with torch.no_grad():
        for batch in batches:
            labels = batch["labels"][:, 1:]
            inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
            pair = [m(**inputs).logits[:, :-1][labels != -100].double().log_softmax(-1) for m in (teacher, student)]
            found.append((*pair, labels[labels != -100]))
    return tuple(map(torch.cat, zip(*found, strict=True)))  # type: ignore[return-value]


def measured(log_p: Tensor, log_q: Tensor, labels: Tensor) -> dict[str, float]:
    """What validation reports, by definition."""
    p, q = log_p.exp(), log_q.exp()
    log_m = ((p + q) / 2).log()
    forward = (p * (log_p - log_q)).sum(-1)
    numbers = {
        "kd": forward,
        "forward_kl": forward,
        "reverse_kl": (q * (log_q - log_p)).sum(-1),
        "jsd": (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1) / 2,
        "total_variation": (p - q).abs().sum(-1) / 2,
        "ce": -log_q.gather(-1, labels[:, None]),
        "teacher_nll": -log_p.gather(-1, labels[:, None]),
        "agreement": (p.argmax(-1) == q.argmax(-1)).double(),
    }
    return {f"val/{name}": float(value.mean()) for name, value in numbers.items()}


def test_without_a_teacher_it_is_cross_entropy() -> None:
    module = fit(bundled(teacher=None, ce_weight=1.0), [rows()], split(rows(), 5, 7))
    student = load_causal_lm("asset:student")
    batch = {name: column for name, column in rows().items() if name != "row_ids"}
    loss = student(**batch).loss
    loss.backward()
    SGD(student.parameters()).step()
    assert_same_student(weights(module), {name: p.detach() for name, p in student.named_parameters()}, atol=1e-5)
    assert module.logged[0]["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert module.logged[0]["train/ce"] == module.logged[0]["train/loss"]
    found = {name: float(value) for name, value in module.trainer.callback_metrics.items() if "val/" in name}
    assert found == {"val/ce": pytest.approx(student(**batch).loss.item(), rel=1e-5)}


def test_modes_and_the_teachers_place() -> None:
    student, teacher = tiny("gpt2"), tiny("gpt2").train()
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    module = Run(student, teacher, optimizer=STILL)
    module.configure_model()
    modes: dict[str, list[bool]] = {"student": [], "teacher": []}
    for name, model in (("student", student), ("teacher", teacher)):
        model.transformer.register_forward_pre_hook(lambda body, _, name=name: modes[name].append(body.training))
    batch = rows(vocabulary=VOCABULARY)
    fit(module, [batch, batch], [batch, batch], val_check_interval=1)
    module.train().evaluate_batch(batch)
    assert modes == {"student": [True, False, False] * 2 + [False], "teacher": [False] * 7} and student.training
    first, second = (logged["train/loss"] for logged in module.logged)
    assert abs(first - second) > 1e-4 * first  # another dropout on the same rows and weights
    for name, value in measured(*counted(teacher, student.eval(), [batch])).items():
        assert float(module.trainer.callback_metrics[name]) == pytest.approx(value, rel=1e-4), name

    own = {id(p) for p in module.parameters()}
    assert own == {id(p) for p in student.parameters()}
    kept = {name for name, tensor in module.state_dict().items() if tensor.ndim > 0}
    assert kept == {f"model.student.{name}" for name in student.state_dict()}
    for name, parameter in teacher.named_parameters():
        assert parameter.grad is None and torch.equal(parameter, before[name])


def test_loaded_models() -> None:
    student, teacher = tiny("llama"), tiny("gpt2")
    before = student.lm_head.weight.detach().clone()
    module = fit(DistillationModule(student, teacher), [rows(vocabulary=VOCABULARY)])
    assert module.student is student and not torch.equal(student.lm_head.weight, before)


def test_a_model_that_cannot_be_cut_goes_through_whole_logits() -> None:
    plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    student, teacher = tiny("bert", **plain), tiny("llama")
    twin = copy.deepcopy(student)
    batch = rows(vocabulary=VOCABULARY)
    batches = split(batch, 5, 7)
    module = fit(Run(student, teacher, ReverseKL(), optimizer=SGD), [batch], batches)

    labels = batch["labels"][:, 1:]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    log_p, log_q = (model(**inputs).logits[:, :-1][labels != -100].log_softmax(-1) for model in (teacher, twin))
    (log_q.exp() * (log_q - log_p.detach())).sum(-1).mean().backward()
    SGD(twin.parameters()).step()
    assert_same_student(weights(module), {name: p.detach() for name, p in twin.named_parameters()})

    expected = measured(*counted(teacher, student.eval(), batches))
    expected["val/kd"] = expected["val/reverse_kl"]
    for name, value in expected.items():
        assert float(module.trainer.callback_metrics[name]) == pytest.approx(value, rel=1e-4), name


def test_bf16_stays_close() -> None:
    exact, mixed = (fit(bundled(), split(rows(), 6, 6), precision=p) for p in ("32-true", "bf16-mixed"))
    assert all(p.dtype == torch.float32 for p in mixed.student.parameters())
    for one, other in zip(mixed.logged, exact.logged, strict=True):
        assert one["train/loss"] != other["train/loss"]
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=0.02)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"reduction must be .* in training, got 'none'"):
        DistillationModule("asset:student", "asset:teacher", reduction="none")
    with pytest.raises(ValueError, match=r"ce_weight must be 1 where there is no teacher, got 0\.0"):
        DistillationModule("asset:student")
