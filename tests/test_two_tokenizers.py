"""Two tokenizations of one text: divergences at aligned positions, and likelihoods of the text between them."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from kd_lightning import (
    TAID,
    AlphaDivergence,
    ArithmeticMixture,
    ChunkLikelihood,
    Contrastive,
    DistillationLoss,
    Divergence,
    ForwardKL,
    GapGate,
    GeneralizedJSD,
    Head,
    LossParts,
    Objective,
    ReverseKL,
    SkewKL,
    StudentEntropyGate,
    VocabularyMap,
    Weighted,
    WeightedSum,
    distillation_loss,
    fused_distillation_loss,
)
from kd_lightning.divergences import evaluate
from kd_lightning.engine.top_k import TopK, top_k
from tests.leaves import kl
from tests.support.slow_reference import logits

B, T, TT, HS, HT, V, VT, K = 3, 6, 8, 4, 5, 11, 13, 7
NONE = -100

# Row 0 has a label before the first pair, row 1 an unpaired end, row 2 no label at all.
LABELS = torch.tensor([[NONE, 3, 4, 5, 6, 7], [1, 2, 3, NONE, 5, 6], [NONE] * T])
POSITIONS = torch.tensor([[9, -1, 1, 2, -1, 6], [0, -1, 3, -1, 4, -1], [7] * T])
TEACHER_LABELS = torch.tensor(
    [[1, 2, 3, 4, 5, 6, NONE, NONE], [2, 3, 4, NONE, NONE, NONE, 7, 8], [1, 2, NONE, NONE, 3, 4, 5, 6]]
)
# Chunks (row, student's tokens, teacher's tokens) by hand; the last of row 0 has no labeled teacher token.
CHUNKS = [(0, (2,), (1,)), (0, (3, 4), (2, 3, 4, 5)), (1, (0, 1), (0, 1, 2)), (1, (4, 5), (6, 7))]
UNSCORED = [(0, 1), (0, 5), (1, 2)]  # before the first pair; without a labeled teacher token


class Case:
    """Hidden states and heads of two models with inputs of different lengths."""

    def __init__(self, dtype: torch.dtype = torch.float64, teacher: int = V, seed: int = 1) -> None:
        g = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

        self.hidden = randn(B, T, HS).requires_grad_()
        self.head = Head(randn(V, HS).requires_grad_(), randn(V), scale=0.7, softcap=3.0)
        self.teacher, self.teacher_head = randn(B, TT, HT), Head(randn(teacher, HT), randn(teacher))
        self.labels, self.positions = LABELS.clone(), POSITIONS.clone()

    def logits(self) -> tuple[Tensor, Tensor]:
        return logits(self.hidden, self.head), logits(self.teacher, self.teacher_head)

    def both(self, loss: DistillationLoss, **settings: Any) -> list[LossParts]:
        """The loss from logits and from hidden states."""
        settings = {"teacher_positions": self.positions, **settings}
        student, teacher = self.logits()
        return [
            loss.from_logits(student, teacher, self.labels, **settings),
            loss.from_hidden(self.hidden, self.head, self.teacher, self.teacher_head, self.labels, **settings),
        ]

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (self.hidden, self.head.weight), retain_graph=True)

    @property
    def tokens(self) -> list[tuple[int, int]]:
        """Row and position of every label."""
        return [(b, i) for b, i in (self.labels != NONE).nonzero().tolist()]


def same(found: Tensor, expected: Tensor, case: Case, tolerance: float = 1e-9) -> None:
    """Value and gradient are equal."""
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    for a, b in zip(case.gradients(found), case.gradients(expected), strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def slow_positions(case: Case, objective: Divergence, t: float = 1.0, ce: float = 0.0) -> Tensor:
    """The losses of all labels, token by token, [N]."""
    student, teacher = case.logits()
    losses = []
    for b, i in case.tokens:
        s = int(case.positions[b, i])
        log_q = (student[b, i] / t).log_softmax(-1)
        kd = log_q.sum() * 0 if s < 0 else evaluate(objective, (teacher[b, s] / t).log_softmax(-1), log_q)
        losses.append((1 - ce) * t**2 * kd - ce * student[b, i].log_softmax(-1)[case.labels[b, i]])
    return torch.stack(losses)


@pytest.mark.parametrize("objective", [ReverseKL(), SkewKL(), TAID(0.4)], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize(("t", "ce"), [(1.0, 0.0), (2.0, 0.3)])
def test_positions_equal_a_slow_loop(objective: Divergence, t: float, ce: float) -> None:
    case = Case()
    loss = DistillationLoss(objective, ce, t, reduction="sum", monitors={"mine": ForwardKL()}, chunk=3)
    expected = slow_positions(case, objective, t, ce)
    paired = torch.tensor([int(case.positions[b, i]) >= 0 for b, i in case.tokens])
    for parts in case.both(loss):
        same(parts.loss, expected.sum(), case)
        assert parts.values["aligned"].tolist() == paired.tolist()
        assert (parts.values["kd"][~paired] == 0).all()
        assert (parts.values["mine"][~paired] == 0).all()
        torch.testing.assert_close(parts.values["mine"], slow_positions(case, ForwardKL()).detach())
    for parts in case.both(DistillationLoss(objective, ce, t)):
        assert int(parts.divisor) == len(paired)


def test_tokens_without_a_partner_get_no_gradient_from_the_divergence() -> None:
    case = Case(torch.float32)
    for parts in case.both(DistillationLoss(GeneralizedJSD())):
        gradient = torch.autograd.grad(parts.loss, case.hidden)[0].abs().sum(-1)
        paired = (case.positions >= 0) & (case.labels != NONE)
        assert ((gradient > 0) == paired).all()


def test_positions_that_nobody_reads_may_hold_anything() -> None:
    case, found = Case(torch.float32, VT), partial()
    loss = DistillationLoss(ReverseKL(), 0.3, monitors={"mine": GeneralizedJSD()}, diagnostics=True)
    results = []
    for garbage in (0.0, torch.nan, torch.inf):
        read = {(b, int(case.positions[b, i])) for b, i in case.tokens}
        for b in range(B):
            for s in range(TT):
                if (b, s) not in read:
                    case.teacher[b, s] = garbage
        case.positions[0, 2] = -1  # and now row 0 of the flattened teacher is read by tokens without a partner alone
        case.positions[1, 0] = 1
        case.teacher[1, 1] = 0.5
        for parts in case.both(loss, vocabulary_map=found):
            assert all(x.isfinite().all() for x in parts.values.values())
            results.append((parts.loss.float(), *case.gradients(parts.loss)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-6, rtol=1e-5)


def test_its_own_positions_give_the_same_bits() -> None:
    g = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(2, 5, V, generator=g).requires_grad_() for _ in range(2))
    labels = torch.randint(0, V, (2, 5), generator=g)
    labels[0, 2] = NONE
    positions = torch.arange(5).expand(2, 5)
    for reduction in ("token_mean", "sequence_mean", "none"):
        loss = DistillationLoss(SkewKL(), 0.3, 2.0, reduction, monitors={"mine": ReverseKL()}, diagnostics=True)
        plain = loss.from_logits(student, teacher, labels)
        paired = loss.from_logits(student, teacher, labels, teacher_positions=positions)
        assert plain.loss.equal(paired.loss)
        assert all(plain.values[name].equal(paired.values[name]) for name in plain.values)
        gradients = [torch.autograd.grad(x.loss.sum(), student)[0] for x in (plain, paired)]
        assert gradients[0].equal(gradients[1])


def partial() -> VocabularyMap:
    """A map of K of the tokens."""
    g = torch.Generator().manual_seed(5)
    return VocabularyMap(torch.randperm(V, generator=g)[:K], torch.randperm(VT, generator=g)[:K], V, VT)


def outcomes(x: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of the shared tokens and of all others together."""
    log_p = torch.log_softmax(x, -1)
    rest = torch.ones_like(log_p, dtype=torch.bool).index_fill_(0, ids, False)
    return torch.cat([log_p[ids], log_p[rest].logsumexp(-1, keepdim=True)])


