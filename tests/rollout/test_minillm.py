"""MiniLLM's rollouts against the authors' code, a slow loop, and finite sums; what a period of steps trains on."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from architectures import tiny
from kd_lightning import ClippedPolicyGradient, DistillationLoss, ReverseKL
from kd_lightning.rollout.base import RolloutContext
from kd_lightning.rollout.minillm import MiniLLM
from kd_lightning.teachers.hf import HFTeacher
from kd_lightning.training.student import StudentWithLoss
from minillm_golden import RECORDS, counted, tensors
from rollouts import Script, author, batch


def label(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    return (logits.double() / temperature).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def official(hyper: dict[str, Any]) -> MiniLLM:
    """The settings of the authors' code."""
    return MiniLLM(
        teacher_share=hyper["teacher_mixed_alpha"] or 0.0,
        discount=hyper["gamma"],
        include_current=True,
        whiten="padded",
        reward_scale=hyper["reward_scaling"] or 1.0,
        reward_clip=hyper["cliprange_reward"],
        temperature=hyper["temperature"],
    )


@pytest.mark.parametrize("record", RECORDS, ids=[record["id"] for record in RECORDS])
def test_from_rollout_to_gradient(record: dict[str, Any]) -> None:
    x, hyper = tensors(record), record["hyper"]
    source, mask = official(hyper), counted(x, hyper)
    place, t = slice(hyper["query_len"] - 1, -1), hyper["temperature"]
    log_q = label(x["rollout_student_logits"][:, place], x["response_ids"], t)
    log_p = label(x["teacher_logits"][:, place], x["response_ids"], t)
    plain = label(x["teacher_logits"][:, place], x["response_ids"], 1.0)  # the authors' reward knows no temperature
    rewards = source.rewards(log_q, plain) * mask
    torch.testing.assert_close(rewards[mask].float(), x["rewards"][mask], rtol=1e-5, atol=2e-6)
    weights = source.importance(log_q, log_p, float(source.teacher_share))  # type: ignore[arg-type]
    torch.testing.assert_close(weights[mask].float(), x["w"][mask], rtol=1e-5, atol=1e-6)
    advantage = source.advantages(rewards, mask)
    torch.testing.assert_close(advantage[mask].float(), x["advantages"][mask], rtol=1e-4, atol=1e-5)
    returns = MiniLLM(discount=hyper["gamma"], include_current=True).advantages(rewards, mask)
    torch.testing.assert_close(returns[mask].float(), x["returns_unwhitened"][mask], rtol=1e-5, atol=2e-6)

    student = x["student_logits"].clone().requires_grad_()
    loss = DistillationLoss(
        ReverseKL(),
        ce_weight=0.5 if hyper["single_step_reg"] else 1.0,
        temperature=t,
        label_loss=ClippedPolicyGradient(hyper["cliprange"]),
        square_temperature=False,
    )
    columns = {"advantage": advantage, "old_log_prob": log_q, "importance": weights}
    labels = x["response_ids"].masked_fill(~mask, -100)
    mean = loss.from_logits(student[:, place], x["teacher_logits"][:, place], labels, columns).mean
    mean = 2 * mean if hyper["single_step_reg"] else mean  # the authors' sum of both
    (gradient,) = torch.autograd.grad(mean, student)
    assert mean.item() == pytest.approx(record["official_loss"], rel=5e-6)
    assert (gradient - x["grad"]).abs().max() <= 5e-6 * x["grad"].abs().max()


# ------------------------------------------------------------------------------------------------------------- returns
@pytest.mark.parametrize("length_norm", [True, False])
@pytest.mark.parametrize("include_current", [True, False])
@pytest.mark.parametrize("discount", [1.0, 0.9, 0.0])
def test_returns_are_the_slow_loop(discount: float, include_current: bool, length_norm: bool) -> None:
    rewards = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    place = torch.arange(9)
    begin, end = torch.tensor([[2], [1], [8], [3]]), torch.tensor([[9], [6], [9], [3]])  # the last: no response
    mask = (place >= begin) & (place < end)
    source = MiniLLM(discount=discount, include_current=include_current, length_norm=length_norm)
    found = source.advantages(rewards * mask, mask)
    for b in range(4):
        for t in range(9):
            tail = [s for s in range(t if include_current else t + 1, 9) if mask[b, s] and mask[b, t]]
            total = sum(discount ** (s - tail[0]) * float(rewards[b, s]) for s in tail)
            wanted = total / (len(tail) or 1) if length_norm else total
            assert float(found[b, t]) == pytest.approx(wanted, abs=1e-12)


def test_whitened() -> None:
    rewards = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(8) < torch.tensor([[8], [5], [2]])
    plain = MiniLLM().advantages(rewards * mask, mask)
    found = MiniLLM(whiten="counted").advantages(rewards * mask, mask)
    kept = plain[mask]
    torch.testing.assert_close(found[mask], (kept - kept.mean()) / (kept.var() + 1e-8).sqrt())
    padded = MiniLLM(whiten="padded").advantages(rewards * mask, mask)
    torch.testing.assert_close(padded[mask], ((plain - plain.mean()) / (plain.var() + 1e-8).sqrt())[mask])
    for whiten in ("counted", "padded"):
        nothing = MiniLLM(whiten=whiten).advantages(rewards * 0, mask & False)  # type: ignore[arg-type]
        assert nothing.isfinite().all() and not nothing.any()


