r"""Weights that only `update` changes, saved in checkpoints; a compiled loss reads them without recompilation."""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Self

import torch
from torch import Tensor, nn


class StepState(nn.Module):
    """Numbers that change once per optimizer step, in 0-d fp32 buffers."""

    def state(self, name: str, number: float) -> None:
        """Register a number as a buffer."""
        self.register_buffer(name, torch.tensor(number, dtype=torch.float32))

    def extra_repr(self) -> str:
        """Constructor arguments."""
        return numbers(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the device only: casting the model must not round the state."""
        kept = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


class Schedule(StepState, ABC):
    """A weight that changes in `update`, called once per optimizer step; `forward` returns its current value.

    `columns`: entries of `rows` that it reads; the loss computes them. `side`: as in `ResponseGap`; None: all of them.

    Examples:
        >>> from kd_lightning import DistillationLoss, ForwardKL, Linear
        >>> DistillationLoss(ForwardKL(), ce_weight=Linear(0.5, 0.0)).schedules()
        {'ce_weight': Linear(start=0.5, end=0.0, until=1.0)}
    """

    columns: tuple[str, ...] = ()
    side: str | None = None

    @abstractmethod
    def forward(self, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """The current value: 0-d, or one per token if it depends on `rows` (0-d without them)."""

    @abstractmethod
    def update(self, progress: float, stats: Mapping[str, Tensor]) -> None:
        """Update after an optimizer step.

        Args:
            progress: finished share of the run, in [0, 1].
            stats: means over this step's tokens on all ranks: "loss", "kd", "ce"; "epoch", the finished passes over
                the data; if a schedule has `columns`, means over responses: "gap", "teacher_gap", "student_gap".
        """


Weight = float | Schedule
"""A number; every weight that is a number can also be a schedule.

Examples:
    >>> from kd_lightning import Linear, Weight
    >>> isinstance(0.5, Weight), isinstance(Linear(1.0, 0.0), Weight)
    (True, True)"""


def value(weight: Weight, rows: Mapping[str, Tensor] | None = None) -> float | Tensor:
    """The current value of a weight: the number itself, or the schedule's value, 0-d or one per token."""
    return weight(rows) if isinstance(weight, Schedule) else weight


def check_number(
    name: str, number: object, low: float = -math.inf, high: float = math.inf, ends: str = "[]", hint: str = ""
) -> None:
    """Raise a ValueError unless it is a finite number in the interval; of `ends`, "[" and "]" include an end."""
    if isinstance(number, (int, float)) and not isinstance(number, bool) and abs(number) <= sys.float_info.max:
        above = low <= number if ends[0] == "[" else low < number
        below = number <= high if ends[1] == "]" else number < high
        if above and below:
            return
    if high < math.inf:
        allowed = f"a number in {ends[0]}{low:g}, {high:g}{ends[1]}"
    else:
        allowed = "a finite number" + (f" {'≥' if ends[0] == '[' else '>'} {low:g}" if low > -math.inf else "")
    raise ValueError(f"{name} must be {allowed}{hint}, got {number!r}")


def check_flag(name: str, flag: object, allowed: str = "True or False") -> None:
    """Raise a ValueError with argument and value unless it is a bool."""
    if not isinstance(flag, bool):
        raise ValueError(f"{name} must be {allowed}, got {flag!r}")


def check_weight(name: str, weight: object, ends: str = "[]", hint: str = "", per_row: bool = True) -> None:
    """Raise a ValueError unless it is a number in [0, 1] or a schedule (`per_row`: it may have a value per token)."""
    if not isinstance(weight, Schedule):
        check_number(name, weight, 0, 1, ends, f"{hint} or a schedule")
    elif weight.columns and not per_row:
        raise ValueError(f"{name} must be a number or a schedule with one value for all tokens, got {weight!r}")


def numbers(part: nn.Module) -> str:
    """The plain attributes of a module, for its representation."""
    return ", ".join(f"{name}={x!r}" for name, x in vars(part).items() if name[0] != "_" and name != "training")


def column(rows: Mapping[str, Tensor] | None, name: str, reader: str) -> Tensor:
    """One entry of the extra inputs per token; a ValueError with its name and reader if it is missing."""
    if rows is None or name not in rows:
        raise ValueError(f"missing column {name!r} in rows, which {reader} reads: pass rows with {name!r}")
    return rows[name]


class _Between(Schedule):
    """A value between start and end that depends only on progress."""

    now: Tensor

    def __init__(self, start: float, end: float, until: float = 1.0) -> None:
        super().__init__()
        check_number("start", start, 0, 1)
        check_number("end", end, 0, 1)
        check_number("until", until, 0, 1, "(]")
        self.start, self.end, self.until = start, end, until
        self.state("now", start)

    @abstractmethod
    def at(self, progress: float) -> float:
        """The value at a progress in [0, 1]."""

    def forward(self, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """The current value, 0-d."""
        return self.now

    def update(self, progress: float, stats: Mapping[str, Tensor]) -> None:
        """Set the value for this progress."""
        self.now.fill_(self.at(min(progress / self.until, 1.0)))


class Linear(_Between):
    r"""\(\text{start} + (\text{end} - \text{start})\cdot\text{progress}\), where progress reaches 1 at `until`.

    Args:
        start: value at the beginning, in [0, 1].
        end: value at the end, in [0, 1].
        until: share of the run after which the value is constant, in (0, 1].

    Examples:
        >>> from kd_lightning import Linear
        >>> [Linear(1.0, 0.0).at(progress) for progress in (0, 0.25, 0.5, 1)]
        [1.0, 0.75, 0.5, 0.0]
    """

    def at(self, progress: float) -> float:
        """Linear interpolation."""
        return self.start + (self.end - self.start) * progress


class Cosine(_Between):
    r"""Half a cosine from start to end: \(\text{end} + (\text{start} - \text{end})(1 + \cos\pi\,\text{progress})/2\).

    Args:
        start: value at the beginning, in [0, 1].
        end: value at the end, in [0, 1].
        until: share of the run after which the value is constant, in (0, 1].

    Examples:
        >>> from kd_lightning import Cosine
        >>> [round(Cosine(1.0, 0.0).at(progress), 3) for progress in (0, 0.25, 0.5, 1)]
        [1.0, 0.854, 0.5, 0.0]
    """

    def at(self, progress: float) -> float:
        """Cosine interpolation."""
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * progress)) / 2


