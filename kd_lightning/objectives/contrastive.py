r"""One objective for the teacher's responses and another for the student's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from kd_lightning.constants import SOURCES
from kd_lightning.divergences import (
    Composite,
    Divergence,
    check_divergence,
    evaluate,
    first_not_f_divergence,
    first_not_mergeable,
)
from kd_lightning.objectives.objective import SkewKL, SkewReverseKL
from kd_lightning.schedules import Weight, check_flag, check_weight, column, value


class Contrastive(Composite):
    r"""One objective for the teacher's responses and another for the student's (CALD of DistiLLM-2).

    \(2s\,D_1\) on responses of the dataset or the teacher, \(2(1-s)\,D_2\) on the student's. With s = 0.5 and
    `reduction="sequence_mean"` this is the mean over pairs of (SKL + SRKL)/2.

    Args:
        teacher_responses: D1, for responses of the dataset or the teacher; None: `SkewKL(0.1)`.
        student_responses: D2, for the student's responses; None: `SkewReverseKL(0.1)`.
        teacher_share: s in [0, 1], or a schedule.

    Raises:
        ValueError: an argument is out of range; in `forward`, `rows` has no entry "source".

    Reference: Ko et al., arXiv 2503.07067.

    Examples:
        >>> import torch
        >>> from kd_lightning import Contrastive, ForwardKL, ReverseKL
        >>> log_p, log_q = torch.tensor([[[0.5, 0.5]] * 2, [[0.25, 0.75]] * 2]).log()
        >>> rows = {"source": torch.tensor([1, 2])}  # a response of the teacher, and one of the student
        >>> Contrastive(ForwardKL(), ReverseKL())(log_p, log_q, rows)
        tensor([0.1438, 0.1308])
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

    def token_scores(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The scores of both objectives' weights, each on its own responses."""
        if not self.weighted():
            return {}
        by_student = column(rows, "source", "Contrastive") == SOURCES.index("student")
        sides = {"teacher_responses": ~by_student, "student_responses": by_student}
        scores = super().token_scores(log_p, log_q, rows)
        return {path: torch.where(sides[path.partition(".")[0]], x, torch.nan) for path, x in scores.items()}

    @property
    def is_f_divergence(self) -> bool:
        """Whether both objectives are f-divergences."""
        return self.not_f_divergence() is None

    def not_f_divergence(self) -> str | None:
        """Name of the first objective that is not an f-divergence."""
        return first_not_f_divergence((self.teacher_responses, self.student_responses))

    def not_mergeable(self) -> str | None:
        """Name of the first objective that changes if tokens with equal p / q are merged."""
        return first_not_mergeable((self.teacher_responses, self.student_responses))

    def components(self) -> dict[str, Divergence]:
        """Both objectives, each on its own responses."""
        return {
            "teacher_responses": OnSource(self.teacher_responses, student=False),
            "student_responses": OnSource(self.student_responses, student=True),
        }


@final
class OnSource(Composite):
    """A divergence on the responses of one source, NaN on the others; used to measure the sides of `Contrastive`.

    Args:
        divergence: the divergence.
        student: True: the student's responses; False: those of the dataset and the teacher.
    """

    def __init__(self, divergence: Divergence, student: bool) -> None:
        super().__init__()
        check_divergence("divergence", divergence)
        check_flag("student", student)
        self.divergence = divergence
        self.student = student

    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """Divergence per token."""
        selected = (column(rows, "source", "Contrastive") == SOURCES.index("student")) == self.student
        return torch.where(selected, evaluate(self.divergence, log_p, log_q, rows), torch.nan)

    def not_mergeable(self) -> str | None:
        """The name of what changes in the divergence if tokens are merged."""
        return self.divergence.not_mergeable()

    def components(self) -> dict[str, Divergence]:
        """The divergence's components, on the same responses."""
        return {name: OnSource(part, self.student) for name, part in self.divergence.components().items()}