def test_positions_with_a_map_equal_a_slow_loop() -> None:
    case, found = Case(teacher=VT), partial()
    student, teacher = case.logits()
    pairs = [(b, i, int(case.positions[b, i])) for b, i in case.tokens if case.positions[b, i] >= 0]
    losses = [
        GeneralizedJSD()(outcomes(teacher[b, s], found.teacher_ids), outcomes(student[b, i], found.student_ids))
        for b, i, s in pairs
    ]
    for parts in case.both(DistillationLoss(GeneralizedJSD(), reduction="sum", chunk=2), vocabulary_map=found):
        same(parts.loss, torch.stack(losses).sum(), case)


def test_positions_in_a_top_k() -> None:
    case, k = Case(), 4
    student, teacher = case.logits()
    known = top_k(teacher.reshape(-1, V), torch.zeros(B * TT, dtype=torch.int64), k)
    ids = known.ids.view(B, TT, k).clone()
    ids[0, 0] = -1  # not read
    known = TopK(ids, known.log_probs.view(B, TT, k).double(), known.log_tail.view(B, TT).double(), V)
    losses = []
    for b, i in case.tokens:
        s = int(case.positions[b, i])
        if s >= 0:
            log_p = torch.cat([known.log_probs[b, s], known.log_tail[b, s, None]])
            losses.append(ReverseKL()(log_p, outcomes(student[b, i], ids[b, s])))
    loss = DistillationLoss(ReverseKL(), reduction="sum", chunk=3)
    parts = loss.from_logits(student, known, case.labels, teacher_positions=case.positions)
    same(parts.loss, torch.stack(losses).sum(), case, 1e-6)