class TAIDSchedule(Schedule):
    r"""TAID's teacher weight: linear in the progress, or above it by small steps that depend on the loss.

    \(t \leftarrow \min(\text{end}, \max(\text{linear}(\text{progress}),\; t + \alpha\,\sigma(m)(1 - t)))\),
    \(m \leftarrow \beta m + (1-\beta)(L_{prev} - L)/L_{prev}\); the first step only stores its loss L, the
    mean divergence of the step. Reduces to `Linear(start, end)` with `adaptive=False`. σ(m) is about ½ unless the loss
    changes by a large factor, and a rising loss raises t too: with the defaults, a run of 1,000 steps follows the line.

    Args:
        start: t at the beginning, in [0, 1].
        end: t at the end, in [start, 1].
        step_size: α ≥ 0.
        momentum: β in [0, 1).
        adaptive: whether t depends on the loss.

    Raises:
        ValueError: an argument is out of range.

    Reference: Shing et al., arXiv 2501.16937.

    Examples:
        >>> from kd_lightning import TAIDSchedule
        >>> schedule = TAIDSchedule(0.4, 1.0, adaptive=False)
        >>> schedule.update(0.5, {})
        >>> schedule()
        tensor(0.7000)
    """

    t: Tensor
    previous: Tensor
    trend: Tensor

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
        check_flag("adaptive", adaptive)
        self.start, self.end, self.step_size, self.momentum, self.adaptive = start, end, step_size, momentum, adaptive
        self.state("t", start)
        self.state("previous", math.nan)  # before the first step
        self.state("trend", 0.0)

    def forward(self, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """The current t, 0-d."""
        return self.t

    @torch.no_grad()
    def update(self, progress: float, stats: Mapping[str, Tensor]) -> None:
        """Update t as in the paper, without a device synchronization."""
        target = self.start + (self.end - self.start) * progress
        if not self.adaptive:
            self.t.fill_(target)
            return
        loss = torch.as_tensor(stats["kd"], dtype=torch.float32, device=self.t.device)
        first = self.previous.isnan()
        change = (self.previous - loss) / (self.previous + 1e-15)
        trend = self.momentum * self.trend + (1 - self.momentum) * change
        risen = self.t + self.step_size * trend.sigmoid() * (1 - self.t)
        self.trend.copy_(torch.where(first, self.trend, trend))
        self.t.copy_(torch.where(first, self.t, risen.clamp_min(target).clamp_max(self.end)))
        self.previous.copy_(loss)


class ResponseGap(Schedule):
    r"""DistiLLM-2's skew per response: almost a switch at the mean gap, α0 above it (and where g < 0), less below.

    \(\alpha = 1 - (1 - \alpha_0)\,m / (g + 10^{-5})\), clipped to [minimum, \(\alpha_0\)];
    \(g = e^{\overline{\log p}} - e^{\overline{\log q}}\) over the response's labels, m the mean of g over the
    responses of the last optimizer step. No gradient; \(\alpha_0\) before `start` and without `rows`.

    Args:
        initial: α0, in (0, 1).
        minimum: lower end, in (0, initial].
        side: responses of which m is the mean: "teacher", those of the dataset too; or "student", with −g instead of g.
        start: progress from which m is updated, in [0, 1]; None: from the second pass (in a loop without "epoch", 0).

    Raises:
        ValueError: an argument is out of range.

    Reference: Ko et al., arXiv 2503.07067.

    Examples:
        >>> import torch
        >>> from kd_lightning import ResponseGap
        >>> alpha = ResponseGap(0.5, start=0.0)
        >>> alpha.update(0.0, {"gap": torch.tensor(0.2)})
        >>> p, q = torch.tensor([[0.9, 0.4], [0.5, 0.25]]).log()
        >>> alpha({"teacher_log_prob": p, "student_log_prob": q})
        tensor([0.5000, 0.3334])
    """

    columns = ("teacher_log_prob", "student_log_prob")
    mean_gap: Tensor

    def __init__(
        self, initial: float = 0.1, minimum: float = 0.01, side: str = "teacher", start: float | None = None
    ) -> None:
        super().__init__()
        check_number("initial", initial, 0, 1, "()")
        check_number("minimum", minimum, 0, initial, "(]")
        if start is not None:
            check_number("start", start, 0, 1)
        if not isinstance(side, str) or side not in ("teacher", "student"):
            raise ValueError(f"side must be 'teacher' or 'student', got {side!r}")
        self.initial, self.minimum, self.side, self.start = initial, minimum, side, start
        self.state("mean_gap", math.nan)  # before the first update

    def forward(self, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """One skew per token; without rows the initial one, 0-d."""
        if rows is None:
            return torch.full_like(self.mean_gap, self.initial)
        teacher, student = (column(rows, name, "ResponseGap").detach().exp() for name in self.columns)
        gap = self._sign() * (teacher - student)
        skew = (1 - (1 - self.initial) * (self.mean_gap / (gap + 1e-5))).clamp(self.minimum, self.initial)
        return torch.where(skew.isnan(), self.initial, skew)  # before the first update, or 0 / 0

    @torch.no_grad()
    def update(self, progress: float, stats: Mapping[str, Tensor]) -> None:
        """Store this step's mean gap: "teacher_gap" or "student_gap" of `stats` (NaN: no such response), else "gap"."""
        started = float(stats.get("epoch", 1)) >= 1 if self.start is None else progress >= self.start
        if started:
            gap = torch.as_tensor(stats.get(f"{self.side}_gap", stats["gap"])).to(self.mean_gap)
            self.mean_gap.copy_(torch.where(gap.isnan(), self.mean_gap, self._sign() * gap))

    def _sign(self) -> float:
        return 1.0 if self.side == "teacher" else -1.0
