r"""Token weights: how much each token counts in a divergence; no gradient flows through them.

A custom weight is a class with one method:

    class StudentEntropy(TokenWeight):
        def forward(self, log_p, log_q, rows=None):
            return functional.entropy(log_q)

`Weighted(divergence, weight)` multiplies a divergence by a weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from kd_lightning import functional
from kd_lightning.schedules import Schedule, StepState, Weight, check_flag, check_number, check_weight, column, value

LABEL_COLUMNS = ("teacher_log_prob", "student_log_prob")
"""Entries of `rows` that the loss computes: the label's log-probability under each model."""

OF_TOKEN = "token_"
"""Prefix of the entries that hold one value per token where a schedule reads the mean over the response."""

# Bins of a histogram of weights: 2^10 of equal width in each power of two from 2^-20 to 2^12, so that a bin is 0.1 %
# wide and its number is a part of the bits of a float. Smaller weights are in the first bin, larger ones in the last.
LOWEST, HIGHEST = -20, 12
DROPPED = 13  # bits of the mantissa that are not part of the number
FIRST = (127 + LOWEST) << (23 - DROPPED)
BINS = ((HIGHEST - LOWEST) << (23 - DROPPED)) + 2


class TokenWeight(StepState, ABC):
    """A weight ≥ 0 per token, without gradient.

    `columns`: entries of `rows` that it reads and the loss computes: "teacher_log_prob" and "student_log_prob", the
    label's log-probability under each model at the temperature of the divergence.

    `exact_with_top_k`: whether it is known exactly from a teacher's top-k log-probabilities, because it reads nothing
    of the teacher but the label's log-probability.

    Examples:
        >>> import torch
        >>> from kd_lightning import TokenWeight
        >>> class TopProbability(TokenWeight):
        ...     def forward(self, log_p, log_q, rows=None):
        ...         return log_p.exp().amax(-1)
        >>> log_p = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
        >>> TopProbability()(log_p, log_p)
        tensor([0.5000, 0.9000])
    """

    columns: tuple[str, ...] = ()
    exact_with_top_k: bool = False

    @abstractmethod
    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """Weight per token.

        Args:
            log_p: the teacher's log-probabilities, [..., V].
            log_q: the student's log-probabilities, [..., V].
            rows: extra inputs per token by name, each [...].

        Returns:
            One value ≥ 0 per token, [...].
        """

    def score(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """What the weight is a function of, [...], see `from_score`; by default the weight itself."""
        return self(log_p, log_q, rows)  # type: ignore[no-any-return]

    def from_score(self, score: Tensor) -> Tensor:
        """The weight of tokens with this score; by default the score itself."""
        return score

    @property
    def bins(self) -> int:
        """Number of bins of the histogram of scores that `update` needs; 0 by default."""
        return 0

    def update(self, histogram: Tensor) -> None:
        """Update after an optimizer step.

        Args:
            histogram: of the scores of this step's tokens on all ranks, [bins].
        """


@final
class TeacherEntropyGate(TokenWeight):
    r"""\(1[H(p) > \tau]\): the tokens of which the teacher is unsure; with `above=False` \(1[H(p) \le \tau]\).

    EOPD trains forward KL on the tokens with high teacher entropy: `Weighted(ForwardKL(), TeacherEntropyGate(1.0))`.
    Reduces to 1 as τ falls below every entropy.

    Args:
        threshold: τ ≥ 0, in nats, or a schedule.
        above: whether tokens above the threshold are kept.

    Raises:
        ValueError: an argument is out of range.

    Reference: EOPD, arXiv 2603.07079.

    Examples:
        >>> import torch
        >>> from kd_lightning import TeacherEntropyGate
        >>> log_p = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()  # entropies 0.69 and 0.33
        >>> TeacherEntropyGate(0.5)(log_p, log_p)
        tensor([1., 0.])
    """

    def __init__(self, threshold: Weight, above: bool = True) -> None:
        super().__init__()
        _check_gate(threshold, above)
        self.threshold, self.above = threshold, above

    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """1 for the tokens that are kept, else 0, [...]."""
        return _gate(functional.entropy(log_p), value(self.threshold, rows), self.above)


@final
class StudentEntropyGate(TokenWeight):
    r"""\(1[H(q) > \tau]\): the tokens of which the student is unsure; with `above=False` \(1[H(q) \le \tau]\).

    Args:
        threshold: τ ≥ 0, in nats, or a schedule.
        above: whether tokens above the threshold are kept.

    Raises:
        ValueError: an argument is out of range.

    Reference: TIP, arXiv 2604.14084, weights tokens by the student's entropy.

    Examples:
        >>> import torch
        >>> from kd_lightning import StudentEntropyGate
        >>> log_p, log_q = torch.tensor([[[0.9, 0.1]] * 2, [[0.5, 0.5], [0.9, 0.1]]]).log()
        >>> StudentEntropyGate(0.5)(log_p, log_q), StudentEntropyGate(0.5, above=False)(log_p, log_q)
        (tensor([1., 0.]), tensor([0., 1.]))
    """

    exact_with_top_k = True

    def __init__(self, threshold: Weight, above: bool = True) -> None:
        super().__init__()
        _check_gate(threshold, above)
        self.threshold, self.above = threshold, above

    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """1 for the tokens that are kept, else 0, [...]."""
        return _gate(functional.entropy(log_q), value(self.threshold, rows), self.above)


@final
class GapGate(TokenWeight):
    r"""\(\sigma(\beta(\log p_y - \log q_y))\) of the label y, in (0, 1): more where the teacher prefers the label.

    ½ for every token at β = 0. Reads "teacher_log_prob" and "student_log_prob", which the loss computes.

    Args:
        beta: β, any finite number.

    Raises:
        ValueError: beta is not finite; in `forward`, an entry of `rows` is missing.

    Examples:
        >>> import torch
        >>> from kd_lightning import GapGate
        >>> log_p = log_q = torch.tensor([[0.5, 0.5]]).log()
        >>> rows = {"teacher_log_prob": torch.tensor([0.75]).log(), "student_log_prob": torch.tensor([0.25]).log()}
        >>> GapGate()(log_p, log_q, rows)  # p / (p + q) of the label
        tensor([0.7500])
    """

    columns = LABEL_COLUMNS
    exact_with_top_k = True

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        check_number("beta", beta)
        self.beta = beta

    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """Weight per token."""
        teacher, student = (column(rows, name, "GapGate") for name in self.columns)
        return torch.sigmoid(self.beta * (teacher - student))


@final
class TopShare(TokenWeight):
    r"""Another weight, on the share of the tokens where it is largest, and 0 on all others.

    A token is kept if its weight is at least a threshold: the (1 − share) quantile of the weights of the previous
    optimizer step, over all its tokens on all ranks, to 0.1 %. In the first step all tokens are kept. Tokens of equal
    weight are kept together, so that more than the share can be kept. Reduces to the other weight at share 1.

    Args:
        weight: the other weight.
        share: in (0, 1], or a schedule.

    Raises:
        ValueError: an argument is out of range.

    Reference: TIP, arXiv 2604.14084, keeps a share of the tokens.

    Examples:
        >>> import torch
        >>> from kd_lightning import ForwardKL, GapGate, TopShare, Weighted
        >>> objective = Weighted(ForwardKL(), TopShare(GapGate(), share=0.5))
        >>> objective.update(objective.weight_sums(torch.tensor([0.2, 0.8])))  # weights of the last step
        >>> objective.weight.from_score(torch.tensor([0.3, 0.9]))
        tensor([0.0000, 0.9000])
    """

    threshold: Tensor

    def __init__(self, weight: TokenWeight, share: Weight) -> None:
        super().__init__()
        check_token_weight("weight", weight)
        if isinstance(weight, TopShare):
            raise ValueError(f"weight must not be a TopShare itself, got {weight!r}")
        check_weight("share", share, ends="(]", per_row=False)
        self.weight, self.share = weight, share
        self.columns, self.exact_with_top_k = weight.columns, weight.exact_with_top_k
        self.state("threshold", 0.0)

    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """Weight per token."""
        return self.from_score(self.score(log_p, log_q, rows))

    def score(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """The other weight, [...]."""
        return self.weight(log_p, log_q, rows)  # type: ignore[no-any-return]

    def from_score(self, score: Tensor) -> Tensor:
        """The score where it is at least the threshold, else 0."""
        return torch.where(score >= self.threshold, score, 0.0)

    def extra_repr(self) -> str:
        """Constructor arguments."""
        return f"share={self.share!r}"

    @property
    def bins(self) -> int:
        """Number of bins of the histogram that `update` needs."""
        return BINS

    @torch.no_grad()
    def update(self, histogram: Tensor) -> None:
        """Set the threshold to the quantile of this step; a step without tokens keeps it. Waits for no device."""
        share = torch.as_tensor(value(self.share), dtype=torch.float64, device=histogram.device)
        at_least = histogram.double().flip(0).cumsum(0).flip(0)  # tokens in this bin or a higher one
        total = at_least[0]
        enough = at_least >= share * total - 1e-6  # the lowest edge is 0, which keeps all
        index = torch.where(enough, torch.arange(BINS, device=histogram.device), 0).amax()
        edge = ((index + (FIRST - 1)) << DROPPED).to(torch.int32).view(torch.float32)  # the lowest weight in the bin
        threshold = torch.where(index > 0, edge, 0.0).to(self.threshold.device)
        self.threshold.copy_(torch.where(total.to(threshold.device) > 0, threshold, self.threshold))


def check_token_weight(name: str, weight: object) -> None:
    """Raise a ValueError with the argument's name and value unless it is a `TokenWeight`."""
    if not isinstance(weight, TokenWeight):
        given = f"the class {weight.__name__}" if isinstance(weight, type) else repr(weight)
        raise ValueError(f"{name} must be a TokenWeight, got {given}")


def label_rows(rows: Mapping[str, Tensor] | None) -> Mapping[str, Tensor] | None:
    """The extra inputs with the label's log-probabilities of the token, not the means that schedules read."""
    if rows is None:
        return None
    found = {name: rows[OF_TOKEN + name] for name in LABEL_COLUMNS if OF_TOKEN + name in rows}
    return {**rows, **found} if found else rows


def histogram(scores: Tensor) -> Tensor:
    """Number of tokens per bin, fp32; histograms of batches and ranks can be added.

    Args:
        scores: [N], ≥ 0; NaN is left out.
    """
    known = ~scores.isnan()
    bits = scores.float().nan_to_num(0.0, posinf=2.0**HIGHEST).clamp(0.0, 2.0**HIGHEST).view(torch.int32)
    index = ((bits >> DROPPED) - (FIRST - 1)).clamp_min(0)
    counts = torch.zeros(BINS, dtype=torch.float32, device=scores.device)
    return counts.index_add_(0, index.long(), known.float())


def _check_gate(threshold: Weight, above: bool) -> None:
    if not isinstance(threshold, Schedule):
        check_number("threshold", threshold, 0, hint=" or a schedule")
    check_flag("above", above)


def _gate(number: Tensor, threshold: float | Tensor, above: bool) -> Tensor:
    return (number > threshold if above else number <= threshold).to(number.dtype)