def test_weights_of_tokens_without_a_partner_are_not_counted() -> None:
    case = Case()
    for parts in case.both(DistillationLoss(Weighted(ForwardKL(), StudentEntropyGate(0.0)))):
        sums = parts.token_weights[""]
        assert sums[2] == parts.values["aligned"].sum() == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.double(), "teacher_positions must be integers, got torch.float64"),
        (lambda x: x[:, :-1], "teacher_positions must have the labels' shape [3, 6], got [3, 5]"),
        (
            lambda x: x.index_fill(1, torch.tensor(2), TT),
            "in [0, 8), the positions of the teacher's input, got 8 in row 0",
        ),
        (lambda x: x.index_fill(1, torch.tensor(4), -2), "teacher_positions must be −1 or in [0, 8)"),
        (lambda x: 3, "teacher_positions must be a torch.Tensor, got int 3"),
    ],
)
def test_positions_are_checked(change: Any, message: str) -> None:
    case = Case()
    case.positions = change(case.positions)
    with pytest.raises(ValueError, match=re.escape(message)):
        case.both(DistillationLoss(ForwardKL()))


def test_what_needs_the_teachers_log_probability_of_the_label_is_refused() -> None:
    with pytest.raises(ValueError, match="GapGate cannot be computed with a vocabulary_map or teacher_positions"):
        Case().both(DistillationLoss(Weighted(ForwardKL(), GapGate())))


def test_the_teacher_must_have_the_rows_of_the_labels() -> None:
    case = Case()
    case.teacher = case.teacher[:2]
    with pytest.raises(ValueError, match=r"must have the labels' rows \[3\] and two more dimensions, got \[2, 8, 11\]"):
        case.both(DistillationLoss(ForwardKL()))


# ------------------------------------------------------------------------------------------------------ ChunkLikelihood
def slow_chunks(case: Case, objective: ChunkLikelihood, t: float = 1.0) -> list[Tensor]:
    """The values of all chunks, from the definition."""
    student, teacher = ((x / t).log_softmax(-1) for x in case.logits())
    values = []
    for b, own, others in CHUNKS:
        s = torch.stack([student[b, i, case.labels[b, i]] for i in own]).sum() / objective.tau
        labels = [(i, int(TEACHER_LABELS[b, i])) for i in others if TEACHER_LABELS[b, i] != NONE]
        p = torch.stack([teacher[b, i, label] for i, label in labels]).sum() / objective.tau
        two = [torch.stack([x, torch.log(-torch.expm1(x))]) for x in (p.detach(), s)]
        values.append(objective.divergence(*two))
    return values


