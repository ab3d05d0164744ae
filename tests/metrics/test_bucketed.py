"""A bucketed metric equals the plain metric on the tokens of each bucket."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

import processes
from kd_lightning.divergences import ForwardKL
from kd_lightning.metrics.bucketed import Bucketed, ByPosition, BySource
from kd_lightning.metrics.per_token import NLL, Agreement, BeatsTeacher, CalibrationError, DivergenceMetric, Entropy
from metric_cases import case


def places(labels: Tensor) -> list[list[int]]:
    """Position of every token among the tokens with a label of its row, −1 without a label."""
    out = []
    for row in labels.tolist():
        seen = -1
        out.append([-1 if label == -100 else (seen := seen + 1) for label in row])
    return out


def kept(labels: Tensor, keep: Tensor) -> Tensor:
    return labels.masked_fill(~keep, -100)


def test_by_position_is_the_metric_on_the_tokens_of_each_place() -> None:
    log_p, log_q, labels = case(6, 9)
    metric = ByPosition(DivergenceMetric(ForwardKL()), edges=(0, 1, 3))
    metric.update(log_p, log_q, labels=labels)
    place = torch.tensor(places(labels))
    found = metric.compute()
    for name, low, high in (("position_0-0", 0, 0), ("position_1-2", 1, 2), ("position_3-", 3, 99)):
        plain = DivergenceMetric(ForwardKL())
        plain.update(log_p, log_q, kept(labels, (place >= low) & (place <= high)))
        assert found[name].item() == pytest.approx(plain.compute().item(), rel=1e-6), name


def test_by_source_is_the_metric_on_the_rows_of_each_source() -> None:
    log_p, _, labels = case(6, 9)
    source = torch.tensor([0, 2, 2, 0, 2, 0])
    metric = BySource(NLL())
    metric.update(log_p, labels=labels, source=source)
    found = metric.compute()
    for name, index in (("source_dataset", 0), ("source_student", 2)):
        plain = NLL()
        plain.update(log_p, kept(labels, (source == index).unsqueeze(1).expand_as(labels)))
        assert found[name].item() == pytest.approx(plain.compute().item(), rel=1e-6)
    assert found["source_teacher"].isnan()
    by_token = BySource(NLL())
    by_token.update(log_p, labels=labels, source=source.unsqueeze(1).expand_as(labels))
    assert by_token.compute()["source_student"] == found["source_student"]


NAMES = ("nll", "kl", "agreement", "entropy", "beats_teacher", "calibration_error")


def bucketed(name: str) -> list[Bucketed]:
    plain: dict[str, Metric] = {
        "nll": NLL(),
        "kl": DivergenceMetric(ForwardKL()),
        "agreement": Agreement(top_k=3),
        "entropy": Entropy(),
        "beats_teacher": BeatsTeacher(),
        "calibration_error": CalibrationError(bins=4),
    }
    return [ByPosition(plain[name], edges=(0, 2)), BySource(plain[name])]


def add(name: str, metric: Bucketed, rows: int, length: int, seed: int) -> None:
    log_p, log_q, labels = case(rows, length, seed)
    models = (log_q,) if name in ("nll", "entropy", "calibration_error") else (log_p, log_q)
    source = {"source": (torch.arange(rows) + seed) % 3} if isinstance(metric, BySource) else {}
    metric.update(*models, labels=labels, **source)


def of_rank(rank: int) -> dict[str, Tensor]:
    found = {}
    for name in NAMES:
        for metric in bucketed(name):
            for seed in range(rank + 1):
                add(name, metric, 2 + rank, 6, 10 * rank + seed)
            found |= {f"{name} {bucket}": value for bucket, value in metric.compute().items()}
    return found


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_equal_one_process(ranks: int) -> None:
    first, *others = processes.run(of_rank, world_size=ranks)
    whole = {}
    for name in NAMES:
        for metric in bucketed(name):
            for rank in range(ranks):
                for seed in range(rank + 1):
                    add(name, metric, 2 + rank, 6, 10 * rank + seed)
            whole |= {f"{name} {bucket}": value.item() for bucket, value in metric.compute().items()}
    for found in (first, *others):
        assert {name: value.item() for name, value in found.items()} == pytest.approx(whole, rel=1e-6, nan_ok=True)


def test_plot_draws_every_bucket() -> None:
    import matplotlib

    matplotlib.use("agg")
    for metric in bucketed("nll"):
        for seed in range(3):
            add("nll", metric, 6, 9, seed)
        figure, axes = metric.plot()
        drawn = [text.get_text() for text in axes.get_legend().get_texts()]
        assert set(metric.names) <= set(drawn)
        matplotlib.pyplot.close(figure)


def test_it_stands_in_a_collection_and_forgets() -> None:
    log_p, _, labels = case()
    collection = MetricCollection({"nll": NLL(), "by_position": ByPosition(NLL(), edges=(0, 2))})
    collection.update(log_p, labels=labels)
    assert {"nll", "position_0-1", "position_2-"} == set(collection.compute())
    collection.reset()
    collection.update(log_p[:1], labels=labels[:1])
    plain = NLL()
    plain.update(log_p[:1], labels[:1])
    assert collection.compute()["nll"] == plain.compute()


@pytest.mark.parametrize("edges", [(), (1, 2), (0, 4, 4), (0, 5, 3)])
def test_edges_that_do_not_rise_from_zero_are_refused(edges: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="edges must start with 0 and increase"):
        ByPosition(NLL(), edges=edges)


def test_a_source_that_is_missing_or_unknown_is_refused() -> None:
    log_p, _, labels = case()
    with pytest.raises(ValueError, match="update needs source="):
        BySource(NLL()).update(log_p, labels=labels)
    with pytest.raises(ValueError, match=r"source must contain indices .* got 0 to 3"):
        BySource(NLL()).update(log_p, labels=labels, source=torch.tensor([0, 1, 3]))


# ----------------------------------------------------------------------------------------- as torchmetrics uses them
def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], equal_nan=True) for name in a)


def test_in_a_collection_each_takes_what_it_knows() -> None:
    log_p, log_q, labels = case(6, 9)
    every = {"log_p": log_p, "log_q": log_q, "labels": labels, "source": torch.arange(6) % 3}
    kl, nll, by = ByPosition(DivergenceMetric(ForwardKL())), ByPosition(Entropy()), BySource(NLL())
    together = MetricCollection({"kl": deepcopy(kl), "nll": deepcopy(nll), "by": deepcopy(by)})
    together.update(**every)
    kl.update(log_p, log_q, labels=labels)
    nll.update(log_q, labels=labels)
    by.update(log_q, labels=labels, source=every["source"])
    for name, metric in (("kl", kl), ("nll", nll), ("by", by)):
        assert same(together[name].compute(), metric.compute())


def test_calling_gives_the_batch_and_adds_to_the_whole() -> None:
    _, log_q, labels = case(6, 9)
    called, updated = ByPosition(NLL(), edges=(0, 2)), ByPosition(NLL(), edges=(0, 2))
    for rows in (slice(0, 1), slice(1, None)):
        alone = ByPosition(NLL(), edges=(0, 2))
        alone.update(log_q[rows], labels=labels[rows])
        updated.update(log_q[rows], labels=labels[rows])
        assert same(called(log_q[rows], labels=labels[rows]), alone.compute())
    assert same(called.compute(), updated.compute())


def test_merged_halves_are_the_whole() -> None:
    _, log_q, labels = case(6, 9)
    parts = [ByPosition(NLL(), edges=(0, 2)) for _ in range(3)]
    for part, rows in zip(parts, (slice(0, 1), slice(1, None), slice(None)), strict=True):
        part.update(log_q[rows], labels=labels[rows])
    parts[0].merge_state(parts[1])
    assert same(parts[0].compute(), parts[2].compute())
    with pytest.raises(ValueError, match="needs a metric with the buckets"):
        parts[0].merge_state(ByPosition(NLL(), edges=(0, 3)))
