"""DistiLLM-2's loss end to end: skew per response, gaps, and steps that do not depend on how a batch is split."""

from __future__ import annotations

import functools
import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

import processes
from architectures import VOCABULARY, tiny
from kd_lightning import Contrastive, Linear, ResponseGap, SkewKL, SkewReverseKL
from kd_lightning.engine.top_k import TopK, top_k
from kd_lightning.losses import DistillationLoss
from kd_lightning.objectives.objective import Complement
from slow_reference import error
from tiny_fits import Batch, Run, assert_same_student, fit, rows, split, weights

ignore_torch = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

V, T = 19, 6
SOURCE = torch.tensor([1, 2, 0, 2, 1, 2, 1, 2])  # the third is of the dataset: it belongs to the teacher's side
B = len(SOURCE)
STUDENTS = SOURCE == 2


def adaptive(**kwargs: Any) -> Contrastive:
    """Both skews follow the gaps."""
    return Contrastive(SkewKL(ResponseGap(**kwargs)), SkewReverseKL(ResponseGap(side="student", **kwargs)))


def sides(objective: Contrastive) -> tuple[ResponseGap, ResponseGap]:
    """The schedules of the teacher's and the student's responses."""
    teacher, student = (part for part in objective.modules() if isinstance(part, ResponseGap))
    return teacher, student


class Pairs:
    """Two models, each of which gives its own responses more probability; one response is empty."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        g = torch.Generator().manual_seed(4)
        randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
        self.labels = torch.randint(0, V, (B, T), generator=g)
        self.head = torch.linalg.qr(randn(V, V))[0].to(dtype).requires_grad_()
        own = torch.nn.functional.one_hot(self.labels, V) * (1 + 3 * torch.rand(B, 1, 1, generator=g))
        self.teacher = ((randn(B, T, V) + own * ~STUDENTS.view(-1, 1, 1)).to(dtype)) @ self.head.detach()
        self.student = (
            (randn(B, T, V) + own * STUDENTS.view(-1, 1, 1)).to(dtype) @ self.head.detach()
        ).requires_grad_()
        for n in range(B):
            self.labels[n, : n % 4] = -100
        self.labels[6] = -100

    def parts(self, loss: DistillationLoss, path: str = "hidden") -> Any:
        given = {"source": SOURCE}
        if path == "logits":
            student, teacher = self.student @ self.head.T, self.teacher @ self.head.detach().T
            return loss.from_logits(student, teacher, self.labels, given)
        return loss.from_hidden(self.student, self.head, self.teacher, self.head.detach(), self.labels, given)

    def log_probs(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities of teacher and student, [B, T, V]; the student's have a gradient."""
        models = self.teacher @ self.head.detach().T, self.student @ self.head.T
        return tuple(x.double().log_softmax(-1) for x in models)  # type: ignore[return-value]

    def gaps(self) -> list[float | None]:
        """exp(mean log p) − exp(mean log q) of each response; None without labels."""
        found: list[float | None] = []
        log_p, log_q = (x.detach() for x in self.log_probs())
        for n in range(B):
            places = [t for t in range(T) if self.labels[n, t] != -100]
            means = [
                sum(float(x[n, t, self.labels[n, t]]) for t in places) / max(len(places), 1) for x in (log_p, log_q)
            ]
            found.append(math.exp(means[0]) - math.exp(means[1]) if places else None)
        return found

    def mean(self, student: bool) -> float:
        found = [
            gap for gap, by in zip(self.gaps(), STUDENTS.tolist(), strict=True) if by == student and gap is not None
        ]
        return sum(found) / len(found)


def reference_loss(problem: Pairs, mean: tuple[float, float], share: float) -> tuple[Tensor, list[float]]:
    """Mean over responses of their token means, with an explicit skew per response."""
    log_p, log_q = problem.log_probs()
    p, q = log_p.exp(), log_q.exp()
    losses, skews = [], []
    for n, gap in enumerate(problem.gaps()):
        if gap is None:
            continue
        by_student = bool(STUDENTS[n])
        m, g = (-mean[1], -gap) if by_student else (mean[0], gap)
        alpha = min(max(1 - 0.9 * m / (g + 1e-5), 0.01), 0.1)
        a, b, log_a = (q, p, log_q) if by_student else (p, q, log_p)
        tokens = (a * (log_a - (alpha * a + (1 - alpha) * b).log())).sum(-1)[n]
        factor = 2 * (1 - share) if by_student else 2 * share
        losses.append(factor * tokens[problem.labels[n] != -100].mean())
        skews.append(alpha)
    return torch.stack(losses).mean(), skews