OBJECTIVES = {
    "forward KL": ChunkLikelihood(),
    "no scale": ChunkLikelihood(tau=1.0),
    "reverse KL": ChunkLikelihood(ReverseKL(), 5.0),
    "JSD": ChunkLikelihood(GeneralizedJSD(0.2), 2.0),
    "alpha": ChunkLikelihood(AlphaDivergence(0.5), 3.0),
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
@pytest.mark.parametrize("t", [1.0, 1.5])
@pytest.mark.parametrize("mapped", [False, True])
def test_chunks_equal_a_slow_loop(objective: ChunkLikelihood, t: float, mapped: bool) -> None:
    case = Case(teacher=VT if mapped else V)
    settings: dict[str, Any] = {"teacher_labels": TEACHER_LABELS}
    if mapped:
        settings["vocabulary_map"] = partial()
    expected = slow_chunks(case, objective, t)
    for parts in case.both(DistillationLoss(objective, temperature=t, reduction="sum", chunk=3), **settings):
        same(parts.loss, t**2 * torch.stack(expected).sum(), case)
        values = dict(zip(case.tokens, parts.values["kd"], strict=True))
        for (b, own, _), value in zip(CHUNKS, expected, strict=True):
            for i in own:  # spread over the tokens of the chunk
                torch.testing.assert_close(values[b, i], t**2 * value.detach() / len(own))
        assert all(values[token] == 0 for token in UNSCORED)


def test_chunks_equal_finite_differences() -> None:
    case = Case()
    loss = DistillationLoss(ChunkLikelihood(tau=4.0), reduction="sum")
    student, teacher = (x.detach() for x in case.logits())

    def value(x: Tensor) -> Tensor:
        return loss.from_logits(x, teacher, case.labels, None, TEACHER_LABELS, None, case.positions).loss

    student.requires_grad_()
    (gradient,) = torch.autograd.grad(value(student), student)
    for index in ((0, 3, 1), (0, 4, 6), (1, 0, 1), (1, 5, 2), (0, 1, 3)):
        step = torch.zeros_like(student)
        step[index] = 1e-5
        slope = (value((student + step).detach()) - value((student - step).detach())) / 2e-5
        torch.testing.assert_close(gradient[index], slope, atol=1e-9, rtol=1e-5)


@pytest.mark.parametrize("mapped", ["no map", "both sides", "the student's", "the teacher's"])
def test_beside_a_divergence(mapped: str) -> None:
    case = Case(teacher=V if mapped == "no map" else VT)
    order = torch.arange(VT)
    found = {
        "no map": None,
        "both sides": partial(),
        "the student's": VocabularyMap(order[:K], order[:K], V, K),
        "the teacher's": VocabularyMap(order[:V], order[:V].flip(0), V, VT),
    }[mapped]
    teacher_labels = TEACHER_LABELS if mapped != "the student's" else TEACHER_LABELS.clamp_max(K - 1)
    chunks, other = ChunkLikelihood(tau=3.0), GeneralizedJSD()
    settings = {"teacher_labels": teacher_labels, "vocabulary_map": found}
    for ce in (0.0, 0.25):
        for reduction in ("sum", "sequence_mean"):
            parts = [
                case.both(DistillationLoss(objective, ce, 1.3, reduction), **settings)
                for objective in (WeightedSum([other, chunks], [0.5, 2.0]), other, chunks)
            ]
            for together, alone, likelihood in zip(*parts, strict=True):
                a, b = alone.values["kd"], likelihood.values["kd"]
                torch.testing.assert_close(together.values["kd"], 0.5 * a + 2 * b)
                gradients = [case.gradients(x.loss) for x in (together, alone, likelihood)]
                if ce == 0:
                    for x, y, z in zip(*gradients, strict=True):
                        torch.testing.assert_close(x, 0.5 * y + 2 * z)


def test_a_token_is_a_chunk_in_one_tokenization() -> None:
    """Binary KL of the labels' probabilities, as plain arithmetic."""
    g = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(2, 4, V, generator=g, dtype=torch.float64) for _ in range(2))
    labels, positions = torch.randint(0, V, (2, 4), generator=g), torch.arange(4).expand(2, 4)
    loss = DistillationLoss(ChunkLikelihood(tau=1.0), reduction="none")
    found = loss.from_logits(student, teacher, labels, None, labels, None, positions).loss
    for b in range(2):
        for i in range(4):
            p, q = (float(x[b, i].softmax(-1)[labels[b, i]]) for x in (teacher, student))
            assert float(found[b, i]) == pytest.approx(kl([p, 1 - p], [q, 1 - q]))
    both = loss.from_logits(teacher, teacher, labels, None, labels, None, positions).loss
    assert both.abs().max() < 1e-15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [1.0, 100.0])
