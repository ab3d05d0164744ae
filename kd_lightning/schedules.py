"""Numbers that change in the course of training."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor, nn

Stats: TypeAlias = Mapping[str, "Tensor | float"]


class Schedule(nn.Module, ABC):
    """A number that changes in the course of training.

    State lives in 0-d fp32 buffers, which follow the device but never the dtype, are saved in checkpoints, and are
    changed in place, so that a compiled graph sees the change. Only `update` changes it.

    Attributes:
        columns: names of the columns of `rows` that `forward` reads; the loss fills "teacher_log_prob" and
            "student_log_prob" (mean log-probability of each response's labels) where a schedule names them.
    """

    columns: tuple[str, ...] = ()

    @abstractmethod
    def forward(self, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """The present value: 0-d, or one number per row."""

    @abstractmethod
    def update(self, progress: float | Tensor, stats: Stats) -> None:
        """Move on; called once after each optimizer step.

        Args:
            progress: share of the training that is done, in [0, 1].
            stats: means over all tokens of the step: "loss", "kd", "ce", and "gap" where `columns` ask for it.
        """

    def state(self, name: str, number: float) -> None:
        """Register a number as a buffer."""
        self.register_buffer(name, torch.tensor(number, dtype=torch.float32))

    def extra_repr(self) -> str:
        """The numbers it was made with."""
        return numbers(self)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and old.is_floating_point() and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


Weight: TypeAlias = float | Schedule


def value(weight: Weight, rows: Mapping[str, Tensor] | None = None) -> float | Tensor:
    """The present value of a weight: a plain number as it is, a schedule's 0-d or with one number per row."""
    if isinstance(weight, Schedule):
        return weight(rows)  # type: ignore[no-any-return]
    return weight


def numbers(part: nn.Module) -> str:
    """The plain attributes of a part, for its representation."""
    return ", ".join(f"{name}={x!r}" for name, x in vars(part).items() if name[0] != "_" and name != "training")


def check_number(
    name: str, number: object, low: float = -math.inf, high: float = math.inf, ends: str = "[]", hint: str = ""
) -> None:
    """Raise a ValueError unless `number` is a finite number in the interval.

    Args:
        name: the argument, as the user wrote it.
        number: what was given.
        low: lower end.
        high: upper end.
        ends: brackets of the interval: "[" and "]" include the end, "(" and ")" do not.
        hint: added to the message.
    """
    if isinstance(number, Real) and not isinstance(number, bool) and math.isfinite(number):
        above = number >= low if ends[0] == "[" else number > low
        below = number <= high if ends[1] == "]" else number < high
        if above and below:
            return
    if math.isfinite(high):
        allowed = f"in {ends[0]}{low:g}, {high:g}{ends[1]}"
    elif math.isfinite(low):
        allowed = f"a finite number {'≥' if ends[0] == '[' else '>'} {low:g}"
    else:
        allowed = "a finite number"
    raise ValueError(f"{name} must be {allowed}, got {number!r}{hint}")


def check_weight(name: str, weight: object, ends: str = "[]", hint: str = "", columns: bool = True) -> None:
    """Raise a ValueError unless `weight` is a number between 0 and 1, or a schedule.

    Args:
        name: the argument, as the user wrote it.
        weight: what was given.
        ends: brackets of the interval, as in `check_number`.
        hint: added to the message.
        columns: whether a schedule with one value per row is accepted.
    """
    if not isinstance(weight, Schedule):
        check_number(name, weight, 0, 1, ends, hint)
    elif weight.columns and not columns:
        raise ValueError(f"{name} must be a number or a schedule with one value for all rows, got {weight!r}")


class Linear(Schedule):
    r"""\(a + (b - a) \cdot \mathrm{progress}\).

    Args:
        start: a, the value before the first step.
        end: b, the value after the last.

    Raises:
        ValueError: an end is not a finite number.
    """

    now: Tensor

    def __init__(self, start: float, end: float) -> None:
        super().__init__()
        check_number("start", start)
        check_number("end", end)
        self.start, self.end = start, end
        self.state("now", start)

    def forward(self, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """The present value, 0-d."""
        return self.now

    @torch.no_grad()
    def update(self, progress: float | Tensor, stats: Stats) -> None:
        """Move to the value that belongs to the progress."""
        self.now.copy_(torch.as_tensor(self.start + (self.end - self.start) * self._shape(progress)))

    def _shape(self, progress: float | Tensor) -> float | Tensor:
        return progress


class Cosine(Linear):
    r"""\(a + (b - a) (1 - \cos(\pi \cdot \mathrm{progress})) / 2\): level at both ends.

    Args:
        start: a, the value before the first step.
        end: b, the value after the last.

    Raises:
        ValueError: an end is not a finite number.
    """

    def _shape(self, progress: float | Tensor) -> float | Tensor:
        return (1 - torch.cos(torch.as_tensor(progress) * math.pi)) / 2


class TAIDSchedule(Schedule):
    r"""TAID's interpolation t: it grows by itself, and faster while the loss falls.

    .. math:: m \leftarrow \beta m + (1-\beta) \frac{L_{-1} - L}{L_{-1}}, \quad
              t \leftarrow \min\big(t_1, \max(t_0 + (t_1 - t_0)\,\mathrm{progress},
              \; t + a\,\sigma(m)(1 - t))\big)

    L is the mean divergence of the step (over all ranks), \(L_{-1}\) that of the step before; the first step only
    stores it. The authors' code moves t by each micro-batch of each rank alone, and in validation too.

    Args:
        start: t₀, in [0, 1].
        end: t₁, in [start, 1].
        step_size: a, ≥ 0.
        momentum: β, in [0, 1).
        adaptive: False: t is the straight line from start to end.

    Raises:
        ValueError: an argument is out of its range.

    Shing et al., ICLR 2025, arXiv 2501.16937; start 0.4 for their Phi-3 pair, 0.2 for Llama 2 and StableLM.
    """

    now: Tensor
    trend: Tensor
    previous: Tensor

    def __init__(
        self,
        start: float = 0.4,
        end: float = 1.0,
        step_size: float = 5e-4,
        momentum: float = 0.99,
        adaptive: bool = True,
    ) -> None:
        super().__init__()
        check_number("start", start, 0, 1)
        check_number("end", end, start, 1)
        check_number("step_size", step_size, 0)
        check_number("momentum", momentum, 0, 1, "[)")
        self.start, self.end, self.step_size, self.momentum, self.adaptive = start, end, step_size, momentum, adaptive
        self.state("now", start)
        self.state("trend", 0.0)
        self.state("previous", math.nan)  # no step yet

    def forward(self, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """The present t, 0-d."""
        return self.now

    @torch.no_grad()
    def update(self, progress: float | Tensor, stats: Stats) -> None:
        """Move t by the relative change of `stats["kd"]`, without asking a device for its value."""
        line = torch.as_tensor(self.start + (self.end - self.start) * progress).to(self.now)
        if not self.adaptive:
            self.now.copy_(line)
            return
        loss = torch.as_tensor(stats["kd"]).to(self.now)
        first = self.previous.isnan()
        change = (self.previous - loss) / (self.previous + 1e-15)
        trend = self.momentum * self.trend + (1 - self.momentum) * change
        moved = self.now + self.step_size * torch.sigmoid(trend) * (1 - self.now)
        self.trend.copy_(torch.where(first, self.trend, trend))
        self.now.copy_(torch.where(first, self.now, torch.maximum(line, moved).clamp_max(self.end)))
        self.previous.copy_(loss)


class ResponseGap(Schedule):
    r"""DistiLLM-2's skew of each response: the larger the gap between the models, the more of the other is mixed in.

    .. math:: \alpha = \mathrm{clip}\Big(1 - (1-\alpha_0) \frac{m}{g + 10^{-5}},\; \alpha_{\min},\; \alpha_0\Big),
              \quad g = \bar P - \bar Q ,

    \(\bar P\) and \(\bar Q\) the exponentials of the mean log-probability that teacher and student give to the labels
    of the response, m the mean of g in the last step. No gradient flows through α (in the authors' code it does, and
    dominates). α is only ever lowered from α₀; without rows it is that of a response whose gap is the mean.

    Args:
        initial: α₀, in (0, 1).
        minimum: smallest α, in (0, initial].
        side: "teacher" for the skew KL on responses of teacher or dataset; "student" for the skew reverse KL on
            the student's own, where P and Q change places. m is taken from responses of this origin where the rows have
            the column "source".
        start: progress from which α adapts, in [0, 1]; it is α₀ before. The paper leaves out the first epoch: for n
            epochs that is 1/n.

    Raises:
        ValueError: an argument is out of its range; a column is missing.

    Ko et al., ICML 2025, arXiv 2503.07067.
    """

    columns = ("teacher_log_prob", "student_log_prob")
    mean_gap: Tensor
    acting: Tensor

    def __init__(self, initial: float = 0.1, minimum: float = 0.01, side: str = "teacher", start: float = 0.0) -> None:
        super().__init__()
        check_number("initial", initial, 0, 1, "()")
        check_number("minimum", minimum, 0, initial, "(]")
        check_number("start", start, 0, 1)
        if side not in ("teacher", "student"):
            raise ValueError(f"side must be 'teacher' or 'student', got {side!r}")
        self.initial, self.minimum, self.side, self.start = initial, minimum, side, start
        self.state("mean_gap", 0.0)
        self.state("acting", 0.0)

    def forward(self, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """One α per row; 0-d without rows."""
        gap = self.mean_gap
        if rows is not None:
            teacher, student = (column(rows, name).detach().exp() for name in self.columns)
            gap = teacher - student if self.side == "teacher" else student - teacher
        alpha = 1 - (1 - self.initial) * self.mean_gap / (gap + 1e-5)
        return torch.where(self.acting > 0, alpha.clamp(self.minimum, self.initial), self.initial)

    @torch.no_grad()
    def update(self, progress: float | Tensor, stats: Stats) -> None:
        """Take m from the step.

        Args:
            progress: share of the training that is done.
            stats: "gap", the mean of P − Q; where responses of several origins are mixed also "student_part", the share
                of the student's, and "student_gap", the mean of P − Q with 0 for all others.
        """
        gap, weight = torch.as_tensor(stats["gap"]).to(self.mean_gap), torch.ones_like(self.mean_gap)
        if "student_part" in stats:
            part, of_student = (torch.as_tensor(stats[name]).to(gap) for name in ("student_part", "student_gap"))
            gap, weight = (gap - of_student, 1 - part) if self.side == "teacher" else (of_student, part)
        mean = (gap if self.side == "teacher" else -gap) / weight
        self.mean_gap.copy_(torch.where(weight > 0, mean, self.mean_gap))
        self.acting.copy_((torch.as_tensor(progress) >= self.start).to(gap))


def column(rows: Mapping[str, Tensor] | None, name: str) -> Tensor:
    """A column of the rows; a ValueError that names it where it is missing."""
    if rows is None or name not in rows:
        there = ", ".join(map(repr, rows)) if rows else "none"
        raise ValueError(f"rows must have a column {name!r}, got {there}")
    return rows[name]
