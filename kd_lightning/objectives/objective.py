r"""Objectives D(a ‖ b), where a and b are two of teacher p, student q and assistant r, and the published methods."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kd_lightning.assistants import AlphaMixture, ArithmeticMixture, Assistant, GeometricMixture
from kd_lightning.divergences import (
    ChunkLikelihood,
    Composite,
    Divergence,
    ForwardKL,
    check_divergence,
    described,
    evaluate,
)
from kd_lightning.schedules import Schedule, TAIDSchedule, Weight, check_flag, check_weight

ROLES = ("teacher", "student", "assistant")


class Objective(Composite):
    r"""\(D(a \| b)\), where a and b are two of {p, q, r}.

    Reduces to the divergence itself without an assistant.

    Args:
        divergence: D, any divergence.
        assistant: r, a mixture of teacher and student.
        pair: the names of a and b: two of "teacher", "student", "assistant".
        detach_assistant: whether r is a fixed target without gradient.

    Raises:
        ValueError: the pair is not two of the three names, or does not match `assistant` and `detach_assistant`.

    Examples:
        >>> import torch
        >>> from kd_lightning import ArithmeticMixture, ForwardKL, Objective
        >>> log_p, log_q = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
        >>> Objective(ForwardKL())(log_p, log_q)  # forward KL
        tensor(0.1438)
        >>> Objective(ForwardKL(), ArithmeticMixture(0.1), ("teacher", "assistant"))(log_p, log_q)  # SkewKL(0.1)
        tensor(0.1131)
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
            raise ValueError(f"assistant must be an Assistant or None, got {described(assistant)}")
        check_flag("detach_assistant", detach_assistant)
        named = isinstance(pair, (tuple, list)) and len(pair) == 2 and pair[0] != pair[1]
        if not named or any(name not in ROLES for name in pair):
            raise ValueError(f"pair must be two different names of {', '.join(ROLES)}, got {described(pair)}")
        pair = tuple(pair)  # type: ignore[assignment]  # a list in a config
        if ("assistant" in pair) != (assistant is not None):
            given = "no assistant" if assistant is None else f"the assistant {type(assistant).__name__}"
            raise ValueError(f"pair must contain 'assistant' if and only if one is given, got {pair!r} and {given}")
        if detach_assistant and "student" not in pair:
            raise ValueError(f"detach_assistant must be False if 'student' is not in pair, got {pair!r}")
        if assistant is not None and any(isinstance(part, ChunkLikelihood) for part in divergence.modules()):
            raise ValueError(
                f"divergence must not contain ChunkLikelihood with an assistant, got {described(divergence)}: it "
                "compares likelihoods of the text; add it to the objective with WeightedSum"
            )
        self.divergence = divergence
        self.assistant = assistant
        self.pair = pair
        self.detach_assistant = detach_assistant

    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """Divergence per token."""
        return evaluate(self.divergence, *self._compared(log_p, log_q, rows), rows)

    def _compared(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None) -> tuple[Tensor, Tensor]:
        """The two distributions, as log-probabilities."""
        parts = {"teacher": log_p, "student": log_q}
        if self.assistant is not None:
            log_r = self.assistant(log_p, log_q, rows)
            parts["assistant"] = log_r.detach() if self.detach_assistant else log_r
        a, b = self.pair
        return parts[a], parts[b]

    def token_scores(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The scores of the divergence's weights, which see a and b."""
        if not self.weighted():
            return {}
        return super().token_scores(*self._compared(log_p, log_q, rows), rows)

    @property
    def is_f_divergence(self) -> bool:
        """Whether the divergence is one and the assistant keeps the lower bound."""
        return self.not_f_divergence() is None

    def not_f_divergence(self) -> str | None:
        """This class with its assistant, or the divergence's own name."""
        if self.assistant is not None and not self.assistant.keeps_lower_bound:
            return f"{type(self).__name__} (its assistant is {type(self.assistant).__name__})"
        return self.divergence.not_f_divergence()

    def not_mergeable(self) -> str | None:
        """This class with its assistant, or the name of what changes in the divergence if tokens are merged."""
        if self.assistant is not None and not self.assistant.is_mergeable:
            return f"{type(self).__name__} (its assistant is {type(self.assistant).__name__})"
        return self.divergence.not_mergeable()

    def components(self) -> dict[str, Divergence]:
        """The divergence's components, each between the same two distributions."""
        settings = (self.assistant, self.pair, self.detach_assistant)
        return {name: Objective(part, *settings) for name, part in self.divergence.components().items()}


class SkewKL(Objective):
    r"""DistiLLM's SKL: \(\mathrm{KL}(p \| \alpha p + (1-\alpha) q)\); bounded by −log α.

    Reduces to forward KL as α → 0.

    Args:
        alpha: in (0, 1), or a schedule.

    Raises:
        ValueError: alpha is out of range.

    Reference: Ko et al., arXiv 2402.03898.

    Examples:
        >>> import torch
        >>> from kd_lightning import ArithmeticMixture, ForwardKL, Objective, SkewKL
        >>> log_p, log_q = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
        >>> SkewKL(0.1)(log_p, log_q)
        tensor(0.1131)
        >>> Objective(ForwardKL(), ArithmeticMixture(0.1), ("teacher", "assistant"))(log_p, log_q)
        tensor(0.1131)
    """

    def __init__(self, alpha: Weight = 0.1) -> None:
        check_weight("alpha", alpha, ends="()")
        super().__init__(ForwardKL(), ArithmeticMixture(alpha), ("teacher", "assistant"))


class SkewReverseKL(Objective):
    r"""DistiLLM's SRKL: \(\mathrm{KL}(q \| \alpha q + (1-\alpha) p)\); bounded by −log α.

    Reduces to reverse KL as α → 0.

    Args:
        alpha: in (0, 1), or a schedule.
        detach_assistant: no gradient through the mixture, as in DistiLLM-2's code for the student's responses.

    Raises:
        ValueError: alpha is out of range.

    Reference: Ko et al., arXiv 2402.03898.

    Examples:
        >>> import torch
        >>> from kd_lightning import ArithmeticMixture, ForwardKL, Objective, SkewReverseKL
        >>> log_p, log_q = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
        >>> SkewReverseKL(0.1)(log_p, log_q)
        tensor(0.1070)
        >>> Objective(ForwardKL(), ArithmeticMixture(0.9), ("student", "assistant"))(log_p, log_q)
        tensor(0.1070)
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
        ValueError: the weight is out of range.

    Reference: Shing et al., arXiv 2501.16937.

    Examples:
        >>> import torch
        >>> from kd_lightning import TAID
        >>> log_p, log_q = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
        >>> TAID()(log_p, log_q), TAID(0.999)(log_p, log_q)  # from t = 0.4 at the start to forward KL, 0.1438
        (tensor(0.0206), tensor(0.1435))
    """

    def __init__(self, teacher_weight: Weight | None = None) -> None:
        weight = TAIDSchedule() if teacher_weight is None else teacher_weight
        super().__init__(ForwardKL(), GeometricMixture(weight), ("assistant", "student"), detach_assistant=True)


class AMiD(Objective):
    r"""\(D(p \| r)\) or another pair, r the α-mixture of teacher and student.

    Reduces to SKL(λ) with ForwardKL, α = −1, ("teacher", "assistant"); to SRKL(1 − λ) with ("student", "assistant").

    Args:
        divergence: D, any divergence.
        alpha: the mixture's α.
        teacher_weight: λ in (0, 1), or a schedule, which may reach 0 and 1.
        pair: the two distributions that are compared.

    Raises:
        ValueError: an argument is out of range.

    Reference: Shin et al., arXiv 2510.15982.

    Examples:
        >>> import torch
        >>> from kd_lightning import AMiD, ForwardKL, SkewKL
        >>> log_p, log_q = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
        >>> AMiD(ForwardKL(), alpha=-1.0, teacher_weight=0.1)(log_p, log_q), SkewKL(0.1)(log_p, log_q)
        (tensor(0.1131), tensor(0.1131))
    """

    def __init__(
        self,
        divergence: Divergence,
        alpha: float,
        teacher_weight: Weight,
        pair: tuple[str, str] = ("teacher", "assistant"),
    ) -> None:
        super().__init__(divergence, AlphaMixture(alpha, teacher_weight), pair)


class Complement(Schedule):
    """1 − another schedule.

    Args:
        schedule: the other schedule.
    """

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        if not isinstance(schedule, Schedule):
            raise ValueError(f"schedule must be a Schedule, got {schedule!r}")
        self.schedule = schedule
        self.columns, self.side = schedule.columns, schedule.side

    def forward(self, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """1 − the other schedule's current value."""
        return 1 - self.schedule(rows)  # type: ignore[no-any-return]

    def update(self, progress: float, stats: Mapping[str, Tensor]) -> None:
        """No-op: the other schedule is a submodule and is updated itself."""
