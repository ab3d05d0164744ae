"""Metrics equal slow float64 loops over tokens, for any split over batches and ranks."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

import processes
from kd_lightning.divergences import Divergence, ForwardKL, GeneralizedJSD, ReverseKL, TotalVariation
from kd_lightning.functional import calibration_error
from kd_lightning.metrics.per_token import (
    NLL,
    Agreement,
    BeatsTeacher,
    CalibrationError,
    DivergenceMetric,
    Entropy,
    TokenMean,
)
from metric_cases import V, case

NAMES = (
    *("forward_kl", "reverse_kl", "jsd", "total_variation", "teacher_nll", "agreement", "top_3_agreement", "entropy"),
    *("beats_teacher", "calibration_error"),
)


def metrics() -> dict[str, Metric]:
    return {
        "forward_kl": DivergenceMetric(ForwardKL()),
        "reverse_kl": DivergenceMetric(ReverseKL()),
        "jsd": DivergenceMetric(GeneralizedJSD(0.5)),
        "total_variation": DivergenceMetric(TotalVariation()),
        "teacher_nll": NLL(),
        "agreement": Agreement(),
        "top_3_agreement": Agreement(top_k=3),
        "entropy": Entropy(),
        "beats_teacher": BeatsTeacher(),
        "calibration_error": CalibrationError(bins=4),
    }


def add(name: str, metric: Metric, log_p: Tensor, log_q: Tensor, labels: Tensor) -> None:
    if name in ("teacher_nll", "calibration_error"):
        metric.update(log_p, labels)
    elif name == "entropy":
        metric.update(log_q, labels)
    else:
        metric.update(log_p, log_q, labels)


def of_token(name: str, p: list[float], q: list[float], label: int) -> float:
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]

    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    def first(x: list[float], k: int) -> set[int]:
        return set(sorted(range(len(x)), key=lambda i: -x[i])[:k])

    return {
        "top_3_agreement": len(first(p, 3) & first(q, 3)) / 3,
        "beats_teacher": float(q[label] > p[label]),
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jsd": (kl(p, m) + kl(q, m)) / 2,
        "total_variation": sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2,
        "teacher_nll": -math.log(p[label]),
        "agreement": float(p.index(max(p)) == q.index(max(q))),
        "entropy": -sum(b * math.log(b) for b in q),
    }[name]


def slow(name: str, log_p: Tensor, log_q: Tensor, labels: Tensor) -> float:
    if name == "calibration_error":
        return slow_calibration_error(log_p[labels != -100].double().exp().tolist(), labels[labels != -100].tolist())
    values = [
        of_token(name, log_p[i, t].double().exp().tolist(), log_q[i, t].double().exp().tolist(), int(labels[i, t]))
        for i in range(labels.shape[0])
        for t in range(labels.shape[1])
        if labels[i, t] != -100
    ]
    return sum(values) / len(values)


def slow_calibration_error(p: list[list[float]], labels: list[int], bins: int = 4) -> float:
    error = 0.0
    for b in range(bins):
        inside = [i for i in range(len(p)) if b / bins < max(p[i]) <= (b + 1) / bins]
        right = sum(p[i].index(max(p[i])) == labels[i] for i in inside)
        error += abs(right - sum(max(p[i]) for i in inside)) / len(p)
    return error


@pytest.mark.parametrize("name", NAMES)
def test_equals_a_slow_loop_over_counted_tokens(name: str) -> None:
    metric = metrics()[name]
    add(name, metric, *case())
    assert metric.compute().item() == pytest.approx(slow(name, *case()), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_unequal_batches_equal_the_whole(name: str) -> None:
    whole, split = metrics()[name], metrics()[name]
    parts = [case(1, 9, seed=1), case(4, 3, seed=2), case(2, 6, seed=3)]
    for part in parts:
        add(name, split, *part)
    flat = [torch.cat([part[i].flatten(0, 1) for part in parts]) for i in range(3)]
    add(name, whole, *flat)
    assert split.compute().item() == pytest.approx(whole.compute().item(), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_masked_token_equals_a_deleted_one(name: str) -> None:
    log_p, log_q, labels = case()
    kept = labels != -100
    spoilt = log_p.masked_fill(~kept.unsqueeze(-1), math.nan)
    masked, deleted = metrics()[name], metrics()[name]
    add(name, masked, spoilt, log_q, labels)
    add(name, deleted, log_p[kept], log_q[kept], labels[kept])
    assert masked.compute().item() == deleted.compute().item()


def rank_means(rank: int) -> dict[str, Tensor]:
    collection = metrics()
    for seed in range(rank + 1):  # rank 0 has one batch, rank 1 two of another size, and so on
        for name, metric in collection.items():
            add(name, metric, *case(2 + rank, 4 + 2 * rank, seed=10 * rank + seed))
    weighted = TokenMean()
    weighted.update(torch.arange(3.0) + rank, torch.tensor([1.0, 0.0, 0.5]) + rank)
    return {name: metric.compute() for name, metric in collection.items()} | {"weighted": weighted.compute()}


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_with_unequal_counts_equal_one_process(ranks: int) -> None:
    first, *others = processes.run(rank_means, world_size=ranks)
    assert all(other == first for other in others)
    for name, metric in metrics().items():
        for rank in range(ranks):
            for seed in range(rank + 1):
                add(name, metric, *case(2 + rank, 4 + 2 * rank, seed=10 * rank + seed))
        assert first[name].item() == pytest.approx(metric.compute().item(), rel=1e-6), name
    # sum of w·x: (x = 0, 1, 2 and w = 1, 0, .5, both + r): (1+r)r + r(1+r) + (.5+r)(2+r); sum of w: 1.5 + 3r
    total = sum(2 * r * (1 + r) + (0.5 + r) * (2 + r) for r in range(ranks))
    assert first["weighted"].item() == pytest.approx(total / sum(1.5 + 3 * r for r in range(ranks)))


def idle_rank_means(rank: int) -> dict[str, Tensor]:
    collection = metrics()
    for name, metric in collection.items():
        log_p, log_q, labels = case()
        add(name, metric, log_p, log_q, labels if rank == 0 else torch.full_like(labels, -100))
    return {name: metric.compute() for name, metric in collection.items()}


def test_a_rank_without_a_counted_token_changes_nothing() -> None:
    first, second = processes.run(idle_rank_means)
    assert first == second
    for name, metric in metrics().items():
        add(name, metric, *case())
        assert first[name].item() == pytest.approx(metric.compute().item(), rel=1e-6), name


@pytest.mark.parametrize("name", NAMES)
def test_plot_draws_the_value(name: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    metric = metrics()[name]
    add(name, metric, *case())
    figure, axes = metric.plot()
    (line,) = axes.get_lines()[:1]
    assert line.get_ydata()[0] == pytest.approx(metric.compute().item())
    matplotlib.pyplot.close(figure)


def test_token_mean_of_weighted_and_unweighted_values() -> None:
    mean = TokenMean()
    mean.update(torch.tensor([1.0, 2.0]))
    mean.update(torch.tensor([[4.0]]), torch.tensor([[0.5]]))
    assert mean.compute().item() == pytest.approx((1 + 2 + 2) / 2.5)


def test_an_empty_batch_changes_nothing_and_no_token_at_all_is_nan() -> None:
    mean, divergence = TokenMean(), DivergenceMetric(ForwardKL())
    log_p, log_q, labels = case()
    mean.update(torch.empty(0))
    divergence.update(log_p, log_q, torch.full_like(labels, -100))
    assert mean.compute().isnan() and divergence.compute().isnan()
    mean.update(torch.tensor([3.0]))
    assert mean.compute().item() == 3


def test_compute_without_update_is_nan_and_says_so() -> None:
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert TokenMean().compute().isnan()


def test_reset_forgets() -> None:
    mean = TokenMean()
    mean.update(torch.tensor([3.0]))
    mean.reset()
    mean.update(torch.tensor([1.0]))
    assert mean.compute().item() == 1


def test_one_more_token_counts_after_more_than_fp32_can_count() -> None:
    mean = TokenMean()
    mean.update(torch.zeros(1), torch.tensor([2.0**25]))
    for _ in range(8):
        mean.update(torch.ones(1))
    assert mean.count.item() == 2**25 + 8 and mean.total.item() == 8


def test_half_precision_values_are_added_in_full() -> None:
    mean = TokenMean()
    mean.update(torch.full((4096,), 1.0, dtype=torch.bfloat16))
    mean.update(torch.full((1,), 3.0, dtype=torch.bfloat16))
    assert mean.total.item() == 4099


def test_no_gradient_and_no_graph_is_kept() -> None:
    metric = DivergenceMetric(ForwardKL())
    log_p, log_q, labels = case()
    metric.update(log_p, log_q.requires_grad_(), labels)
    assert not metric.total.requires_grad and not metric.compute().requires_grad


class L2(Divergence):
    """A custom divergence."""

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_p.exp() - log_q.exp()).square().sum(-1)


def test_a_divergence_of_the_users_is_measured() -> None:
    log_p, log_q, labels = case()
    collection = MetricCollection({"l2": DivergenceMetric(L2()), "kl": DivergenceMetric(ForwardKL())})
    collection.update(log_p, log_q, labels)
    expected = (log_p.exp() - log_q.exp()).square().sum(-1)[labels != -100].mean()
    assert collection.compute()["l2"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_without_labels_every_token_counts() -> None:
    log_p, log_q, labels = case()
    metric = Agreement()
    metric.update(log_p, log_q)
    assert metric.count.item() == labels.numel()


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (lambda p, q, y: DivergenceMetric(ForwardKL()).update(p, q[..., :-1]), r"log_p and log_q .*\[3, 5, 6\]"),
        (lambda p, q, y: Agreement().update(p, q[:1]), r"log_p and log_q .*\[1, 5, 7\]"),
        (lambda p, q, y: NLL().update(q, y[:, 1:]), r"labels must have the shape .*\[3, 5\], got \[3, 4\]"),
        (lambda p, q, y: NLL().update(q, y.masked_fill(y == -100, V)), r"labels must be in \[0, 7\) .* got 7"),
        (lambda p, q, y: Agreement(0), r"top_k must be at least 1, got 0"),
        (lambda p, q, y: Agreement(8).update(p, q, y), r"top_k must be at most the vocabulary's size, 7, got 8"),
        (lambda p, q, y: CalibrationError(0), r"bins must be at least 1, got 0"),
        (lambda p, q, y: TokenMean().update(y.float(), y[:, :1].float()), r"weights must have the shape of values"),
    ],
)
def test_what_does_not_fit_is_refused(update, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        update(*case())


def test_calibration_error_is_that_of_torchmetrics() -> None:
    from torchmetrics.functional.classification import multiclass_calibration_error

    log_p, _, labels = case(8, 40)
    metric, kept = CalibrationError(bins=10), labels != -100
    metric.update(log_p, labels)
    theirs = multiclass_calibration_error(log_p[kept].exp(), labels[kept], V, n_bins=10, norm="l1")
    assert metric.compute().item() == pytest.approx(theirs.item(), rel=1e-5)
    assert calibration_error(log_p[kept], labels[kept], bins=10).item() == pytest.approx(theirs.item(), rel=1e-5)
    assert calibration_error(log_p[:0], labels[:0]).isnan()


def test_a_copy_of_the_teacher_beats_it_half_the_time() -> None:
    log_p, _, labels = case()
    metric = BeatsTeacher()
    metric.update(log_p, log_p, labels)
    assert metric.compute().item() == 0.5


@pytest.mark.parametrize("name", NAMES)
def test_states_of_inference_mode_go_on_outside_of_it(name: str) -> None:
    metric = metrics()[name]
    with torch.inference_mode():
        metric.reset()
        add(name, metric, *case(seed=1))
    with torch.no_grad():
        add(name, metric, *case(seed=2))
    whole = metrics()[name]
    add(name, whole, *case(seed=1))
    add(name, whole, *case(seed=2))
    assert metric.compute().item() == whole.compute().item()


@pytest.mark.parametrize("first", ["nothing counted", "student = teacher"])
def test_in_a_collection_no_metric_is_taken_for_another(first: str) -> None:
    log_p, log_q, labels = case(6, 9)
    each = {
        "fkl": DivergenceMetric(ForwardKL()),
        "rkl": DivergenceMetric(ReverseKL()),
        "agreement": Agreement(),
        "beats": BeatsTeacher(),
    }
    together = MetricCollection(copy.deepcopy(each))
    begin = (log_p, log_q, torch.full_like(labels, -100)) if first == "nothing counted" else (log_p, log_p, labels)
    for batch in (begin, (log_p, log_q, labels)):
        together.update(*batch)
        for metric in each.values():
            metric.update(*batch)
    assert together.compute() == {name: metric.compute() for name, metric in each.items()}
    assert len(together.compute_groups) == len(each)