@ignore_torch
@pytest.mark.parametrize("how", ["logits", "one row", "two rows", "whole", "compiled"])
def test_loss_and_gradient_are_those_of_constant_skews(how: str) -> None:
    dtype, tolerance = (torch.float32, 1e-5) if how == "compiled" else (torch.float64, 1e-6)  # means are kept in fp32
    problem = Pairs(dtype)
    objective = adaptive()
    gaps = problem.gaps()
    mean = 1.037 * gaps[0], 1.033 * gaps[1]  # type: ignore[operator]  # between the clips: 1 < m / g < 1.1
    stats = {"gap": 0.0, "teacher_gap": mean[0], "student_gap": mean[1]}
    for schedule in sides(objective):
        schedule.update(0.0, stats)
    chunk = {"one row": 1, "two rows": 2}.get(how)
    loss = DistillationLoss(objective, reduction="sequence_mean", chunk=chunk, compile=how == "compiled")
    parts = problem.parts(loss, "logits" if how == "logits" else "hidden")
    expected, skews = reference_loss(problem, mean, 0.5)
    assert 0.011 < skews[0] < 0.099 and 0.011 < skews[1] < 0.099 and min(skews) == 0.01 and max(skews) == 0.1
    leaves = problem.student, problem.head
    mine = torch.autograd.grad(parts.mean, leaves)
    assert parts.mean.item() == pytest.approx(expected.item(), rel=tolerance)
    assert max(map(error, mine, torch.autograd.grad(expected, leaves))) < tolerance


def test_with_share_one_half_it_is_the_mean_of_both_losses_over_pairs() -> None:
    problem = Pairs()
    problem.labels[6] = torch.arange(T)
    loss = DistillationLoss(Contrastive(), reduction="sequence_mean")
    log_p, log_q = (x.detach() for x in problem.log_probs())
    on = {name: part(log_p, log_q) for name, part in (("teacher", SkewKL(0.1)), ("student", SkewReverseKL(0.1)))}
    means = [
        (on["student" if STUDENTS[n] else "teacher"][n] * (problem.labels[n] != -100)).sum()
        / (problem.labels[n] != -100).sum()
        for n in range(B)
    ]
    assert problem.parts(loss).mean.item() == pytest.approx(float(sum(means)) / 2 / (B / 2), rel=1e-12)


@pytest.mark.parametrize("path", ["logits", "hidden"])
@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean", "sum"])
def test_the_gaps_are_means_over_responses_whatever_the_reduction(reduction: str, path: str) -> None:
    problem = Pairs()
    objective = adaptive()
    for schedule in sides(objective):
        schedule.update(0.0, {"gap": 0.1})
    parts = problem.parts(DistillationLoss(objective, reduction=reduction), path)
    found = {name: float(total / number) for name, (total, number) in parts.by_response.items()}
    gaps = [gap for gap in problem.gaps() if gap is not None]
    assert found["gap"] == pytest.approx(sum(gaps) / len(gaps))
    assert found["teacher_gap"] == pytest.approx(problem.mean(False))
    assert found["student_gap"] == pytest.approx(problem.mean(True))
    assert float(parts.by_response["teacher_gap"][1]) == pytest.approx(3)
    assert float(parts.by_response["student_gap"][1]) == pytest.approx(4)
    _, skews = reference_loss(problem, (sides(objective)[0].mean_gap.item(), -sides(objective)[1].mean_gap.item()), 0.5)
    there = [bool(by) for by, gap in zip(STUDENTS, problem.gaps(), strict=True) if gap is not None]
    for name, student in (("teacher", False), ("student", True)):
        of_side = [skew for skew, by in zip(skews, there, strict=True) if by == student]
        path_of = next(key for key in found if key.startswith(f"schedule/{name}_responses") and key.endswith("weight"))
        mean = sum(of_side) / len(of_side)
        assert found[path_of] == pytest.approx(1 - mean if student else mean, rel=1e-6)  # SRKL's weight is 1 − α