def test_certain_and_impossible_chunks_are_finite(dtype: torch.dtype, tau: float) -> None:
    labels, positions = torch.zeros(1, 4, dtype=torch.int64), torch.arange(4).unsqueeze(0)
    certain, impossible = [1e4, 0.0, 0.0], [-torch.inf, 0.0, 0.0]
    rows = {
        "student": [certain, impossible, certain, impossible],
        "teacher": [certain, impossible, impossible, certain],
    }
    student, teacher = (torch.tensor([x], dtype=dtype, requires_grad=True) for x in rows.values())
    for divergence in (ForwardKL(), ReverseKL(), GeneralizedJSD()):
        loss = DistillationLoss(ChunkLikelihood(divergence, tau), reduction="none")
        parts = loss.from_logits(student, teacher, labels, None, labels, None, positions)
        assert parts.values["kd"].isfinite().all()
        torch.testing.assert_close(parts.values["kd"][:2], torch.zeros(2, dtype=dtype), atol=1e-5, rtol=0)
        assert (parts.values["kd"][2:] > 1e-3).all()
        assert torch.autograd.grad(parts.loss.sum(), student)[0].isfinite().all()


def test_bf16_and_reductions_of_functions() -> None:
    case = Case(torch.bfloat16)
    objective = ChunkLikelihood(tau=3.0)
    settings: dict[str, Any] = {
        "objective": objective, "teacher_labels": TEACHER_LABELS, "teacher_positions": case.positions
    }  # fmt: skip
    expected = torch.stack(slow_chunks(case, objective)).sum()
    hidden = (case.hidden, case.head, case.teacher, case.teacher_head, case.labels)
    summed = fused_distillation_loss(*hidden, **settings, reduction="sum")
    assert summed.dtype == torch.float32
    torch.testing.assert_close(summed.double(), expected, atol=1e-6, rtol=1e-4)
    for found, exact in zip(case.gradients(summed), case.gradients(expected), strict=True):
        assert found.dtype == torch.bfloat16
        assert (found - exact).norm() < 0.01 * exact.norm()
    tokens = fused_distillation_loss(*hidden, **settings, reduction="none")
    assert tokens.shape == (B, T)
    torch.testing.assert_close(tokens.sum(), summed)
    for found, exact in zip(case.gradients(tokens.sum()), case.gradients(summed), strict=True):
        torch.testing.assert_close(found, exact, atol=1e-3, rtol=0.02)
    student, teacher = case.logits()
    torch.testing.assert_close(distillation_loss(student, teacher, case.labels, **settings), expected / 10)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("mapped", [False, True])
def test_compiled_chunks_agree(mapped: bool) -> None:
    case = Case(torch.float32, VT if mapped else V)
    objective = WeightedSum([ReverseKL(), ChunkLikelihood(tau=3.0)], [1.0, 2.0])
    results = []
    for compiled in (False, True):
        loss = DistillationLoss(objective, 0.2, 1.5, compile=compiled)
        parts = case.both(loss, teacher_labels=TEACHER_LABELS, vocabulary_map=partial() if mapped else None)[1]
        assert loss.token_loss.is_compiled == compiled
        results.append((parts.loss, parts.values, case.gradients(parts.loss)))
    torch.testing.assert_close(results[0], results[1], atol=2e-6, rtol=1e-5)


