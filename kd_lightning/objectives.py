r"""D(a ‖ b), a and b two of teacher p, student q, assistant r; the papers' recipes as points of that space."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kd_lightning.assistants import AlphaMixture, ArithmeticMixture, Assistant, GeometricMixture
from kd_lightning.constants import SOURCES
from kd_lightning.divergences import Composite, Divergence, ForwardKL, check_divergence, evaluate
from kd_lightning.schedules import Complement, Schedule, TAIDSchedule, Weight, check_weight, column, value

ROLES = ("teacher", "student", "assistant")


class Objective(Composite):
    r"""\(D(a \| b)\) with a, b two of {p, q, r}.

    Reduces to the divergence itself without an assistant.

    Args:
        divergence: D, any divergence.
        assistant: r, between teacher and student.
        pair: the names of a and b: two of "teacher", "student", "assistant".
        detach_assistant: r is a fixed target: no gradient flows through it.

    Raises:
        ValueError: the pair is not two of the three, or speaks of an assistant that is not there.
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
        pair = tuple(pair)  # type: ignore[assignment]
        if len(pair) != 2 or len(set(pair)) != 2 or not set(pair) <= set(ROLES):
            raise ValueError(f"pair must be two different names of {', '.join(ROLES)}, got {pair!r}")
        if ("assistant" in pair) != (assistant is not None):
            there = "is none" if assistant is None else "is one"
            raise ValueError(
                f"pair must name the assistant exactly where there is one, got {pair!r}, and there {there}"
            )
        if detach_assistant and "student" not in pair:
            raise ValueError(f"detach_assistant must be False where the student is not in the pair, got {pair!r}")
        self.divergence = divergence
        self.assistant = assistant
        self.pair = pair
        self.detach_assistant = detach_assistant

    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """Divergence per token."""
        parts = {"teacher": log_p, "student": log_q}
        if self.assistant is not None:
            log_r = self.assistant(log_p, log_q, rows)
            parts["assistant"] = log_r.detach() if self.detach_assistant else log_r
        a, b = self.pair
        return evaluate(self.divergence, parts[a], parts[b], rows)


class SkewKL(Objective):
    r"""DistiLLM's SKL: \(\mathrm{KL}(p \| \alpha p + (1-\alpha) q)\); bounded by −log α.

    Reduces to forward KL as α → 0.

    Args:
        alpha: in (0, 1), or a schedule.

    Raises:
        ValueError: alpha is out of its range.

    Reference: Ko et al., arXiv 2402.03898.
    """

    def __init__(self, alpha: Weight = 0.1) -> None:
        check_weight("alpha", alpha, ends="()")
        super().__init__(ForwardKL(), ArithmeticMixture(alpha), ("teacher", "assistant"))


class SkewReverseKL(Objective):
    r"""DistiLLM's SRKL: \(\mathrm{KL}(q \| \alpha q + (1-\alpha) p)\); bounded by −log α.

    Reduces to reverse KL as α → 0.

    Args:
        alpha: in (0, 1), or a schedule.
        detach_assistant: no gradient through the mixture, as DistiLLM-2's code has it for its student part.

    Raises:
        ValueError: alpha is out of its range.

    Reference: Ko et al., arXiv 2402.03898.
    """

    def __init__(self, alpha: Weight = 0.1, detach_assistant: bool = False) -> None:
        check_weight("alpha", alpha, ends="()")
        teacher_weight = Complement(alpha) if isinstance(alpha, Schedule) else 1 - alpha
        super().__init__(ForwardKL(), ArithmeticMixture(teacher_weight), ("student", "assistant"), detach_assistant)


class TAID(Objective):
    r"""\(\mathrm{KL}(r \| q)\), \(r \propto p^t q^{1-t}\) a fixed target that moves from student to teacher.

    Reduces to forward KL at t = 1.

    Args:
        teacher_weight: t in (0, 1), or a schedule; None: `TAIDSchedule()`.

    Raises:
        ValueError: the weight is out of its range.

    Reference: Shing et al., arXiv 2501.16937.
    """

    def __init__(self, teacher_weight: Weight | None = None) -> None:
        weight = TAIDSchedule() if teacher_weight is None else teacher_weight
        super().__init__(ForwardKL(), GeometricMixture(weight), ("assistant", "student"), detach_assistant=True)


class AMiD(Objective):
    r"""\(D(p \| r)\) or another pair, r the α-mixture of teacher and student.

    Reduces to SKL(λ) with ForwardKL, α = −1, ("teacher", "assistant"); to SRKL(1 − λ) with ("student", "assistant").

    Args:
        divergence: D, any divergence.
        alpha: of the mixture.
        teacher_weight: λ in (0, 1), or a schedule, which may reach the ends.
        pair: which two are compared.

    Raises:
        ValueError: an argument is out of its range.

    Reference: Shin et al., arXiv 2510.15982.
    """

    def __init__(
        self,
        divergence: Divergence,
        alpha: float,
        teacher_weight: Weight,
        pair: tuple[str, str] = ("teacher", "assistant"),
    ) -> None:
        super().__init__(divergence, AlphaMixture(alpha, teacher_weight), pair)


class Contrastive(Composite):
    r"""One objective on the teacher's responses, another on the student's (DistiLLM-2's CALD).

    \(2s\,D_1\) on rows from the data set or the teacher, \(2(1-s)\,D_2\) on the student's; with s = 0.5 and
    `reduction="sequence_mean"` the mean over pairs of (SKL + SRKL)/2.

    Args:
        teacher_responses: objective of responses from the data set or the teacher; None: `SkewKL(0.1)`.
        student_responses: objective of the student's responses; None: `SkewReverseKL(0.1)`.
        teacher_share: s in [0, 1], or a schedule.

    Raises:
        ValueError: an argument is out of its range; in a call, the column `source` is missing.

    Reference: Ko et al., arXiv 2503.07067.
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
        """Divergence per token."""
        source, share = column(rows, "source", "Contrastive"), value(self.teacher_share, rows)
        teacher = 2 * share * evaluate(self.teacher_responses, log_p, log_q, rows)
        student = 2 * (1 - share) * evaluate(self.student_responses, log_p, log_q, rows)
        return torch.where(source == SOURCES.index("student"), student, teacher)