def test_a_teacher_of_few_outcomes_has_the_same_gaps() -> None:
    problem = Pairs()
    teacher = problem.teacher @ problem.head.detach().T
    flat = top_k(teacher.flatten(0, 1), problem.labels.clamp_min(0).flatten(), 5)
    known = TopK(*(x.unflatten(0, (B, T)) for x in (flat.ids, flat.log_probs, flat.log_tail)), V)
    loss = DistillationLoss(adaptive(), reduction="sequence_mean")
    student = problem.student @ problem.head.T
    parts = loss.from_logits(student, known, problem.labels, {"source": SOURCE})
    for name in ("gap", "teacher_gap", "student_gap"):
        for one, other in zip(parts.by_response[name], problem.parts(loss).by_response[name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_a_number_costs_no_second_pass() -> None:
    parts = Pairs().parts(DistillationLoss(Contrastive(), reduction="sequence_mean"))
    assert parts.by_response == {} and "gap" not in parts.values


def test_the_releases_gradual_share() -> None:
    """β = 1 + ½·min(1, 2·step/steps), (2 − β)·SKL + β·SRKL."""
    share = Linear(0.5, 0.25, until=0.5)
    for progress in (0.0, 0.2, 0.5, 0.8, 1.0):
        share.update(progress, {})
        beta = 1 + 0.5 * min(1, 2 * progress)
        assert 2 * share().item() == pytest.approx(2 - beta)
        assert 2 * (1 - share().item()) == pytest.approx(beta)


def test_a_complement_is_for_the_same_side() -> None:
    assert Complement(ResponseGap(side="student")).side == "student"
    assert Linear(0.0, 1.0).side is None


# ---------------------------------------------------------------------------------------------------------- whole steps
GENTLE = functools.partial(torch.optim.SGD, lr=0.01)


def pairs_batch(vocabulary: int) -> Batch:
    """Eight responses to four prompts."""
    batch = rows(8, vocabulary)
    return {**batch, "source": torch.tensor([1, 2] * 4)}


def made() -> Run:
    """Two models, each of which gives its own responses more probability on average."""
    torch.manual_seed(14)
    student, teacher = tiny("llama"), tiny("llama")
    return Run(student, teacher, adaptive(initial=0.5), reduction="sequence_mean", optimizer=GENTLE)


def run(sizes: tuple[int, ...], accumulate: int) -> Run:
    """Two epochs of two steps over the same responses twice."""
    batches = split(pairs_batch(VOCABULARY), *sizes)
    return fit(made(), [*batches, *batches], max_epochs=2, accumulate_grad_batches=accumulate)  # type: ignore[no-any-return]


def gaps_of(module: Run) -> list[float]:
    assert module.model is not None
    return [schedule.mean_gap.item() for schedule in sides(module.model.loss.objective)]  # type: ignore[arg-type]


@functools.cache
def whole() -> tuple[dict[str, Tensor], list[float], list[dict[str, float]]]:
    module = run((8,), 1)
    return weights(module), gaps_of(module), module.logged


def test_the_first_epoch_has_the_initial_skew_and_then_each_step_follows_the_one_before() -> None:
    _, gaps, logged = whole()
    paths = (
        "schedule/teacher_responses.assistant.teacher_weight",
        "schedule/student_responses.assistant.teacher_weight",
    )
    for step, scalars in enumerate(logged):
        skews = scalars[paths[0]], 1 - scalars[paths[1]]
        if step < 2:
            assert skews == pytest.approx((0.5, 0.5), rel=1e-5)
        else:
            assert all(0.01 < skew < 0.499 for skew in skews)
    assert all(gap > 0 for gap in gaps)
    assert logged[0]["train/student_share"] > 0.2


@pytest.mark.parametrize(("sizes", "accumulate"), [((4, 4), 2), ((2, 2, 2, 2), 4), ((1, 5, 2), 3)])
def test_a_step_is_the_same_however_its_rows_are_split(sizes: tuple[int, ...], accumulate: int) -> None:
    module = run(sizes, accumulate)
    assert gaps_of(module) == pytest.approx(whole()[1], rel=1e-4)
    assert_same_student(weights(module), whole()[0], atol=1e-5)


def on_a_rank(rank: int) -> dict[str, Any]:
    """Train as one of two ranks, with five and three responses."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", GROUP_RANK="0")
    os.environ.update(TORCHELASTIC_RUN_ID="test", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    module = made()
    a, b = split(pairs_batch(VOCABULARY), 5, 3)
    mine = [a, a] if rank == 0 else [b, b]
    fit(module, mine, max_epochs=2, devices=2, strategy="ddp")
    assert module.trainer.world_size == 2
    return {"student": weights(module), "gaps": gaps_of(module)}


@pytest.mark.slow
def test_two_ranks_are_one_process() -> None:
    for found in processes.run(on_a_rank):
        assert found["gaps"] == pytest.approx(whole()[1], rel=1e-4)
        assert_same_student(found["student"], whole()[0], atol=1e-5)
