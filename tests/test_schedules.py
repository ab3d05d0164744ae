"""Schedules: values, updates, and the precision of their state."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from kd_lightning.schedules import Cosine, Linear, ResponseGap, Schedule, TAIDSchedule, value
from leaves import SCHEDULES

every = pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)

STATS: dict[str, Any] = {"kd": 1.7, "loss": 1.7, "ce": 3.0, "gap": 0.2}
ROWS = {"teacher_log_prob": torch.tensor([0.5, 0.4]).log(), "student_log_prob": torch.tensor([0.2, 0.3]).log()}


def moved(make: Any, steps: int = 7) -> Schedule:
    schedule: Schedule = make()
    for step in range(1, steps + 1):
        schedule.update(step / 10, {**STATS, "kd": torch.tensor(1.7 / step)})
    return schedule


@every
def test_state_is_fp32_whatever_the_model_is_cast_to(make: Any) -> None:
    schedule = moved(make)
    before = {name: x.clone() for name, x in schedule.state_dict().items()}
    torch.nn.ModuleList([schedule]).bfloat16().half().double().to(torch.float16)
    for name, x in schedule.state_dict().items():
        assert x.dtype == torch.float32
        assert x.ndim == 0
        torch.testing.assert_close(x, before[name], rtol=0, atol=0, equal_nan=True)


@every
def test_state_is_fp32_under_another_default(make: Any) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        schedule = make()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {x.dtype for x in schedule.state_dict().values()} == {torch.float32}


@every
def test_state_follows_the_device(make: Any) -> None:
    assert {x.device.type for x in make().to("meta").buffers()} == {"meta"}


@every
def test_a_saved_state_goes_on_as_if_nothing_had_happened(make: Any) -> None:
    one, other = moved(make), make()
    other.load_state_dict(one.state_dict())
    twin = copy.deepcopy(one)
    for schedule in (one, other, twin):
        schedule.update(0.9, {**STATS, "kd": 0.2})
    for schedule in (other, twin):
        assert schedule(ROWS).equal(one(ROWS))
        for x, y in zip(schedule.buffers(), one.buffers(), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@every
def test_update_changes_tensors_in_place_and_reading_changes_nothing(make: Any) -> None:
    schedule = moved(make, 3)
    places = {name: id(x) for name, x in schedule.named_buffers()}
    state = {name: x.clone() for name, x in schedule.named_buffers()}
    for _ in range(3):
        schedule(ROWS)
        schedule()
    for name, x in schedule.named_buffers():
        torch.testing.assert_close(x, state[name], rtol=0, atol=0, equal_nan=True)
    schedule.update(0.5, {name: torch.tensor(x, requires_grad=True) for name, x in STATS.items()})
    assert {name: id(x) for name, x in schedule.named_buffers()} == places
    assert not any(x.requires_grad for x in schedule.buffers())


@every
def test_progress_may_be_a_tensor(make: Any) -> None:
    one, other = make(), make()
    one.update(0.25, STATS)
    other.update(torch.tensor(0.25), STATS)
    torch.testing.assert_close(one(ROWS), other(ROWS))


def test_a_number_stays_a_number() -> None:
    assert value(0.1) == 0.1
    assert isinstance(value(0.1), float)
    assert value(Linear(0.3, 0.5)) == torch.tensor(0.3)


def test_linear_and_cosine_meet_at_both_ends_and_in_the_middle() -> None:
    for progress, linear, cosine in (
        (0.0, 0.2, 0.2),
        (0.25, 0.35, 0.2 + 0.6 * (1 - math.sqrt(0.5)) / 2),
        (0.5, 0.5, 0.5),
    ):
        for schedule, expected in ((Linear(0.2, 0.8), linear), (Cosine(0.2, 0.8), cosine)):
            schedule.update(progress, {})
            assert schedule().item() == pytest.approx(expected)
    for falling in (Linear(0.8, 0.2), Cosine(0.8, 0.2)):
        assert falling().item() == pytest.approx(0.8)
        falling.update(1.0, {})
        assert falling().item() == pytest.approx(0.2)


# ---------------------------------------------------------------------------------------------------------------- TAID
def test_taid_only_remembers_its_first_step() -> None:
    schedule = TAIDSchedule(start=0.3)
    schedule.update(0.5, {"kd": 2.0})
    assert schedule().item() == pytest.approx(0.3)
    schedule.update(0.5, {"kd": 2.0})
    assert schedule().item() == pytest.approx(0.65)  # the line is ahead


def test_taid_rises_even_while_the_loss_does_and_faster_while_it_falls() -> None:
    rises = []
    for losses in ((1.0, 2.0), (1.0, 1.0), (1.0, 0.1)):
        schedule = TAIDSchedule(step_size=0.5, momentum=0.0)
        for loss in losses:
            schedule.update(0.0, {"kd": loss})
        rises.append(schedule().item() - 0.4)
    assert rises == pytest.approx([0.5 * 0.6 / (1 + math.exp(-x)) for x in (-1.0, 0.0, 0.9)])


def test_taid_ends_at_its_end() -> None:
    schedule = TAIDSchedule(end=0.7, step_size=5.0)
    for _ in range(3):
        schedule.update(0.1, {"kd": 1.0})
    assert schedule().item() == pytest.approx(0.7)


def test_taid_without_adaptation_is_a_line() -> None:
    schedule, line = TAIDSchedule(adaptive=False), Linear(0.4, 1.0)
    for progress in (0.1, 0.6, 1.0):
        for part in (schedule, line):
            part.update(progress, {"kd": 1.0})
        assert schedule().equal(line())


# --------------------------------------------------------------------------------------------------------- ResponseGap
def expected_skew(gap: float, mean: float, initial: float = 0.1, minimum: float = 0.01) -> float:
    return min(max(1 - (1 - initial) * mean / (gap + 1e-5), minimum), initial)


def columns(*pairs: tuple[float, float]) -> dict[str, torch.Tensor]:
    p, q = torch.tensor(pairs, dtype=torch.float64).log().unbind(1)
    return {"teacher_log_prob": p.requires_grad_(), "student_log_prob": q.requires_grad_()}


def test_the_skew_is_small_where_the_models_are_close_and_never_above_the_initial_one() -> None:
    schedule = ResponseGap()
    schedule.update(0.0, {"gap": 0.25})
    pairs = ((0.9, 0.1), (0.5, 0.25), (0.5, 0.257), (0.3, 0.29), (0.2, 0.4))
    skew = schedule(columns(*pairs))
    assert skew.tolist() == pytest.approx([expected_skew(p - q, 0.25) for p, q in pairs], rel=1e-6)
    assert not skew.requires_grad
    assert skew.max() == 0.1
    assert skew.min() == pytest.approx(0.01)


def test_on_the_students_side_the_roles_are_swapped() -> None:
    schedule = ResponseGap(side="student")
    schedule.update(0.0, {"gap": -0.25})
    pairs = ((0.1, 0.9), (0.25, 0.495), (0.4, 0.2))
    assert schedule(columns(*pairs)).tolist() == pytest.approx([expected_skew(q - p, 0.25) for p, q in pairs], rel=1e-6)


def test_nothing_is_followed_before_its_start_nor_without_rows() -> None:
    schedule = ResponseGap(initial=0.2, start=0.5)
    schedule.update(0.4, {"gap": 0.25})
    assert schedule(columns((0.5, 0.257), (0.3, 0.1))).tolist() == pytest.approx([0.2, 0.2])
    schedule.update(0.5, {"gap": 0.25})
    assert schedule(columns((0.5, 0.257)))[0] < 0.2
    assert schedule().item() == pytest.approx(0.2)


def test_each_side_follows_the_mean_of_its_own_responses() -> None:
    stats = {"gap": -0.2, "teacher_gap": 0.1, "student_gap": -0.3}
    for side, mean in (("teacher", 0.1), ("student", 0.3)):
        schedule = ResponseGap(side=side)
        schedule.update(0.1, stats)
        assert schedule.mean_gap.item() == pytest.approx(mean)
    schedule.update(0.2, {"gap": 0.4, "teacher_gap": 0.4, "student_gap": math.nan})
    assert schedule.mean_gap.item() == pytest.approx(0.3)  # no response of the student in this step


def test_the_first_pass_over_the_data_is_left_out() -> None:
    paper, at_once = ResponseGap(), ResponseGap(start=0.0)
    for epoch, followed in ((0.5, False), (0.99, False), (1.0, True), (1.5, True)):
        for schedule in (paper, at_once):
            schedule.update(0.1, {"epoch": epoch, "gap": epoch / 10})
        assert at_once.mean_gap.item() == pytest.approx(epoch / 10)
        assert not paper.mean_gap.isnan() if followed else paper.mean_gap.isnan()


def test_a_line_may_end_before_the_run() -> None:
    for schedule, middle in ((Linear(0.5, 0.25, until=0.5), 0.375), (Cosine(0.5, 0.25, until=0.5), 0.375)):
        for progress, expected in ((0.25, middle), (0.5, 0.25), (0.9, 0.25)):
            schedule.update(progress, {})
            assert schedule().item() == pytest.approx(expected)


@pytest.mark.parametrize("missing", ["teacher_log_prob", "student_log_prob"])
def test_a_missing_column_is_named(missing: str) -> None:
    rows: Mapping[str, torch.Tensor] = {name: x for name, x in ROWS.items() if name != missing}
    with pytest.raises(ValueError, match=f"missing column '{missing}' in rows, which ResponseGap reads"):
        ResponseGap()(rows)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(-0.1, 1.0), r"start must be a number in \[0, 1\], got -0.1"),
        (lambda: Cosine(0.0, math.nan), r"end must be a number in \[0, 1\], got nan"),
        (lambda: Linear(0.0, 1.0, until=0.0), r"until must be a number in \(0, 1\], got 0.0"),
        (lambda: Linear(True, 1.0), r"start must be a number in \[0, 1\], got True"),
        (lambda: TAIDSchedule(start=1.1), r"start must be a number in \[0, 1\], got 1.1"),
        (lambda: TAIDSchedule(start=0.5, end=0.4), r"end must be a number in \[0.5, 1\], got 0.4"),
        (lambda: TAIDSchedule(step_size=-1), "step_size must be a finite number ≥ 0, got -1"),
        (lambda: TAIDSchedule(momentum=1.0), r"momentum must be a number in \[0, 1\), got 1.0"),
        (lambda: ResponseGap(initial=1.0), r"initial must be a number in \(0, 1\), got 1.0"),
        (lambda: ResponseGap(minimum=0.2), r"minimum must be a number in \(0, 0.1\], got 0.2"),
        (lambda: ResponseGap(side="both"), "side must be 'teacher' or 'student', got 'both'"),
        (lambda: ResponseGap(start="0.5"), r"start must be a number in \[0, 1\], got '0.5'"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
