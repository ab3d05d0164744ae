"""Components of a loss: top and tail sum to forward KL, terms to the objective, and logging them changes no bit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from kd_lightning import AdaptiveKL, DistillationModule, ForwardKL, ReverseKL, SymmetricKL, WeightedSum
from kd_lightning.divergences import Composite, Divergence, evaluate
from kd_lightning.functional import forward_kl, head_mask, log_softmax
from kd_lightning.models.loading import load_causal_lm
from kd_lightning.objectives import AMiD, Contrastive, SkewKL, SkewReverseKL
from kd_lightning.schedules import Linear, ResponseGap
from kd_lightning.training.loss_components import (
    PREFIX,
    PartialKL,
    component_loss,
    component_sums,
    objective_components,
)
from tiny_fits import rows, split


def problem() -> tuple[Tensor, Tensor]:
    numbers = torch.Generator().manual_seed(0)
    log_p, log_q = (log_softmax(3 * torch.randn(6, 29, dtype=torch.float64, generator=numbers)) for _ in range(2))
    return log_p, log_q


@pytest.mark.parametrize("mu", [0.1, 0.5, 0.9, 1.0])
def test_head_and_tail_equal_a_slow_loop_and_add_up_to_forward_kl(mu: float) -> None:
    log_p, log_q = problem()
    head, tail = (PartialKL(part, mu)(log_p, log_q) for part in ("head", "tail"))
    torch.testing.assert_close(head + tail, forward_kl(log_p, log_q), rtol=1e-10, atol=1e-12)
    for n in range(len(log_p)):
        mass, slow = 0.0, 0.0
        for v in log_p[n].argsort(descending=True).tolist():
            if mass >= mu:
                break
            p, q = math.exp(float(log_p[n, v])), math.exp(float(log_q[n, v]))
            mass, slow = mass + p, slow + p * math.log(p / q) - p + q
        assert float(head[n]) == pytest.approx(slow, rel=1e-9, abs=1e-12)
    assert (head >= 0).all() and (tail >= -1e-15).all()
    assert not PartialKL("head", mu)(log_p, log_p).any()


@pytest.mark.parametrize("mu", [0.3, 0.5, 1.0])
def test_a_head_of_more_tokens_than_are_looked_at_first(mu: float) -> None:
    """Uniform, flat and peaked rows in one call: the first two have more than 64 top tokens."""
    numbers = torch.Generator().manual_seed(1)
    log_p = log_softmax(torch.randn(6, 500, generator=numbers) * torch.tensor([0.0, 0.1, 0.3, 1.0, 3.0, 30.0])[:, None])
    log_q = log_softmax(torch.randn(6, 500, generator=numbers))
    inside = head_mask(log_p, mu)
    terms = log_p.exp() * (log_p - log_q) - log_p.exp() + log_q.exp()
    torch.testing.assert_close(PartialKL("head", mu)(log_p, log_q), torch.where(inside, terms, 0.0).sum(-1))
    torch.testing.assert_close(PartialKL("tail", mu)(log_p, log_q), torch.where(inside, 0.0, terms).sum(-1))


def test_components_by_name() -> None:
    both = ["forward_kl", "reverse_kl"]
    assert list(objective_components(SymmetricKL())) == list(objective_components(AdaptiveKL())) == both
    assert list(objective_components(AMiD(SymmetricKL(), 0.0, 0.5))) == both
    assert list(objective_components(WeightedSum([ForwardKL(), SkewKL()], [1.0, 2.0]))) == ["forward_kl", "skew_kl"]
    twice = WeightedSum([ForwardKL(), SymmetricKL(), ForwardKL()], [1.0, 1.0, 1.0])
    assert list(objective_components(twice)) == [
        "forward_kl_0", "symmetric_kl", "symmetric_kl_forward_kl", "symmetric_kl_reverse_kl", "forward_kl_2"
    ]  # fmt: skip
    assert list(objective_components(Contrastive())) == ["teacher_responses", "student_responses"]
    assert objective_components(ForwardKL()) == objective_components(SkewKL()) == {}


class Custom(Composite):
    """A custom composite; `kd` is also the name of a value that the loss reports itself."""

    def __init__(self) -> None:
        super().__init__()
        self.near = SymmetricKL(0.3)
        self.kd = ReverseKL()
        self.weight = Linear(0.0, 1.0)

    def forward(self, log_p: Tensor, log_q: Tensor, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        return evaluate(self.near, log_p, log_q, rows) + self.weight() * evaluate(self.kd, log_p, log_q, rows)


def test_a_custom_composite_shows_its_components() -> None:
    names = ["near", "near_forward_kl", "near_reverse_kl", "kd"]
    assert list(objective_components(Custom())) == names
    assert list(objective_components(AMiD(Custom(), 0.0, 0.5))) == names
    log_p, log_q = problem()
    labels = torch.zeros(len(log_p), dtype=torch.long)
    loss = component_loss(Custom())
    sums = component_sums(loss, loss.from_logits(log_q, log_p, labels))
    assert sums.keys() == {f"component/{name}" for name in (*names, "head_kl", "tail_kl")}
    expected = {"near": SymmetricKL(0.3), "near_forward_kl": ForwardKL(), "near_reverse_kl": ReverseKL()}
    for name, part in {**expected, "kd": ReverseKL()}.items():
        total, weight = sums[f"component/{name}"]
        torch.testing.assert_close(total, evaluate(part, log_p, log_q).sum())
        assert weight == len(labels)


def test_a_custom_divergence_names_its_own_components() -> None:
    class Mean(Divergence):
        def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
            return (ForwardKL()(log_p, log_q) + ReverseKL()(log_p, log_q)) / 2

        def components(self) -> dict[str, Divergence]:
            return {"covering": ForwardKL(), "seeking": ReverseKL()}

    assert list(objective_components(WeightedSum([Mean(), ForwardKL()], [1.0, 1.0]))) == [
        "mean", "mean_covering", "mean_seeking", "forward_kl"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("whole", "weights"),
    [
        (SymmetricKL(0.3), (0.3, 0.7)),
        (WeightedSum([ForwardKL(), ReverseKL()], [0.2, 2.0]), (0.2, 2.0)),
        (AMiD(SymmetricKL(0.3), 0.0, 0.4), (0.3, 0.7)),
    ],
    ids=lambda x: type(x).__name__,
)
def test_weighted_parts_add_up_to_the_objective(whole: Divergence, weights: tuple[float, ...]) -> None:
    log_p, log_q = problem()
    found = [evaluate(part, log_p, log_q) for part in objective_components(whole).values()]
    total = sum(w * part for w, part in zip(weights, found, strict=True))
    torch.testing.assert_close(total, evaluate(whole, log_p, log_q), rtol=1e-12, atol=1e-13)


def test_either_side_is_the_mean_over_its_own_responses() -> None:
    numbers = torch.Generator().manual_seed(3)
    z, y = torch.randn(2, 3, 5, 29, generator=numbers)
    labels = torch.randint(0, 29, (3, 5), generator=numbers)
    source = torch.tensor([0, 2, 1])
    loss = component_loss(Contrastive())
    found = component_sums(loss, loss.from_logits(z, y, labels, {"source": source}))
    log_p, log_q = log_softmax(y), log_softmax(z)
    for name, own in (("teacher_responses", source != 2), ("student_responses", source == 2)):
        total, number = found[f"component/{name}"]
        expected = evaluate(getattr(Contrastive(), name), log_p[own], log_q[own])
        assert int(number) == 5 * int(own.sum())
        torch.testing.assert_close(total, expected.sum(), rtol=1e-5, atol=1e-6)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="part must be 'head' or 'tail', got 'middle'"):
        PartialKL("middle")
    with pytest.raises(ValueError, match="mu must be"):
        PartialKL("head", 0.0)


def run(folder: Path, compile: bool, watched: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    objective = WeightedSum([ForwardKL(), ReverseKL()], [Linear(0.5, 1.0), 0.5])
    module = DistillationModule(load_causal_lm("asset:student"), "asset:teacher", objective)
    module.loss.token_loss.compiled.choose(compile)
    logger = CSVLogger(folder, name="", version="") if watched else False
    settings: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, "max_epochs": 1}
    trainer = L.Trainer(
        logger=logger, log_every_n_steps=2, accumulate_grad_batches=2, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, **settings,
    )  # fmt: skip
    trainer.fit(module, DataLoader(split(rows(), 2, 1, 3, 1, 1, 1, 2, 1), batch_size=None))  # type: ignore[arg-type]
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore:You defined a `validation_step`",
    "ignore:The .*dataloader.* does not have many workers",
)
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_that_is_watched_learns_the_same_bits_and_shows_its_parts(compile: bool, tmp_path: Path) -> None:
    watched, blind = run(tmp_path, compile, True), run(tmp_path, compile, False)
    assert watched.keys() == blind.keys()
    assert all(torch.equal(watched[name], blind[name]) for name in watched)
    names, *lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert len(lines) == 2
    for line in lines:
        found = dict(zip(names.split(","), line.split(","), strict=True))
        parts_of = {name: float(found[f"component/{name}"]) for name in ("forward_kl", "reverse_kl")}
        head, tail = (float(found[f"component/{name}"]) for name in ("head_kl", "tail_kl"))
        assert head + tail == pytest.approx(parts_of["forward_kl"], rel=1e-4)
        assert float(found["train/grad_norm"]) > 0


def test_schedules_that_read_responses_get_what_they_read() -> None:
    objective = Contrastive(SkewKL(ResponseGap()), SkewReverseKL(ResponseGap(side="student")))
    student, teacher = torch.randn(4, 5, 11), torch.randn(4, 5, 11)
    rows = {"source": torch.tensor([1, 2, 1, 2])}
    loss = component_loss(objective)
    measured = loss.from_logits(student, teacher, torch.randint(11, (4, 5)), rows)
    sums = component_sums(loss, measured)
    assert {f"{PREFIX}teacher_responses", f"{PREFIX}student_responses"} < set(sums)
    assert all(total.isfinite() and weight > 0 for total, weight in sums.values())
