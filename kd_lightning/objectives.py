"""Which two of teacher, student and assistant a divergence compares; the methods of the papers by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kd_lightning import functional
from kd_lightning.assistants import AlphaMixture, ArithmeticMixture, Assistant, GeometricMixture
from kd_lightning.divergences import AlphaBeta, Composite, Divergence, ForwardKL, check_divergence, evaluate
from kd_lightning.schedules import TAIDSchedule, Weight, check_weight, column, numbers, value

SOURCES = ("dataset", "teacher", "student")  # what the column "source" counts: who wrote a response
MODELS = ("teacher", "student", "assistant")


class Objective(Composite):
    r"""\(D(a \| b)\) of two of {teacher p, student q, assistant r}.

    Reduces to the divergence itself with the pair (teacher, student). A divergence that is a `Composite` gets the rows.

    Args:
        divergence: D.
        assistant: r; None: there is none.
        pair: (a, b), two different names of "teacher", "student", "assistant".
        detach_assistant: whether r gets no gradient.

    Raises:
        ValueError: the pair names an assistant and there is none, or the reverse.
    """

    def __init__(
        self,
        divergence: Divergence,
        assistant: Assistant | None = None,
        pair: tuple[str, str] = ("teacher", "student"),
        detach_assistant: bool = False,
    ) -> None:
        super().__init__()
        check_divergence("divergence", divergence)
        if assistant is not None and not isinstance(assistant, Assistant):
            raise ValueError(f"assistant must be an Assistant or None, got {assistant!r}")
        if len(pair) != 2 or pair[0] == pair[1] or not set(pair) <= set(MODELS):
            raise ValueError(f"pair must be two different names of {', '.join(MODELS)}, got {list(pair)}")
        if "assistant" in pair and assistant is None:
            raise ValueError(f"assistant must be given where the pair names it, got None and pair {list(pair)}")
        if assistant is not None and "assistant" not in pair:
            raise ValueError(f"pair must name the assistant where one is given, got {list(pair)}")
        if detach_assistant and "student" not in pair:
            raise ValueError(
                f"detach_assistant must be False where the pair is {list(pair)}: no gradient would be left"
            )
        self.divergence, self.assistant = divergence, assistant
        self.pair, self.detach_assistant = (pair[0], pair[1]), detach_assistant

    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """D(a‖b) of each row."""
        models = {"teacher": log_p, "student": log_q}
        if self.assistant is not None:
            log_r = self.assistant(log_p, log_q, rows)
            models["assistant"] = log_r.detach() if self.detach_assistant else log_r
        return evaluate(self.divergence, models[self.pair[0]], models[self.pair[1]], rows)


class SkewKL(Objective):
    r"""DistiLLM's skew KL, \(\mathrm{KL}(p \| \alpha p + (1-\alpha) q)\).

    Reduces to `ForwardKL` at α → 0.

    Args:
        alpha: α, in (0, 1), or a schedule (`ResponseGap`).

    Raises:
        ValueError: alpha is out of its range.

    Ko et al., ICML 2024, arXiv 2402.03898.
    """

    def __init__(self, alpha: Weight = 0.1) -> None:
        check_weight("alpha", alpha, "()")
        super().__init__(ForwardKL(), ArithmeticMixture(alpha), ("teacher", "assistant"))


class _StudentSkew(Assistant):
    """The arithmetic mixture by the student's weight, which may be a schedule."""

    def __init__(self, alpha: Weight) -> None:
        super().__init__()
        self.alpha = alpha

    def extra_repr(self) -> str:
        return numbers(self)

    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        return functional.alpha_mixture(log_q, log_p, -1.0, value(self.alpha, rows))


