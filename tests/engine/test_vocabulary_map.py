"""Teachers with another vocabulary: permuted, partial and one-sided maps against slow loops, on both paths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kd_lightning import (
    TAID,
    AdaptiveKL,
    AlphaBeta,
    AMiD,
    DistillationLoss,
    Divergence,
    ForwardKL,
    GapGate,
    GeneralizedJSD,
    Head,
    LossParts,
    OnSupport,
    ReverseKL,
    SampledReverseKL,
    SkewKL,
    SkewReverseKL,
    SymmetricKL,
    TeacherEntropyGate,
    ToDi,
    TotalVariation,
    VocabularyMap,
    Weighted,
    WeightedSum,
    distillation_loss,
    fused_distillation_loss,
)
from kd_lightning.divergences import evaluate
from kd_lightning.engine.top_k import TopK, top_k
from tests.leaves import ALL, Leaf
from tests.support.slow_reference import logits

B, T, HS, HT = 2, 4, 5, 6
VS, VT, K = 11, 13, 7

MERGEABLE: dict[str, Divergence] = {
    "forward": ForwardKL(),
    "reverse": ReverseKL(),
    "symmetric": SymmetricKL(0.3),
    "JSD": GeneralizedJSD(0.3),
    "total variation": TotalVariation(),
    "alpha-beta that add up to 1": AlphaBeta(0.25, 0.75),
    "ToDi": ToDi(),
    "SKL": SkewKL(0.1),
    "SRKL, detached": SkewReverseKL(0.1, detach_assistant=True),
    "TAID": TAID(0.4),
    "AMiD": AMiD(ReverseKL(), 0.5, 0.3),
    "AMiD, harmonic": AMiD(ForwardKL(), 3.0, 0.4, ("assistant", "student")),
    "sum": WeightedSum([ForwardKL(), TAID(0.7)], [0.5, 2.0]),
}


class Case:
    """Hidden states and heads of two models whose vocabularies differ."""

    def __init__(self, dtype: torch.dtype = torch.float64, student: int = VS, teacher: int = VT, seed: int = 1) -> None:
        g = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

        self.hidden = randn(B, T, HS).requires_grad_()
        self.head = Head(randn(student, HS).requires_grad_(), randn(student), scale=0.7, softcap=3.0)
        self.teacher = randn(B, T, HT)
        self.teacher_head = Head(randn(teacher, HT), randn(teacher), scale=-1.3, softcap=4.0)
        self.labels = torch.randint(0, student, (B, T), generator=g)
        self.labels[0, 1] = -100

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        return self.hidden, self.head.weight

    def logits(self) -> tuple[Tensor, Tensor]:
        return logits(self.hidden, self.head), logits(self.teacher, self.teacher_head)

    def both(self, loss: DistillationLoss, **settings: Any) -> list[LossParts]:
        """The loss from logits and from hidden states."""
        student, teacher = self.logits()
        return [
            loss.from_logits(student, teacher, self.labels, **settings),
            loss.from_hidden(self.hidden, self.head, self.teacher, self.teacher_head, self.labels, **settings),
        ]

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, self.inputs, retain_graph=True)


def pairs(student: int = VS, teacher: int = VT, count: int = K, seed: int = 5) -> VocabularyMap:
    """A random map."""
    g = torch.Generator().manual_seed(seed)
    ids = (torch.randperm(size, generator=g)[:count] for size in (student, teacher))
    return VocabularyMap(*ids, student, teacher)


def outcomes(x: Tensor, ids: Tensor, t: float) -> Tensor:
    """Log-probabilities of the K shared tokens and of all others together, from the logits of one token."""
    log_p = torch.log_softmax(x / t, -1)
    rest = torch.ones_like(log_p, dtype=torch.bool)
    rest[ids] = False
    return torch.cat([log_p[ids], log_p[rest].logsumexp(-1, keepdim=True)])


def conditioned(x: Tensor, ids: Tensor, t: float) -> Tensor:
    """Log-probabilities of the shared tokens given that it is one of them."""
    return torch.log_softmax(x[ids] / t, -1)


def slow(case: Case, found: VocabularyMap, objective: Divergence, t: float = 1.0, ce: float = 0.0) -> list[Tensor]:
    """Losses of the labels in float64, token by token."""
    student, teacher = case.logits()
    student, teacher = student[..., : found.student_size], teacher[..., : found.teacher_size]
    view = outcomes if found.has_rest else conditioned
    losses = []
    for b, i in (case.labels != -100).nonzero().tolist():
        p, q = view(teacher[b, i], found.teacher_ids, t), view(student[b, i], found.student_ids, t)
        nll = -student[b, i].log_softmax(-1)[case.labels[b, i]]
        losses.append((1 - ce) * t**2 * evaluate(objective, p, q) + ce * nll)
    return losses


def same(found: Tensor, expected: Tensor, case: Case, tolerance: float = 1e-9) -> None:
    """Value and gradient are equal."""
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    for a, b in zip(case.gradients(found), case.gradients(expected), strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_identity_gives_the_bits_of_the_plain_loss(dtype: torch.dtype) -> None:
    case, ids = Case(dtype, VS, VS), torch.arange(VS)
    same_vocabulary = VocabularyMap(ids, ids, VS, VS)
    assert same_vocabulary.is_identity
    for objective in (SkewKL(), AdaptiveKL(), Weighted(ReverseKL(), GapGate())):
        loss = DistillationLoss(objective, 0.3, 2.0, diagnostics=True)
        for plain, mapped in zip(case.both(loss), case.both(loss, vocabulary_map=same_vocabulary), strict=True):
            assert plain.loss.equal(mapped.loss)
            assert plain.values.keys() == mapped.values.keys()
            assert all(a.equal(b) for a, b in zip(plain.values.values(), mapped.values.values(), strict=True))
            gradients = (case.gradients(x.loss) for x in (plain, mapped))
            assert all(a.equal(b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("leaf", ALL.values(), ids=ALL.keys())
def test_a_permutation_gives_the_plain_loss_of_the_permuted_teacher(leaf: Leaf) -> None:
    case, order = Case(torch.float64, VS, VS), torch.randperm(VS)
    permuted = VocabularyMap(torch.arange(VS), order, VS, VS)
    rows = leaf.columns(torch.zeros(B, T, VS, dtype=torch.float64))
    loss = DistillationLoss(leaf.make(), 0.2, 1.5)
    found = case.both(loss, rows=rows, vocabulary_map=permuted)
    case.teacher_head = Head(case.teacher_head.weight[order], case.teacher_head.bias[order], -1.3, 4.0)  # type: ignore[index]
    for mapped, plain in zip(found, case.both(loss, rows=rows), strict=True):
        same(mapped.loss, plain.loss, case, 1e-12)
        assert mapped.values["aligned"].all()
        assert mapped.values["label_aligned"].all()


@pytest.mark.parametrize("objective", MERGEABLE.values(), ids=MERGEABLE.keys())
@pytest.mark.parametrize(("t", "ce"), [(1.0, 0.0), (2.5, 0.3)])
def test_a_partial_map_equals_a_slow_loop_over_k_plus_one_outcomes(objective: Divergence, t: float, ce: float) -> None:
    case, found = Case(), pairs()
    assert found.has_rest
    loss = DistillationLoss(objective, ce, t, reduction="sum", monitors={"mine": ForwardKL()}, chunk=3)
    expected = torch.stack(slow(case, found, objective, t, ce)).sum()
    monitor = torch.stack(slow(case, found, ForwardKL()))
    for parts in case.both(loss, vocabulary_map=found):
        same(parts.loss, expected, case)
        torch.testing.assert_close(parts.values["mine"], monitor.detach())


@pytest.mark.parametrize(("student", "teacher"), [(VS, K), (K, VT)], ids=["the student's", "the teacher's"])
@pytest.mark.parametrize(
    "objective", [ReverseKL(), AdaptiveKL(), AlphaBeta(0.3, 0.4), TAID(0.4)], ids=lambda x: type(x).__name__
)
def test_where_one_side_has_more_tokens_both_are_conditioned(student: int, teacher: int, objective: Divergence) -> None:
    case, found = Case(student=student, teacher=teacher), pairs(student, teacher)
    assert found.is_one_sided
    for t, ce in ((1.0, 0.0), (2.0, 0.4)):
        loss = DistillationLoss(objective, ce, t, reduction="sum", diagnostics=True, chunk=3)
        expected = torch.stack(slow(case, found, objective, t, ce)).sum()
        for parts in case.both(loss, vocabulary_map=found):
            same(parts.loss, expected, case)
            nll = -case.logits()[0].log_softmax(-1)[case.labels != -100]
            nll = nll.gather(-1, case.labels[case.labels != -100].unsqueeze(-1)).squeeze(-1)
            torch.testing.assert_close(parts.values["student_nll"], nll.detach())


def test_merging_outcomes_is_a_lower_bound() -> None:
    case, order = Case(torch.float64, VS, VS), torch.randperm(VS)
    full = VocabularyMap(torch.arange(VS), order, VS, VS)
    part = VocabularyMap(torch.arange(K), order[:K], VS, VS)
    for name, objective in MERGEABLE.items():
        if objective.not_f_divergence() is None:
            loss = DistillationLoss(objective, temperature=1.7)
            for fine, coarse in zip(
                case.both(loss, vocabulary_map=full), case.both(loss, vocabulary_map=part), strict=True
            ):
                assert (coarse.values["kd"] <= fine.values["kd"] + 1e-12).all(), name
                assert coarse.values["kd"].sum() < fine.values["kd"].sum() - 1e-3, name


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "none"])
def test_reductions(reduction: str) -> None:
    case, found = Case(), pairs()
    losses, counts = slow(case, found, ReverseKL(), 1.0, 0.25), [T - 1, T]
    rows = [torch.stack(losses[: counts[0]]), torch.stack(losses[counts[0] :])]
    expected = {
        "token_mean": torch.cat(rows).mean(),
        "sequence_mean": torch.stack([row.mean() for row in rows]).mean(),
        "none": torch.cat(rows).square().sum(),
    }[reduction]
    settings: dict[str, Any] = {
        "objective": ReverseKL(), "ce_weight": 0.25, "reduction": reduction, "vocabulary_map": found
    }  # fmt: skip
    student, teacher = case.logits()
    for loss in (
        distillation_loss(student, teacher, case.labels, **settings),
        fused_distillation_loss(case.hidden, case.head, case.teacher, case.teacher_head, case.labels, **settings),
    ):
        same(loss if loss.ndim == 0 else loss.square().sum(), expected, case)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("sizes", [(VS, VT), (VS, K), (K, VT)], ids=str)
def test_compiled_blocks_agree(sizes: tuple[int, int]) -> None:
    case, found = Case(torch.float32, *sizes), pairs(*sizes)
    positions = torch.tensor([[0, 1, -1, 3], [-1, 2, 2, 0]])
    results = []
    for compiled in (False, True):
        loss = DistillationLoss(
            GeneralizedJSD(), 0.3, 2.0, monitors={"mine": ReverseKL()}, diagnostics=True, compile=compiled
        )
        parts = loss.from_hidden(
            case.hidden, case.head, case.teacher, case.teacher_head, case.labels,
            vocabulary_map=found, teacher_positions=positions,
        )  # fmt: skip
        assert loss.token_loss.is_compiled == compiled
        results.append((parts.loss, parts.values, case.gradients(parts.loss)))
    torch.testing.assert_close(results[0], results[1], atol=2e-6, rtol=1e-5)


def test_bf16_returns_a_value_in_fp32_and_gradients_in_bf16() -> None:
    case, found = Case(torch.bfloat16), pairs()
    parts = case.both(DistillationLoss(GeneralizedJSD(), 0.2), vocabulary_map=found)[1]
    expected = torch.stack(slow(case, found, GeneralizedJSD(), 1.0, 0.2)).mean()
    assert parts.loss.dtype == torch.float32
    torch.testing.assert_close(parts.mean.double(), expected, atol=1e-6, rtol=1e-5)
    for a, b in zip(case.gradients(parts.mean), case.gradients(expected), strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - b).norm() < 0.01 * b.norm()


@pytest.mark.parametrize("garbage", [1e4, -1e4, -torch.inf])
def test_padding_columns_do_not_matter(garbage: float) -> None:
    case, found = Case(torch.float32), pairs()
    loss = DistillationLoss(GeneralizedJSD(), 0.3, diagnostics=True)
    student, teacher = (x.detach().float() for x in case.logits())

    def padded(x: Tensor) -> Tensor:
        return torch.cat([x, torch.full((B, T, 3), garbage)], -1).requires_grad_()

    results = []
    for a, b in ((student.requires_grad_(), teacher), (padded(student), padded(teacher))):
        parts = loss.from_logits(a, b, case.labels, vocabulary_map=found)
        results.append((parts.loss, parts.values, torch.autograd.grad(parts.loss, a)[0][..., :VS]))
    torch.testing.assert_close(results[0], results[1], atol=0, rtol=0)


@pytest.mark.parametrize("scale", [30.0, 3000.0])
def test_large_logits_cost_no_precision(scale: float) -> None:
    """In fp32, against the same numbers in float64."""
    case, found = Case(), pairs()
    student, teacher = (x.detach().float() for x in case.logits())
    teacher = (teacher + scale * torch.randn(B, T, 1)).requires_grad_(False)
    values = []
    for dtype in (torch.float32, torch.float64):
        loss = DistillationLoss(ForwardKL(), temperature=1.5)
        values.append(loss.from_logits(student.to(dtype), teacher.to(dtype), case.labels, vocabulary_map=found).values)
    torch.testing.assert_close(values[0]["kd"].double(), values[1]["kd"], atol=1e-6, rtol=1e-5)


def test_tokens_that_a_model_rules_out_are_no_fault() -> None:
    case, found = Case(), pairs()
    student, teacher = (x.detach().clone() for x in case.logits())
    teacher[..., found.teacher_ids[0]] = -torch.inf
    teacher[0, :, found.teacher_rest] = -torch.inf
    student[1, :, found.student_rest] = -torch.inf
    student[..., found.student_ids[1]] = -torch.inf
    case.labels[:] = found.student_ids[2]
    student.requires_grad_()
    for objective in (ReverseKL(), GeneralizedJSD(), TotalVariation()):
        parts = DistillationLoss(objective).from_logits(student, teacher, case.labels, vocabulary_map=found)
        assert parts.values["kd"].isfinite().all()
        assert torch.autograd.grad(parts.loss, student)[0].isfinite().all()


def test_diagnostics_are_of_the_tokens_with_a_partner() -> None:
    case, found = Case(), pairs()
    student, teacher = (x.detach() for x in case.logits())
    for parts in case.both(DistillationLoss(ForwardKL(), diagnostics=True), vocabulary_map=found):
        n = 0
        for b, i in (case.labels != -100).nonzero().tolist():
            label = int(case.labels[b, i])
            partners = dict(zip(found.student_ids.tolist(), found.teacher_ids.tolist(), strict=True))
            nll = -float(teacher[b, i].log_softmax(-1)[partners[label]]) if label in partners else 0.0
            agree = partners.get(int(student[b, i].argmax())) == int(teacher[b, i].argmax())
            assert float(parts.values["teacher_nll"][n]) == pytest.approx(nll)
            assert bool(parts.values["agreement"][n]) == agree
            assert bool(parts.values["label_aligned"][n]) == (label in partners)
            n += 1


@pytest.mark.parametrize("sizes", [(VS, VT, K), (VS, K, K), (K, VT, K), (VS, VS, VS)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mass_of_the_shared_tokens_equals_a_slow_loop(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    case, found = Case(dtype, *sizes[:2]), pairs(*sizes)
    positions = torch.tensor([[0, 1, -1, 3], [-1, 2, 2, 0]])
    student, teacher = (x.detach().double() for x in case.logits())
    expected = []
    for b, i in (case.labels != -100).nonzero().tolist():
        if (s := int(positions[b, i])) < 0:
            expected.append((0.0, 0.0))
            continue
        models = (teacher[b, s].exp(), found.teacher_ids), (student[b, i].exp(), found.student_ids)
        expected.append(tuple(sum(float(x[n]) for n in ids) / sum(map(float, x)) for x, ids in models))
    loss = DistillationLoss(ForwardKL(), temperature=2.0, diagnostics=True, chunk=3)
    for parts in case.both(loss, vocabulary_map=found, teacher_positions=positions):
        masses = [parts.values[name].double() for name in ("shared_mass_teacher", "shared_mass_student")]
        torch.testing.assert_close(
            torch.stack(masses, 1),
            torch.tensor(expected, dtype=torch.float64),
            atol=2e-7 if dtype == torch.float32 else 1e-12,
            rtol=1e-6 if dtype == torch.float32 else 1e-12,
        )
    plain = DistillationLoss(ForwardKL())  # a training loss measures nothing
    assert all("shared_mass_teacher" not in parts.values for parts in case.both(plain, vocabulary_map=found))


def test_the_mass_of_shared_tokens_that_a_model_rules_out() -> None:
    case, found = Case(), pairs()
    student, teacher = (x.detach().clone() for x in case.logits())
    teacher[0, :, found.teacher_rest] = -torch.inf
    teacher[1, :, found.teacher_ids[1:]] = -torch.inf
    teacher[1, :, found.teacher_ids[0]] = -1e6
    student[0, :, found.student_rest] = -torch.inf
    student[1, :, found.student_ids] = -torch.inf
    case.labels[:] = found.student_ids[0]
    values = (
        DistillationLoss(ForwardKL(), diagnostics=True)
        .from_logits(student, teacher, case.labels, vocabulary_map=found)
        .values
    )
    for name in ("shared_mass_teacher", "shared_mass_student"):
        assert values[name].tolist() == pytest.approx([1.0] * T + [0.0] * T)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (AdaptiveKL(), "AdaptiveKL"),
        (AlphaBeta(0.3, 0.4), "AlphaBeta"),
        (OnSupport(ForwardKL(), 3), "OnSupport"),
        (AMiD(AlphaBeta(0.3, 0.4), 0.5, 0.5), "AlphaBeta"),
        (Weighted(ForwardKL(), TeacherEntropyGate(1.0)), "Weighted .its weight is TeacherEntropyGate"),
        (WeightedSum([ForwardKL(), AdaptiveKL()], [1.0, 1.0]), "AdaptiveKL"),
    ],
)
def test_what_changes_if_tokens_are_merged_is_refused(objective: Divergence, message: str) -> None:
    case = Case()
    for loss in (DistillationLoss(objective), DistillationLoss(ForwardKL(), monitors={"mine": objective})):
        with pytest.raises(ValueError, match=f"{message}.* cannot be computed where both vocabularies"):
            case.both(loss, vocabulary_map=pairs())
    case = Case(student=K)  # every token of the student has a partner
    case.both(DistillationLoss(objective), vocabulary_map=pairs(K, VT))


def test_what_reads_the_teachers_log_probability_of_the_label_is_refused() -> None:
    case = Case()
    for loss in (
        DistillationLoss(Weighted(ForwardKL(), GapGate())),
        DistillationLoss(ForwardKL(), 0.5, label_loss=SampledReverseKL()),
        DistillationLoss(ForwardKL(), monitors={"mine": Weighted(ForwardKL(), GapGate())}),
    ):
        with pytest.raises(ValueError, match=r"(GapGate|SampledReverseKL) cannot be computed with a vocabulary_map"):
            case.both(loss, vocabulary_map=pairs())
        case.both(loss, vocabulary_map=pairs(), rows={"teacher_log_prob": torch.full((B, T), -1.0)})


def test_a_top_k_in_the_teachers_vocabulary() -> None:
    case, found, k = Case(), pairs(), 4
    student, teacher = case.logits()
    known = top_k(teacher.reshape(-1, VT), torch.zeros(B * T, dtype=torch.int64), k)
    partners = found.student_of_teacher
    ids = known.ids.clone()
    ids[0] = found.teacher_rest[:k]  # nothing that the student has
    known = TopK(ids.view(B, T, k), known.log_probs.view(B, T, k).double(), known.log_tail.view(B, T).double(), VT)
    losses = []
    for b, i in (case.labels != -100).nonzero().tolist():
        mapped = partners[known.ids[b, i]]
        inside = mapped >= 0
        tail = torch.cat([known.log_tail[b, i, None], known.log_probs[b, i][~inside]]).logsumexp(0, keepdim=True)
        log_p = torch.cat([known.log_probs[b, i][inside], tail])
        log_q = outcomes(student[b, i], mapped[inside], 1.0)
        losses.append(ReverseKL()(log_p, log_q))
    loss = DistillationLoss(ReverseKL(), reduction="sum", chunk=3)
    for parts in (
        loss.from_logits(student, known, case.labels, vocabulary_map=found),
        loss.from_hidden(case.hidden, case.head, known, None, case.labels, vocabulary_map=found),
    ):
        same(parts.loss, torch.stack(losses).sum(), case, 1e-6)
    with pytest.raises(ValueError, match="AdaptiveKL cannot be computed where"):
        DistillationLoss(AdaptiveKL()).from_logits(student, known, case.labels, vocabulary_map=found)


def test_maps_are_checked() -> None:
    ids = torch.tensor([0, 2])
    for arguments, message in (
        ((ids.int(), ids, 3, 3), "student_ids must be an int64 tensor .K., got torch.int32"),
        ((ids, ids[:1], 3, 3), "same length, at least 1, got 2 and 1"),
        ((ids[:0], ids[:0], 3, 3), "same length, at least 1, got 0 and 0"),
        ((ids, ids, 3, 2), r"teacher_ids must be in \[0, 2\), got 2"),
        ((torch.tensor([1, 1]), ids, 3, 3), "student_ids must contain each token at most once, got 1 twice"),
        ((ids, ids, 3.0, 3), "student_size must be an integer ≥ 1, got 3.0"),
    ):
        with pytest.raises(ValueError, match=message):
            VocabularyMap(*arguments)  # type: ignore[arg-type]
    found = VocabularyMap(ids, ids.flip(0), 4, 3)
    assert (found.student_unmapped, found.teacher_unmapped, found.has_rest, found.is_one_sided) == (1, 1, 1, 0)
    assert found.student_rest.tolist() == [1, 3]
    assert found.teacher_rest.tolist() == [1]
    assert found.student_of_teacher.tolist() == [2, -1, 0]
    assert found.to("cpu") is found
    assert not found.is_identity


def test_vocabularies_must_contain_the_map() -> None:
    case = Case()
    with pytest.raises(
        ValueError, match="teacher_size of the vocabulary_map must be at most the teacher's vocabulary 13"
    ):
        case.both(DistillationLoss(ForwardKL()), vocabulary_map=pairs(VS, VT + 1))
    with pytest.raises(ValueError, match="vocabulary_map must be a VocabularyMap or None, got 3"):
        case.both(DistillationLoss(ForwardKL()), vocabulary_map=3)
    case.labels[0, 0] = VS - 1
    with pytest.raises(ValueError, match=r"labels must be −100 or in \[0, 10\)"):
        case.both(DistillationLoss(ForwardKL()), vocabulary_map=pairs(VS - 1, VT))
