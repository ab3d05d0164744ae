"""Objectives: which two models are compared, what gets a gradient, and how a configuration file names them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor

from kd_lightning.assistants import AlphaMixture, ArithmeticMixture, GeometricMixture
from kd_lightning.constants import SOURCES
from kd_lightning.divergences import AlphaBeta, Divergence, ForwardKL, GeneralizedJSD, ReverseKL, WeightedSum
from kd_lightning.functional import log_softmax
from kd_lightning.objectives import TAID, AMiD, Contrastive, Objective, SkewKL, SkewReverseKL
from kd_lightning.schedules import Linear, ResponseGap, Schedule, TAIDSchedule


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    log_p, log_q = (log_softmax(torch.randn(*shape, dtype=torch.float64) * 2) for _ in range(2))
    return log_p, log_q.requires_grad_()


def value_and_gradient(objective: Any, log_p: Tensor, log_q: Tensor, *rows: Any) -> tuple[Tensor, Tensor]:
    values = objective(log_p, log_q, *rows)
    (gradient,) = torch.autograd.grad(values.sum(), log_q)
    return values.detach(), gradient - log_q.detach().exp() * gradient.sum(-1, keepdim=True)


def same(a: Any, b: Any) -> None:
    """Check equality in value and in gradient with respect to the logits."""
    log_p, log_q = pair(4, 13)
    for mine, expected in zip(value_and_gradient(a, log_p, log_q), value_and_gradient(b, log_p, log_q), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)


# --------------------------------------------------------------------------------------------------- pairs
@pytest.mark.parametrize("first", ["teacher", "student", "assistant"])
@pytest.mark.parametrize("second", ["teacher", "student", "assistant"])
def test_the_pair_says_who_is_compared(first: str, second: str) -> None:
    if first == second:
        with pytest.raises(ValueError, match="pair must be two different names"):
            Objective(ForwardKL(), pair=(first, second))
        return
    mixture = AlphaMixture(0.5, 0.3) if "assistant" in (first, second) else None
    log_p, log_q = pair(4, 13)
    models = {"teacher": log_p, "student": log_q, "assistant": AlphaMixture(0.5, 0.3)(log_p, log_q)}
    objective = Objective(GeneralizedJSD(0.2), mixture, (first, second))
    torch.testing.assert_close(objective(log_p, log_q), GeneralizedJSD(0.2)(models[first], models[second]))


def test_a_detached_assistant_is_a_constant() -> None:
    log_p, log_q = pair(4, 13)
    log_r = GeometricMixture(0.4)(log_p, log_q).detach()
    _, gradient = value_and_gradient(TAID(0.4), log_p, log_q)
    torch.testing.assert_close(gradient, log_q.detach().exp() - log_r.exp())


def test_recipes_are_points_of_one_space() -> None:
    same(SkewKL(0.2), AMiD(ForwardKL(), -1.0, 0.2, ("teacher", "assistant")))
    same(SkewReverseKL(0.2), AMiD(ForwardKL(), -1.0, 0.8, ("student", "assistant")))
    same(TAID(0.4), Objective(ForwardKL(), GeometricMixture(0.4), ("assistant", "student"), detach_assistant=True))
    both = [SkewKL(0.3), Objective(ForwardKL(), ArithmeticMixture(0.3), ("student", "assistant"))]
    same(GeneralizedJSD(0.3), WeightedSum(both, [0.3, 0.7]))  # type: ignore[arg-type]
    same(Objective(ReverseKL()), ReverseKL())


def test_recipes_reach_their_limits() -> None:
    end = Linear(0.0, 1.0)
    same(SkewKL(end), ForwardKL())
    same(SkewReverseKL(end), ReverseKL())
    end.update(1.0, {})
    same(TAID(end), ForwardKL())


def test_amids_gradient_is_that_of_proposition_3_5() -> None:
    alpha, weight, k = -0.4, 0.3, 0.7
    log_p, log_q = pair(4, 13)
    p, q = log_p.exp(), log_q.detach().exp()
    mine = value_and_gradient(AMiD(ForwardKL(), alpha, weight), log_p, log_q)[1]
    r = AlphaMixture(alpha, weight)(log_p, log_q).detach().exp()
    w = (1 - weight) * q**k / (weight * p**k + (1 - weight) * q**k)
    psi = -p / r  # f(u) = u log u and ψ = f − u f′ for KL(p‖r)
    u = r * w * (psi - (r * psi).sum(-1, keepdim=True))
    torch.testing.assert_close(mine, u - q * u.sum(-1, keepdim=True))


def test_objectives_nest() -> None:
    log_p, log_q = pair(4, 13)
    inner = Contrastive(ForwardKL(), ReverseKL())
    outer = Objective(inner, ArithmeticMixture(0.3), ("teacher", "assistant"))
    log_r = ArithmeticMixture(0.3)(log_p, log_q)
    rows = {"source": torch.tensor([0, 1, 2, 2])}
    torch.testing.assert_close(outer(log_p, log_q, rows), inner(log_p, log_r, rows))


# ------------------------------------------------------------------------------------------- contrastive
def test_each_origin_takes_its_own_objective() -> None:
    log_p, log_q = pair(3, 2, 13)
    rows = {"source": torch.tensor([SOURCES.index(name) for name in SOURCES]).unsqueeze(1).expand(3, 2)}
    for share in (0.0, 0.3, 0.5, 1.0):
        values, gradient = value_and_gradient(Contrastive(teacher_share=share), log_p, log_q, rows)
        for row, (objective, factor) in enumerate(
            ((SkewKL(0.1), 2 * share), (SkewKL(0.1), 2 * share), (SkewReverseKL(0.1), 2 * (1 - share)))
        ):
            expected = value_and_gradient(objective, log_p, log_q)
            torch.testing.assert_close(values[row], factor * expected[0][row])
            torch.testing.assert_close(gradient[row], factor * expected[1][row])


def test_the_objective_of_the_others_does_not_spoil_a_gradient() -> None:
    log_p, log_q = (log_softmax(torch.randn(6, 50) * 60) for _ in range(2))
    log_q.requires_grad_()
    rows = {"source": torch.tensor([0, 1, 2, 0, 1, 2])}
    for part in value_and_gradient(Contrastive(ForwardKL(), ReverseKL()), log_p, log_q, rows):
        assert part.isfinite().all()


def test_a_missing_column_is_named() -> None:
    log_p, log_q = pair(2, 5)
    for rows in (None, {"weight": torch.ones(2)}):
        with pytest.raises(ValueError, match="missing column 'source' in rows, which Contrastive reads"):
            Contrastive()(log_p, log_q, rows)


def test_each_side_follows_its_own_gap() -> None:
    log_p, log_q = pair(2, 13)
    teacher, student = ResponseGap(), ResponseGap(side="student")
    objective = Contrastive(SkewKL(teacher), SkewReverseKL(student))
    schedules = [part for part in objective.modules() if isinstance(part, ResponseGap)]
    assert schedules == [teacher, student]
    for schedule in schedules:
        schedule.update(0.0, {"gap": 0.0, "teacher_gap": 0.2, "student_gap": -0.2})
    rows = {
        "source": torch.tensor([1, 2]),
        "teacher_log_prob": torch.tensor([0.5, 0.1]).double().log(),
        "student_log_prob": torch.tensor([0.31, 0.29]).double().log(),
    }
    expected = [SkewKL(teacher(rows)[0].item()), SkewReverseKL(student(rows)[1].item())]
    assert 0.01 < teacher(rows)[0] < 0.1
    for row, part in enumerate(expected):
        torch.testing.assert_close(objective(log_p, log_q, rows)[row], part(log_p, log_q)[row])


# ---------------------------------------------------------------------------------------------- schedules
def test_a_schedule_inside_is_found_and_moves_the_objective() -> None:
    log_p, log_q = pair(4, 13)
    for objective in (TAID(), AMiD(ReverseKL(), 0.5, TAIDSchedule())):
        found = [part for part in objective.modules() if isinstance(part, Schedule)]
        assert len(found) == 1
        before = objective(log_p, log_q)
        for _ in range(2):
            found[0].update(0.9, {"kd": 1.0})
        assert (objective(log_p, log_q) - before).abs().min() > 0


def test_a_plain_number_leaves_nothing_in_a_checkpoint() -> None:
    for objective in (SkewKL(0.2), TAID(0.3), AMiD(AlphaBeta(0.2, 0.7), 0.5, 0.3), Contrastive()):
        assert not objective.state_dict()


# ------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SkewKL(0.0), r"alpha must be a number in \(0, 1\) or a schedule, got 0.0"),
        (lambda: SkewReverseKL(1), r"alpha must be a number in \(0, 1\) or a schedule, got 1"),
        (lambda: SkewKL(math.nan), "alpha must be .*, got nan"),
        (lambda: TAID(1.0), r"teacher_weight must be a number in \(0, 1\) or a schedule, got 1.0"),
        (lambda: Objective(ForwardKL), "divergence must be a Divergence"),  # type: ignore[arg-type]
        (lambda: Objective(ForwardKL(), ForwardKL()), "assistant must be an Assistant or None"),  # type: ignore[arg-type]
        (
            lambda: Objective(ForwardKL(), pair=("teacher", "assistant")),
            "pair must contain 'assistant' if and only if one is given, got .* and no assistant",
        ),
        (
            lambda: Objective(ForwardKL(), ArithmeticMixture(0.1)),
            "pair must contain 'assistant' if and only if one is given, got .* and the assistant ArithmeticMixture",
        ),
        (
            lambda: Objective(ForwardKL(), pair=("p", "q")),
            "pair must be two different names of teacher, student, assis",
        ),
        (
            lambda: Objective(ForwardKL(), ArithmeticMixture(0.1), ("teacher", "assistant"), detach_assistant=True),
            "detach_assistant must be False if 'student' is not in pair",
        ),
        (lambda: Contrastive(teacher_share=1.5), r"teacher_share must be a number in \[0, 1\] or a schedule, got 1.5"),
        (lambda: Contrastive(student_responses=0.1), "student_responses must be a Divergence, got 0.1"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments_are_refused_in_one_line(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------- configuration files
def configured(**objective: Any) -> Divergence:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--objective", type=Divergence)
    return parser.instantiate(parser.parse_object({"objective": objective or "TAID"})).objective  # type: ignore[no-any-return]


def test_a_short_name_is_enough() -> None:
    objective = configured()
    assert isinstance(objective, TAID)
    assert [type(part) for part in objective.modules() if isinstance(part, Schedule)] == [TAIDSchedule]


def test_a_weight_is_a_number_or_a_schedule() -> None:
    number = configured(class_path="SkewKL", init_args={"alpha": 0.3})
    assert number.assistant.teacher_weight == 0.3  # type: ignore[union-attr]
    schedule = configured(
        class_path="AMiD",
        init_args={
            "divergence": {"class_path": "AlphaBeta", "init_args": {"alpha": 0.2, "beta": 0.7}},
            "alpha": 0.5,
            "teacher_weight": {"class_path": "TAIDSchedule", "init_args": {"start": 0.2}},
            "pair": ["student", "assistant"],
        },
    )
    assert isinstance(schedule, AMiD)
    assert schedule.pair == ("student", "assistant")
    assert schedule.assistant.teacher_weight.start == 0.2  # type: ignore[union-attr]


def test_configurations_nest() -> None:
    gap = {"class_path": "SkewKL", "init_args": {"alpha": {"class_path": "ResponseGap", "init_args": {"start": 0.5}}}}
    share = {"class_path": "Linear", "init_args": {"start": 0.5, "end": 0.2}}
    parts = {"divergences": ["ForwardKL", {"class_path": "TotalVariation"}], "weights": [0.5, share]}
    objective = configured(
        class_path="Contrastive",
        init_args={
            "teacher_responses": gap,
            "student_responses": {"class_path": "WeightedSum", "init_args": parts},
            "teacher_share": share,
        },
    )
    kinds = [type(part) for part in objective.modules() if isinstance(part, Schedule)]
    assert sorted(kind.__name__ for kind in kinds) == ["Linear", "Linear", "ResponseGap"]


def test_a_misspelt_argument_is_an_error() -> None:
    with pytest.raises(ArgumentError, match="alfa"):
        configured(class_path="SkewKL", init_args={"alfa": 0.3})