class SkewReverseKL(Objective):
    r"""DistiLLM's skew reverse KL, \(\mathrm{KL}(q \| \alpha q + (1-\alpha) p)\).

    Reduces to `ReverseKL` at α → 0.

    Args:
        alpha: α, the student's share of the mixture, in (0, 1), or a schedule (`ResponseGap(side="student")`).
        detach_assistant: whether the mixture gets no gradient, as in DistiLLM-2's code.

    Raises:
        ValueError: alpha is out of its range.

    Ko et al., ICML 2024, arXiv 2402.03898.
    """

    def __init__(self, alpha: Weight = 0.1, detach_assistant: bool = False) -> None:
        check_weight("alpha", alpha, "()")
        super().__init__(ForwardKL(), _StudentSkew(alpha), ("student", "assistant"), detach_assistant)


class TAID(Objective):
    r"""TAID, \(\mathrm{KL}(r \| q)\) with \(r \propto p^t q^{1-t}\) held constant and t growing from step to step.

    Reduces to `ForwardKL` at t = 1.

    Args:
        teacher_weight: t, in (0, 1), or a schedule; None: `TAIDSchedule()`.

    Raises:
        ValueError: the weight is out of its range.

    Shing et al., ICLR 2025, arXiv 2501.16937.
    """

    def __init__(self, teacher_weight: Weight | None = None) -> None:
        t = TAIDSchedule() if teacher_weight is None else teacher_weight
        super().__init__(ForwardKL(), GeometricMixture(t), ("assistant", "student"), detach_assistant=True)


class AMiD(Objective):
    r"""AMiD, any divergence between a model and the α-mixture of both.

    With `ForwardKL` and α = −1 it reduces to `SkewKL`, λ the skew, and with the pair (student, assistant) to
    `SkewReverseKL`, λ one minus the skew.

    Args:
        divergence: D; None: `AlphaBeta(0.2, 0.7)`, as in the authors' scripts.
        alpha: α of the mixture: −1 arithmetic, 1 geometric, 3 harmonic.
        teacher_weight: λ, in (0, 1), or a schedule.
        pair: what D compares: (teacher, assistant), (student, assistant), or either reversed.

    Raises:
        ValueError: an argument is out of its range.

    Shin et al., ICLR 2026, arXiv 2510.15982.
    """

    def __init__(
        self,
        divergence: Divergence | None = None,
        alpha: float = 0.5,
        teacher_weight: Weight = 0.5,
        pair: tuple[str, str] = ("teacher", "assistant"),
    ) -> None:
        divergence = AlphaBeta(0.2, 0.7) if divergence is None else divergence
        super().__init__(divergence, AlphaMixture(alpha, teacher_weight), pair)


class Contrastive(Composite):
    r"""DistiLLM-2: \(2s\,D_t\) on the teacher's responses, \(2(1-s)\,D_s\) on the student's.

    With s = 1/2 and the reduction "sequence_mean" this is CALD. It reads the column "source", an index into `SOURCES`:
    responses of dataset and teacher take the first objective, the student's the second.

    Args:
        teacher_responses: \(D_t\); None: `SkewKL(0.1)`.
        student_responses: \(D_s\); None: `SkewReverseKL(0.1)`.
        teacher_share: s, in [0, 1], or a schedule.

    Raises:
        ValueError: the share is out of its range; the column is missing.

    Ko et al., ICML 2025, arXiv 2503.07067.
    """

    def __init__(
        self,
        teacher_responses: Divergence | None = None,
        student_responses: Divergence | None = None,
        teacher_share: Weight = 0.5,
    ) -> None:
        super().__init__()
        self.teacher_responses = SkewKL(0.1) if teacher_responses is None else teacher_responses
        self.student_responses = SkewReverseKL(0.1) if student_responses is None else student_responses
        check_divergence("teacher_responses", self.teacher_responses)
        check_divergence("student_responses", self.student_responses)
        check_weight("teacher_share", teacher_share)
        self.teacher_share = teacher_share

    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """The objective that belongs to each row."""
        by_student = column(rows, "source") == SOURCES.index("student")
        share = value(self.teacher_share, rows)
        teacher = 2 * share * evaluate(self.teacher_responses, log_p, log_q, rows)
        student = 2 * (1 - share) * evaluate(self.student_responses, log_p, log_q, rows)
        return torch.where(by_student, student, teacher)  # both are finite, so the other one's gradient is 0, not NaN