def test_monitors_of_chunks() -> None:
    case = Case()
    loss = DistillationLoss(ForwardKL(), monitors={"chunks": ChunkLikelihood()})
    for parts in case.both(loss, teacher_labels=TEACHER_LABELS):
        expected = torch.stack(slow_chunks(case, ChunkLikelihood())).sum()
        torch.testing.assert_close(parts.values["chunks"].sum(), expected.detach())
    with pytest.raises(ValueError, match=r"a monitor with ChunkLikelihood needs temperature 1, got 2.0"):
        DistillationLoss(ForwardKL(), temperature=2.0, monitors={"chunks": ChunkLikelihood()})


def test_what_chunks_need_is_named() -> None:
    case = Case()
    loss = DistillationLoss(WeightedSum([ForwardKL(), ChunkLikelihood()], [1.0, 1.0]))
    with pytest.raises(ValueError, match="teacher_labels must be given for ChunkLikelihood, got None"):
        case.both(loss)
    with pytest.raises(ValueError, match="teacher_positions must be given for ChunkLikelihood, got None"):
        loss.from_logits(*(x[:, :T] for x in case.logits()), case.labels)
    with pytest.raises(ValueError, match=r"shape of the teacher's tokens \[3, 8\], got \[3, 7\]"):
        case.both(loss, teacher_labels=TEACHER_LABELS[:, 1:])
    with pytest.raises(
        ValueError, match=r"teacher_labels must be −100 or in \[0, 11\), the teacher's vocabulary, got 11"
    ):
        case.both(loss, teacher_labels=TEACHER_LABELS.masked_fill(TEACHER_LABELS == 8, V))
    case.positions[0, 3] = 1
    with pytest.raises(ValueError, match="must increase within a row for ChunkLikelihood, got 1 before 1 in row 0"):
        case.both(loss, teacher_labels=TEACHER_LABELS)
    known = TopK(torch.zeros(B, TT, 1, dtype=torch.int64), torch.zeros(B, TT, 1), torch.zeros(B, TT), V)
    with pytest.raises(ValueError, match="ChunkLikelihood cannot be computed from a teacher's top-k"):
        loss.from_logits(case.logits()[0], known, case.labels, None, TEACHER_LABELS, None, POSITIONS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ChunkLikelihood(tau=0.0), "tau must be a finite number > 0, got 0.0"),
        (
            lambda: ChunkLikelihood(SkewKL()),
            "divergence must be an f-divergence that is not made of others, got SkewKL",
        ),
        (lambda: ChunkLikelihood(3), "divergence must be a Divergence, got 3"),  # type: ignore[arg-type]
        (
            lambda: Objective(ChunkLikelihood(), ArithmeticMixture(0.3), ("teacher", "assistant")),
            "divergence must not contain ChunkLikelihood with an assistant",
        ),
    ],
)
def test_bad_arguments_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_a_missing_column_is_named() -> None:
    with pytest.raises(ValueError, match="missing column 'chunk_teacher' in rows, which ChunkLikelihood reads"):
        ChunkLikelihood()(torch.zeros(2, 3), torch.zeros(2, 3))


def test_origins_take_their_own_objective() -> None:
    case = Case()
    loss = DistillationLoss(Contrastive(ForwardKL(), ChunkLikelihood()), reduction="sum")
    for parts in case.both(loss, teacher_labels=TEACHER_LABELS, rows={"source": torch.tensor([2, 1, 1])}):
        expected = torch.stack(slow_chunks(case, ChunkLikelihood())[:2]).sum()
        rows = torch.tensor([b for b, _ in case.tokens])
        torch.testing.assert_close(parts.values["kd"][rows == 0].sum(), expected.detach())
        assert parts.values["kd"][rows == 1].sum() > 0


def test_no_labels_at_all() -> None:
    case = Case()
    case.labels[:] = NONE
    for parts in case.both(DistillationLoss(ChunkLikelihood()), teacher_labels=TEACHER_LABELS):
        assert float(parts.mean.detach()) == 0
    case = Case()
    for parts in case.both(DistillationLoss(ChunkLikelihood()), teacher_labels=torch.full_like(TEACHER_LABELS, NONE)):
        assert float(parts.mean.detach()) == 0
        assert math.isfinite(sum(float(x.abs().sum()) for x in case.gradients(parts.mean)))