def test_the_importance_weight() -> None:
    log_q, log_p = torch.rand(50).log(), torch.rand(50).log()
    q, p = log_q.exp(), log_p.exp()
    torch.testing.assert_close(MiniLLM.importance(log_q, log_p, 0.2), q / (0.2 * p + 0.8 * q))
    assert torch.equal(MiniLLM.importance(log_q, log_p, 0.0), torch.ones(50))
    floor = MiniLLM.importance(torch.tensor([-1e4, 0.0]), torch.tensor([0.0, -1e4]), 0.2)
    torch.testing.assert_close(floor, torch.tensor([0.0, 1.25]))


# ------------------------------------------------------------------------------------------------------------ rollouts
@pytest.mark.parametrize("ends", [2, None])
def test_a_rollout_and_its_columns(ends: int | None) -> None:
    student, teacher = tiny("llama"), HFTeacher(tiny("gpt2"))  # type: ignore[arg-type]
    teacher.load()
    model = StudentWithLoss(student.train(), DistillationLoss(ReverseKL()))
    given = batch(([5, 6, 7], [9, 2]), ([8], [9, 9, 2]))
    student.generation_config.eos_token_id = 2 if ends else 79
    writer = RolloutContext(model, teacher, max_length=32)
    source = MiniLLM(0.3, max_new_tokens=10, temperature=2.0)
    found = source(given, writer)
    mask = found["labels"] != -100
    log_q, log_p = writer.label_log_probs(found, 2.0)
    assert torch.equal(found["old_log_prob"], log_q)
    rewards = (log_p - log_q) * mask
    torch.testing.assert_close(found["advantage"], source.advantages(rewards, mask))
    torch.testing.assert_close(found["importance"][mask], MiniLLM.importance(log_q, log_p, 0.3)[mask])
    assert float(writer.notes["reward"][0]) == pytest.approx(float(rewards.sum()), rel=1e-5)
    parts = model(found, teacher, DistillationLoss(ReverseKL(), 0.5, 2.0, label_loss=ClippedPolicyGradient()))
    assert parts.loss.isfinite()  # at first the ratio is 1: the surrogate is −A w where w is not clipped
    w, a = found["importance"][mask], found["advantage"][mask]
    torch.testing.assert_close(parts.values["ce"], torch.maximum(-a * w, -a * w.clamp(0.8, 1.2)), rtol=1e-4, atol=1e-5)


class Rewarded(RolloutContext):
    """Rewards without models."""

    def label_log_probs(self, batch: dict[str, Tensor], temperature: float) -> tuple[Tensor, Tensor]:
        return torch.full(batch["labels"].shape, -1.0), torch.full(batch["labels"].shape, -2.0)


def test_a_period_of_steps() -> None:
    source = MiniLLM(0.0, rollout_steps=2, inner_epochs=3, max_new_tokens=2)

    def trained(step: int, micro: int, token: int, rank: int = 0, ranks: int = 1) -> list[int]:
        model = author(Script([[token, 2], [token + 1, 2]])).model
        place = {"step": step, "batch": 2 * step + micro, "micro": micro, "accumulate": 2}
        writer = Rewarded(model, rank=rank, ranks=ranks, **place)
        return source(batch(([5], [9]), ([6], [9])), writer)["labels"][:, 1].tolist()

    for start, token in ((0, 10), (6, 30)):
        fresh = [trained(start + s, m, token + 4 * s + 2 * m) for s in range(2) for m in range(2)]
        assert list(chain.from_iterable(fresh)) == list(range(token, token + 8))
        orders = []
        for epoch in (1, 2):
            parts = [trained(start + 2 * epoch + s, m, 70) for s in range(2) for m in range(2)]
            orders.append(list(chain.from_iterable(parts)))
            assert sorted(orders[-1]) == list(range(token, token + 8))  # each rollout once
        assert orders[0] != orders[1]
    halves = [trained(8, micro, 70, rank, 2) for micro in range(2) for rank in range(2)]
    assert sorted(chain.from_iterable(halves)) == list(range(30, 38))  # two ranks share an epoch's rollouts


def test_one_epoch_keeps_nothing() -> None:
    source = MiniLLM(0.0, inner_epochs=1, max_new_tokens=2)
    for step in range(3):
        writer = Rewarded(author(Script([[10 + step, 2]])).model, step=step)
        assert source(batch(([5], [9])), writer)["labels"][0, 1] == 10 + step
    assert source.memory.filled == 0


def test_nothing_to_write_about() -> None:
    source, given = MiniLLM(0.0, max_new_tokens=2), batch(([5], [9]))
    given["labels"][:] = -100
    for step in range(2):
        found = source(given, Rewarded(author(Script([[10, 2]])).model, step=step))
        assert (found["labels"] == -100).all() and found["advantage"].isfinite().all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"teacher_share": 1.0}, ["teacher_share", "1.0", "[0, 1)"]),
        ({"inner_epochs": 0}, ["inner_epochs", "0"]),
        ({"rollout_steps": 0}, ["rollout_steps", "0"]),
        ({"discount": 1.5}, ["discount", "1.5"]),
        ({"reward_scale": 0.0}, ["reward_scale", "0.0"]),
        ({"reward_clip": -1.0}, ["reward_clip", "-1.0"]),
        ({"whiten": "yes"}, ["whiten", "yes", "counted"]),
        ({"temperature": 0.0}, ["temperature", "0.0"]),
        ({"max_new_tokens": 0}, ["max_new_tokens", "0"]),
    ],
)
def test_arguments(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        MiniLLM(**settings)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_it_needs_a_teacher_that_writes() -> None:
    with pytest.raises(ValueError, match="teacher_share must be 0"):
        MiniLLM().check(Script([[1]], places=256), None, None)
    MiniLLM(0.0).check(Script([[1]], places=256), None, None)
