"""Token weights: values and gradients against slow loops, the state of an optimizer step, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from kd_lightning.divergences import (
    AdaptiveKL,
    Composite,
    Divergence,
    ForwardKL,
    GeneralizedJSD,
    OnSupport,
    ReverseKL,
    ToDi,
    WeightedSum,
)
from kd_lightning.engine.top_k import TopK, check_lower_bound, top_k
from kd_lightning.functional import entropy, log_softmax
from kd_lightning.label_losses import CrossEntropy
from kd_lightning.losses import DistillationLoss, LossParts
from kd_lightning.losses.accumulation import AccumulationWindow
from kd_lightning.objectives import TAID, Contrastive, Objective, SkewKL, Weighted
from kd_lightning.schedules import Linear, ResponseGap
from kd_lightning.token_weights import (
    BINS,
    GapGate,
    StudentEntropyGate,
    TeacherEntropyGate,
    TokenWeight,
    TopShare,
    histogram,
)
from leaves import TOKEN_WEIGHTS, Slow
from slow_reference import B, Problem, T, V, error, problem, reduce, token_losses

ignore_torch = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


class One(TokenWeight):
    """The constant 1."""

    exact_with_top_k = True

    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        return torch.ones_like(log_q[..., 0])


class Given(TokenWeight):
    """An extra input per token."""

    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        assert rows is not None
        return rows["weight"]


class NotDetached(TokenWeight):
    """Depends on the student."""

    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        return entropy(log_q)


def label_log_probs(problem: Problem, t: float = 1.0) -> dict[str, Tensor]:
    """The label's log-probability under both models, [B, T]."""
    found = {}
    for name, x in zip(("student_log_prob", "teacher_log_prob"), problem.logits(), strict=True):
        log_probs = torch.log_softmax(x.detach() / t, -1)
        found[name] = log_probs.gather(-1, problem.labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return found


def both_paths(loss: DistillationLoss, problem: Problem, **kwargs: Any) -> list[LossParts]:
    return [
        loss.from_hidden(*problem.hidden, **kwargs),
        loss.from_logits(*problem.logits(), problem.labels, **kwargs),
    ]


# ------------------------------------------------------------------------------------------------------------- values
@pytest.mark.parametrize(("make", "slow"), TOKEN_WEIGHTS.values(), ids=TOKEN_WEIGHTS)
def test_a_weight_equals_its_definition_and_is_never_negative(make: Any, slow: Slow) -> None:
    log_p, log_q = (log_softmax(torch.randn(6, 9, dtype=torch.float64) * 2) for _ in range(2))
    rows = {"teacher_log_prob": torch.full((6,), math.log(0.34)), "student_log_prob": torch.full((6,), math.log(0.1))}
    found = make()(log_p, log_q, rows)
    pairs = zip(log_p.exp().tolist(), log_q.exp().tolist(), strict=True)
    torch.testing.assert_close(found.double(), torch.tensor([slow(p, q) for p, q in pairs], dtype=torch.float64))
    assert (found >= 0).all()


@ignore_torch
@pytest.mark.parametrize(
    ("divergence", "normalize", "compiled"),
    [
        *(
            (x, normalize, False)
            for x in (ForwardKL(), GeneralizedJSD(0.3), TAID(), AdaptiveKL())
            for normalize in (0, 1)
        ),
        pytest.param(ReverseKL(), 0, True, marks=pytest.mark.slow),
        pytest.param(ForwardKL(), 1, True, marks=pytest.mark.slow),
    ],
)
def test_a_constant_weight_of_one_is_the_divergence_to_the_bit(
    divergence: Divergence, normalize: int, compiled: bool
) -> None:
    arguments = problem(dtype=torch.float32)
    leaves = arguments["student_hidden"], arguments["student_head"]
    found = []
    for objective in (divergence, Weighted(divergence, One(), bool(normalize))):
        parts = DistillationLoss(objective, ce_weight=0.3, chunk=4, compile=compiled).from_hidden(**arguments)
        found.append((parts.loss, parts.values["kd"], *torch.autograd.grad(parts.loss, leaves)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_gap_gate_reads_what_the_loss_computes_on_both_paths(temperature: float) -> None:
    problem = Problem()
    columns = label_log_probs(problem, temperature)
    gate = torch.sigmoid(1.5 * (columns["teacher_log_prob"] - columns["student_log_prob"]))
    tokens = token_losses(*problem.logits(), problem.labels, ReverseKL(), temperature=temperature)
    counted = [gate[b][problem.labels[b] != -100] for b in range(B)]
    expected = reduce(
        [[w * x for w, x in zip(*both, strict=True)] for both in zip(counted, tokens, strict=True)], "sum"
    )
    loss = DistillationLoss(Weighted(ReverseKL(), GapGate(1.5)), temperature=temperature, reduction="sum", chunk=2)
    gradients = problem.gradients(expected)
    for parts in both_paths(loss, problem):
        torch.testing.assert_close(parts.loss, expected)
        assert max(map(error, problem.gradients(parts.loss), gradients)) < 1e-12
        weights, kept, count = parts.token_weights[""].tolist()
        assert weights == pytest.approx(float(torch.cat(counted).sum()), rel=1e-5)
        assert kept == count == sum(map(len, tokens))
        assert set(parts.values) == {"loss", "kd", "ce"}


@pytest.mark.parametrize("make", [lambda: TeacherEntropyGate(1.9), lambda: StudentEntropyGate(1.9, above=False)])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_equal_the_whole_and_the_slow_loop(make: Any, chunk: int) -> None:
    problem = Problem()
    objective = WeightedSum([Weighted(ForwardKL(), make()), OnSupport(ReverseKL(), 5)], [1.0, 0.5])
    tokens = token_losses(*problem.logits(), problem.labels, objective, ce_weight=0.2)
    for reduction in ("token_mean", "sequence_mean"):
        expected = reduce(tokens, reduction)
        gradients = torch.autograd.grad(expected, problem.leaves, retain_graph=True)
        loss = DistillationLoss(objective, ce_weight=0.2, chunk=chunk, reduction=reduction)
        for parts in both_paths(loss, problem):
            torch.testing.assert_close(parts.mean, expected)
            assert max(map(error, problem.gradients(parts.mean), gradients)) < 1e-12
    assert 0 < parts.token_weights["parts.0"][1] < parts.token_weights["parts.0"][2]


def test_no_gradient_flows_through_a_weight() -> None:
    problem = Problem()
    weights = torch.log_softmax(problem.logits()[0].detach(), -1)
    rows = {"weight": entropy(weights)}
    found = []
    for weight in (NotDetached(), Given()):
        parts = DistillationLoss(Weighted(ForwardKL(), weight)).from_hidden(*problem.hidden, rows)
        found.append((parts.loss, *problem.gradients(parts.loss)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@ignore_torch
@pytest.mark.slow
def test_compiled_equals_eager_with_its_weights() -> None:
    arguments = problem(dtype=torch.float32)
    leaves = arguments["student_hidden"], arguments["student_head"]
    objective = WeightedSum(
        [Weighted(SkewKL(ResponseGap()), TopShare(GapGate(), 0.5)), Weighted(ToDi(), TeacherEntropyGate(2.0))], [1, 1]
    )
    found = []
    for compiled in (False, True):
        parts = DistillationLoss(objective, compile=compiled, chunk=8).from_hidden(**arguments)
        found.append((*torch.autograd.grad(parts.loss, leaves), *parts.token_weights.values()))
    assert max(map(error, *found)) < 1e-5


def test_a_schedule_reads_the_mean_of_a_response_and_a_gate_the_token() -> None:
    problem = Problem()
    gap = ResponseGap()
    gap.update(0.5, {"gap": torch.tensor(0.03)})
    parts = DistillationLoss(Weighted(SkewKL(gap), GapGate())).from_hidden(*problem.hidden)
    columns, counted = label_log_probs(problem), problem.labels != -100
    means = {
        name: ((x * counted).sum(1) / counted.sum(1).clamp_min(1)).unsqueeze(1).expand(B, T)
        for name, x in columns.items()
    }
    log_q, log_p = (torch.log_softmax(x.detach(), -1) for x in problem.logits())
    gate = torch.sigmoid(columns["teacher_log_prob"] - columns["student_log_prob"])
    expected = (gate * SkewKL(gap)(log_p, log_q, means))[counted]
    torch.testing.assert_close(parts.values["kd"], expected)
    torch.testing.assert_close(
        parts.values["gap"], (means["teacher_log_prob"].exp() - means["student_log_prob"].exp())[counted]
    )


def test_columns_that_are_given_are_used_as_they_are() -> None:
    problem = Problem()
    rows = {name: torch.rand(B, T, dtype=torch.float64) for name in ("teacher_log_prob", "student_log_prob")}
    parts = DistillationLoss(Weighted(ForwardKL(), GapGate())).from_hidden(*problem.hidden, rows)
    log_q, log_p = (torch.log_softmax(x.detach(), -1) for x in problem.logits())
    gate = torch.sigmoid(rows["teacher_log_prob"] - rows["student_log_prob"])
    torch.testing.assert_close(parts.values["kd"], (gate * ForwardKL()(log_p, log_q))[problem.labels != -100])


class Reader(Composite):
    """Declares that it reads the label's log-probability."""

    columns = ("teacher_log_prob",)

    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        assert rows is not None and "student_log_prob" not in rows
        return -rows["teacher_log_prob"] * ForwardKL()(log_p, log_q)


def test_a_custom_divergence_may_declare_what_it_reads_also_as_a_monitor() -> None:
    problem = Problem()
    counted = problem.labels != -100
    loss = DistillationLoss(Reader(), temperature=2.0, monitors={"mine": Reader()})
    for name, t, factor in (("kd", 2.0, 4.0), ("mine", 1.0, 1.0)):
        log_q, log_p = (torch.log_softmax(x.detach() / t, -1) for x in problem.logits())
        nll = -label_log_probs(problem, t)["teacher_log_prob"]
        for parts in both_paths(loss, problem):
            torch.testing.assert_close(parts.values[name], factor * (nll * ForwardKL()(log_p, log_q))[counted])


# ---------------------------------------------------------------------------------------------------------- one leaf
def test_todi_is_the_symmetric_sum_in_value_and_not_in_gradient() -> None:
    log_p, log_q = (log_softmax(torch.randn(5, 13, dtype=torch.float64) * 2) for _ in range(2))
    log_q.requires_grad_()
    torch.testing.assert_close(ToDi()(log_p, log_q), ForwardKL()(log_p, log_q) + ReverseKL()(log_p, log_q))
    (found,) = torch.autograd.grad(ToDi()(log_p, log_q).sum(), log_q)
    slow = torch.zeros_like(log_q)
    for row in range(5):
        for v in range(13):
            p, q = float(log_p[row, v].exp()), float(log_q[row, v].detach().exp())
            w = p / (p + q)
            slow[row, v] = -w * p + (1 - w) * q * (math.log(q / p) + 1)
    torch.testing.assert_close(found, slow)
    symmetric = ForwardKL()(log_p, log_q).sum() + ReverseKL()(log_p, log_q).sum()
    assert (torch.autograd.grad(symmetric, log_q)[0] - found).abs().max() > 1e-2


def test_on_support_ignores_the_rest_and_is_the_divergence_on_everything() -> None:
    log_p, log_q = (log_softmax(torch.randn(4, 9, dtype=torch.float64) * 2) for _ in range(2))
    assert torch.equal(OnSupport(ReverseKL(), 9)(log_p, log_q), ReverseKL()(log_p, log_q))
    top = log_p.topk(3).indices
    moved = log_softmax(log_q.scatter_add(-1, top, torch.full((4, 3), 2.0, dtype=torch.float64)))
    one, other = (OnSupport(ForwardKL(), 3)(log_p, x) for x in (log_q, moved))
    torch.testing.assert_close(one, other)  # more mass on the support in the same proportions
    assert OnSupport(ForwardKL(), 1)(log_p, log_q).abs().max() < 1e-12
    log_q.requires_grad_()
    (gradient,) = torch.autograd.grad(OnSupport(ReverseKL(), 3)(log_p, log_q).sum(), log_q)
    assert (gradient != 0).sum() == 12 and not gradient.scatter(-1, top, 0.0).any()


# -------------------------------------------------------------------------------------------------- an optimizer step
def test_histograms_can_be_added_and_their_bins_are_narrow() -> None:
    scores = torch.rand(5000) * 3
    whole = histogram(scores)
    assert torch.equal(whole, histogram(scores[:1234]) + histogram(scores[1234:]))
    assert whole.shape == (BINS,) and float(whole.sum()) == 5000
    extremes = torch.tensor([0.0, 1e-30, 2.0**-20, 4096.0, 1e9, math.inf, math.nan])
    found = histogram(extremes)
    assert found[0] == 2 and found[1] == 1 and found[-1] == 3


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_threshold_is_the_quantile_of_the_previous_step(share: float) -> None:
    objective = Weighted(ForwardKL(), TopShare(Given(), share))
    weight = torch.rand(8, 512) ** 3
    log_p, log_q = (log_softmax(torch.randn(8, 512, 5)) for _ in range(2))
    rows = {"weight": weight}
    full = weight * ForwardKL()(log_p, log_q)
    assert torch.equal(objective(log_p, log_q, rows), full)  # the first step keeps all
    objective.update(objective.weight_sums(weight.flatten()))
    exact = float(weight.flatten().sort(descending=True).values[math.ceil(share * 4096) - 1])
    threshold = float(objective.weight.threshold)
    assert exact / 1.001 <= threshold <= exact
    kept = objective(log_p, log_q, rows) != 0
    assert share <= float(kept.float().mean()) <= share + 0.01
    assert torch.equal(objective(log_p, log_q, rows), torch.where(weight >= threshold, full, 0.0))


def test_ties_are_kept_together_and_a_share_of_one_is_the_weight() -> None:
    gate = TopShare(Given(), 0.25)
    gate.update(histogram(torch.tensor([0.7] * 60 + [0.0] * 40)))
    assert torch.equal(gate.from_score(torch.tensor([0.7, 0.0, 0.69])), torch.tensor([0.7, 0.0, 0.0]))
    gate.update(torch.zeros(BINS))  # a step without tokens
    assert 0.69 < float(gate.threshold) <= 0.7
    gate.update(histogram(torch.full((10,), 5.0)))
    assert torch.equal(gate.from_score(torch.tensor([5.0, 1.0])), torch.tensor([5.0, 0.0]))
    every = TopShare(Given(), 1.0)
    scores = torch.rand(100)
    every.update(histogram(scores))
    assert torch.equal(every.from_score(scores), scores)


def test_a_share_may_be_a_schedule() -> None:
    share = Linear(1.0, 0.25)
    gate = TopShare(Given(), share)
    scores = torch.arange(1, 101) / 100
    for progress, kept in ((0.0, 100), (1.0, 25)):
        share.update(progress, {})
        gate.update(histogram(scores))
        assert int((gate.from_score(scores) > 0).sum()) == kept


def test_normalized_weights_have_mean_one_in_the_next_step() -> None:
    objective = Weighted(ForwardKL(), Given(), normalize=True)
    log_p, log_q = (log_softmax(torch.randn(64, 5)) for _ in range(2))
    weight = torch.rand(64)
    full = weight * ForwardKL()(log_p, log_q)
    assert torch.equal(objective(log_p, log_q, {"weight": weight}), full)
    objective.update(objective.weight_sums(weight))
    torch.testing.assert_close(objective(log_p, log_q, {"weight": weight}), full / weight.mean())
    for useless in (torch.zeros(64), torch.full((64,), math.nan)):
        objective.update(objective.weight_sums(useless))
    torch.testing.assert_close(objective(log_p, log_q, {"weight": weight}), full / weight.mean())


def test_sums_of_a_window_do_not_depend_on_its_split() -> None:
    problem = Problem(torch.float32)
    loss = DistillationLoss(Weighted(ForwardKL(), TopShare(GapGate(), 0.5), normalize=True))
    found = []
    for split in ([slice(0, 3)], [slice(0, 1), slice(1, 3)], [slice(2, 3), slice(0, 2)]):
        window = AccumulationWindow("token_mean")
        for rows in split:
            arguments = [x[rows] if isinstance(x, Tensor) else x for x in problem.hidden]
            parts = loss.from_hidden(*arguments)
            window.add(parts, {"labels": torch.cat([problem.labels[rows, :1], problem.labels[rows]], 1)})
        _, means = window.close(lambda x: x)
        found.append(means)
        assert means["token_weight"] == pytest.approx(float(means["weight_sums/"][0]) / 5)
        assert means["tokens_kept"] == 1 and len(means["weight_sums/"]) == 3 + BINS
    for other in found[1:]:
        torch.testing.assert_close(other["weight_sums/"], found[0]["weight_sums/"])


def test_each_of_several_has_its_own_sums_and_a_side_counts_its_own_responses() -> None:
    problem = Problem()
    gate = TopShare(GapGate(), 0.5)
    objective = Contrastive(Weighted(ForwardKL(), gate), Objective(Weighted(ReverseKL(), One())))
    assert set(objective.weighted()) == {"teacher_responses", "student_responses.divergence"}
    parts = DistillationLoss(objective).from_hidden(*problem.hidden, {"source": torch.tensor([0, 2, 2])})
    counted = (problem.labels != -100).sum(1)
    assert parts.token_weights["teacher_responses"][2] == counted[0]
    assert parts.token_weights["student_responses.divergence"].tolist() == [counted[1] + counted[2]] * 3
    nested = Weighted(Weighted(ForwardKL(), One()), gate)
    assert set(nested.weighted()) == {"", "divergence"} and nested.moves and not nested.weighted()["divergence"].moves


def test_components_are_measured_without_weights() -> None:
    assert list(Weighted(ForwardKL(), One()).components()) == ["forward_kl"]
    assert set(OnSupport(ToDi(), 3).components()) == {"forward_kl", "reverse_kl"}
    assert isinstance(OnSupport(ToDi(), 3).components()["forward_kl"], OnSupport)


# ------------------------------------------------------------------------------------------------------ top-k teacher
@pytest.mark.parametrize("weight", [GapGate(2.0), StudentEntropyGate(3.5), TopShare(GapGate(), 0.4)], ids=repr)
def test_weights_that_are_exact_from_the_top_k(weight: TokenWeight) -> None:
    student, teacher = torch.randn(2, 6, V, dtype=torch.float64), 2 * torch.randn(2, 6, V, dtype=torch.float64)
    labels = torch.randint(0, V, (2, 6))
    found = top_k(teacher.view(-1, V), labels.view(-1), 4)
    known = TopK(found.ids.view(2, 6, 4), found.log_probs.view(2, 6, 4), found.log_tail.view(2, 6), V)
    objective = Weighted(ForwardKL(), weight)
    check_lower_bound(objective)
    full, short = (DistillationLoss(objective).from_logits(student, x, labels) for x in (teacher, known))
    torch.testing.assert_close(short.token_weights[""][:3], full.token_weights[""][:3], atol=1e-4, rtol=1e-5)
    assert (short.values["kd"] <= full.values["kd"] + 1e-6).all()


@pytest.mark.parametrize(
    ("part", "name"),
    [
        (Weighted(ForwardKL(), TeacherEntropyGate(1.0)), r"Weighted \(its weight is TeacherEntropyGate\)"),
        (Weighted(ForwardKL(), TopShare(TeacherEntropyGate(1.0), 0.5)), r"Weighted \(its weight is TopShare\)"),
        (Weighted(AdaptiveKL(), GapGate()), "AdaptiveKL"),
        (OnSupport(ReverseKL(), 4), r"OnSupport\(ReverseKL, k=4\)"),
        (WeightedSum([ForwardKL(), Weighted(ForwardKL(), Given())], [1, 1]), r"Weighted \(its weight is Given\)"),
    ],
)
def test_what_needs_the_full_distribution_is_refused_with_a_top_k_teacher(part: Divergence, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} cannot be computed from a teacher's top-k log-prob") as refused:
        check_lower_bound(part)
    assert "\n" not in str(refused.value)


# -------------------------------------------------------------------------------------------------------- bad input
class Scalar(TokenWeight):
    """Forgets the tokens."""

    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        return entropy(log_q).mean()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TeacherEntropyGate(-0.1), "threshold must be a finite number ≥ 0 or a schedule, got -0.1"),
        (lambda: StudentEntropyGate("1"), "threshold must be a finite number ≥ 0 or a schedule, got '1'"),  # type: ignore[arg-type]
        (lambda: TeacherEntropyGate(1.0, above=1), "above must be True or False, got 1"),  # type: ignore[arg-type]
        (lambda: GapGate(math.inf), "beta must be a finite number, got inf"),
        (lambda: TopShare(ForwardKL(), 0.5), r"weight must be a TokenWeight, got ForwardKL\(\)"),  # type: ignore[arg-type]
        (lambda: TopShare(GapGate(), 0.0), r"share must be a number in \(0, 1\] or a schedule, got 0.0"),
        (lambda: TopShare(TopShare(GapGate(), 0.5), 0.5), "weight must not be a TopShare itself"),
        (lambda: TopShare(GapGate(), ResponseGap()), "share must be a number or a schedule with one value"),
        (lambda: Weighted(GapGate(), GapGate()), r"divergence must be a Divergence, got GapGate"),  # type: ignore[arg-type]
        (lambda: Weighted(ForwardKL(), 0.5), "weight must be a TokenWeight, got 0.5"),  # type: ignore[arg-type]
        (lambda: Weighted(ForwardKL(), GapGate), "weight must be a TokenWeight, got the class GapGate"),  # type: ignore[arg-type]
        (lambda: Weighted(ForwardKL(), GapGate(), 1), "normalize must be True or False, got 1"),  # type: ignore[arg-type]
        (lambda: OnSupport(ForwardKL(), 0), "k must be a number of tokens ≥ 1, got 0"),
        (lambda: OnSupport(ForwardKL(), 2.0), "k must be a number of tokens ≥ 1, got 2.0"),  # type: ignore[arg-type]
        (lambda: OnSupport(CrossEntropy(), 2), "divergence must be a Divergence, got CrossEntropy"),  # type: ignore[arg-type]
        (
            lambda: Weighted(ForwardKL(), Scalar())(torch.zeros(2, 3), torch.zeros(2, 3)),
            r"Scalar must return one value per token, shape \[2\], got \[\]",
        ),
        (
            lambda: Weighted(ForwardKL(), GapGate())(torch.zeros(2, 3), torch.zeros(2, 3), {}),
            "missing column 'teacher_log_prob' in rows, which GapGate reads",
        ),
    ],
)
def test_bad_arguments_are_refused_in_one_line(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
