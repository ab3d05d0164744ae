"""Sources of responses in a run: one step is one decision however it is split, on all ranks, and after a resume."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import processes
import runs
from architectures import VOCABULARY, tiny
from kd_lightning import TAID, ClippedPolicyGradient, Contrastive, Divergence, ForwardKL, ResponseGap, ReverseKL, SkewKL
from kd_lightning.cli.program import main
from kd_lightning.models.generate import Sampling
from kd_lightning.rollout.base import ResponseSource, RolloutContext
from kd_lightning.rollout.minillm import MiniLLM
from kd_lightning.rollout.on_policy import OnPolicy
from kd_lightning.rollout.replay import AdaptiveReplay
from kd_lightning.schedules import Linear
from leaves import RESPONSES
from tiny_fits import STILL, Run, assert_same_student, bundled, fit, rows, split, weights

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.0}
SOURCES: dict[str, Callable[[], ResponseSource]] = {
    "OnPolicy": lambda: OnPolicy(1.0, **GREEDY),
    "AdaptiveReplay": lambda: AdaptiveReplay(1.0, capacity=64, **GREEDY),
}


# -------------------------------------------------------------------------------------------------------------- splits
@functools.cache
def trained(source: str, sizes: tuple[int, ...], accumulate: int = 1) -> dict[str, Tensor]:
    module = bundled(responses=SOURCES[source](), objective=ReverseKL())
    return weights(fit(module, split(rows(), *sizes), accumulate_grad_batches=accumulate))


@pytest.mark.parametrize("source", SOURCES)
def test_a_step_is_the_same_however_its_rows_are_split(source: str) -> None:
    whole = trained(source, (12,))
    assert_same_student(trained(source, (1, 7, 4), 3), whole)
    plain = weights(fit(bundled(objective=ReverseKL()), [rows()]))
    assert max(float((plain[name] - whole[name]).abs().max()) for name in whole) > 1e-3


class Coins(OnPolicy):
    """Remembers where it was asked."""

    def forward(self, batch: dict[str, Tensor], author: RolloutContext) -> dict[str, Tensor]:
        out = super().forward(batch, author)
        place = (author.step, author.micro, author.batch, author.rank, out is not batch)
        self.seen: list[tuple[int, int, int, int, bool]] = [*getattr(self, "seen", []), place]
        return out


def test_one_coin_per_step_and_what_is_logged() -> None:
    student, teacher = tiny("llama"), tiny("llama")
    source = Coins(Linear(0.0, 1.0), max_new_tokens=4)
    module = Run(student, teacher, Contrastive(), responses=source, reduction="sequence_mean", optimizer=STILL)
    given = {**rows(24, VOCABULARY), "source": torch.zeros(24, dtype=torch.long)}
    batches = split(given, *(2,) * 12)
    fit(module, batches, batches[:2], accumulate_grad_batches=2, max_epochs=2, val_check_interval=6)
    assert [place[:3] for place in source.seen] == [(n // 2, n % 2, n) for n in range(24)]
    wrote = [place[4] for place in source.seen]
    assert wrote[::2] == wrote[1::2] and set(wrote) == {True, False}
    for step in range(12):
        logged = module.logged[2 * step + 1]
        assert logged["train/student_share"] == float(wrote[2 * step])
        assert logged["schedule/responses.share"] == pytest.approx((step + 1) / 12)
        if wrote[2 * step]:
            assert 1 <= logged["train/response_length"] <= 4 and 0 <= logged["train/finished"] <= 1
    assert 0 < max(logged.get("train/generate_share", 0) for logged in module.logged) < 1


@pytest.mark.parametrize("objective", [ForwardKL, TAID, Contrastive, lambda: SkewKL(ResponseGap())])
@pytest.mark.parametrize("source", RESPONSES)
def test_every_source_with_any_objective_and_a_label_loss(source: str, objective: Callable[[], Divergence]) -> None:
    student, teacher, responses = tiny("llama"), tiny("llama"), RESPONSES[source]()
    assert responses.sampling is not None
    responses.sampling = Sampling(5)
    module = Run(student, teacher, objective(), ce_weight=0.3, responses=responses, optimizer=STILL)
    given = {**rows(12, VOCABULARY), "source": torch.zeros(12, dtype=torch.long)}
    fit(module, split(given, 2, 4, 1, 3, 2), accumulate_grad_batches=2, max_epochs=2)
    for logged in module.logged[1::2]:
        mixed = 0.7 * logged["train/kd"] + 0.3 * logged["train/ce"]
        assert logged["train/loss"] == pytest.approx(mixed, rel=1e-4)


@pytest.mark.parametrize("never", [True, False])
def test_only_ends_or_no_end_at_all_is_no_nan(never: bool) -> None:
    student, teacher = tiny("llama"), tiny("llama")
    with torch.no_grad():
        student.lm_head.weight.zero_()
        student.lm_head.weight[3 if never else 2] = 1.0
        student.model.norm.weight.fill_(1.0)
        student.model.embed_tokens.weight.abs_()
    for source in (OnPolicy(1.0, **GREEDY), MiniLLM(0.0, max_new_tokens=6)):
        settings: dict[str, Any] = {}
        if isinstance(source, MiniLLM):
            settings = {"label_loss": ClippedPolicyGradient(), "ce_weight": 0.5}
        module = Run(student, teacher, ReverseKL(), responses=source, optimizer=STILL, **settings)
        fit(module, split(rows(8, VOCABULARY), 4, 4))
        assert all(torch.tensor(logged["train/loss"]).isfinite() for logged in module.logged)
        if isinstance(source, OnPolicy):
            expected = (6, 0, 0) if never else (1, 1, 1)
            names = ("response_length", "finished", "empty")
            assert tuple(module.logged[0][f"train/{name}"] for name in names) == expected


def test_validation_moves_the_threshold() -> None:
    student, teacher = tiny("llama"), tiny("llama")
    source = AdaptiveReplay(0.0, tolerance=0.0, max_new_tokens=4)
    module = Run(student, teacher, responses=source, optimizer=STILL)
    batches = split(rows(12, VOCABULARY), *(2,) * 6)
    fit(module, batches, batches[:2], val_check_interval=2, num_sanity_val_steps=-1)
    assert float(source.previous) == pytest.approx(float(module.trainer.callback_metrics["val/ce"]), rel=1e-6)
    assert float(source.threshold) == pytest.approx(0.3)  # before step 0 and three times: never better
    partly = AdaptiveReplay(0.0, tolerance=0.0, max_new_tokens=4)
    settings: dict[str, Any] = {"val_check_interval": 2, "num_sanity_val_steps": 1}
    fit(Run(student, teacher, responses=partly, optimizer=STILL), batches, batches[:2], **settings)
    assert float(partly.threshold) == pytest.approx(0.2)


# --------------------------------------------------------------------------------------------------------------- ranks
def on_a_rank(rank: int) -> dict[str, Any]:
    """Train as one of two, on 5 and 3 rows in the first step, 2 and 2 in the others."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", GROUP_RANK="0")
    os.environ.update(TORCHELASTIC_RUN_ID="test", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    a, b, c, d, e, f = split(rows(16), 5, 3, 2, 2, 2, 2)
    mine = [a, c, e] if rank == 0 else [b, d, f]
    found: dict[str, Any] = {}
    for name, make in SOURCES.items():
        module = bundled(responses=make(), objective=ReverseKL())
        fit(module, mine[:1], devices=2, strategy="ddp")
        found[name] = weights(module)
    source = AdaptiveReplay(1.0, capacity=10, fresh_share=0.5, max_new_tokens=6)
    fit(bundled(responses=source), mine, devices=2, strategy="ddp", max_epochs=2)
    found["memory"] = dict(source.memory.state_dict())
    rollouts = MiniLLM(0.2, inner_epochs=3, max_new_tokens=6)
    module = bundled(responses=rollouts, objective=ReverseKL(), label_loss=ClippedPolicyGradient(), optimizer=STILL)
    fit(module, mine[1:], devices=2, strategy="ddp", max_epochs=3)
    found["rollouts"] = dict(rollouts.memory.state_dict())
    coins = Coins(0.5, max_new_tokens=2)
    fit(bundled(responses=coins, optimizer=STILL), mine, devices=2, strategy="ddp", max_epochs=4)
    found["coins"] = [list(place) for place in coins.seen]
    return found


@pytest.mark.slow
def test_two_ranks_are_one_process() -> None:
    one, two = processes.run(on_a_rank)
    first = {name: column[:8] for name, column in rows(16).items()}
    for name, make in SOURCES.items():
        whole = weights(fit(bundled(responses=make(), objective=ReverseKL()), [first]))
        for found in (one, two):
            assert_same_student(found[name], whole)
    for kept in ("memory", "rollouts"):
        assert one[kept].keys() == two[kept].keys() and int(one[kept]["pushed"]) >= 4
        assert all(torch.equal(one[kept][name], two[kept][name]) for name in one[kept])
    assert [place[4] for place in one["coins"]] == [place[4] for place in two["coins"]]
    assert {place[4] for place in one["coins"]} == {True, False}


# -------------------------------------------------------------------------------------------------------------- resume
@pytest.mark.parametrize("config", ["gkd", "distillm", "minillm"])
def test_resumed_equals_untouched(config: str, tmp_path: Path) -> None:
    data = runs.little_data(tmp_path, rows=29)  # 8 batches an epoch, across the end of two
    common = ["--data.train", str(data), "--data.batch_size", "4", "--checkpoint.every_n_train_steps", "3"]
    common += ["--trainer.val_check_interval", "3", "--checkpoint.save_top_k", "-1"]
    common += ["--model.responses.max_new_tokens", "8"]
    if config == "distillm":
        common += ["--model.responses.threshold", "0.7", "--model.responses.capacity", "9"]
        common += ["--model.responses.tolerance", "0.0", "--model.optimizer.lr", "0.03"]
        common += ["--model.lr_scheduler.init_args.total_iters", "2000"]  # the rate stays high: validation worsens
    if config == "minillm":  # the kept step lies among an epoch of old rollouts
        common += ["--model.responses.inner_epochs", "4", "--model.responses.rollout_steps", "2"]
    root = tmp_path / "root"

    def last() -> dict[str, Tensor]:
        return torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]

    assert main([*runs.little(root, config, steps=12), *common]) == 0
    one, kept = last(), tmp_path / "kept.ckpt"
    next((root / "checkpoints").glob("*step=6.ckpt")).rename(kept)
    assert main([*runs.little(root, config, steps=12), *common, "--ckpt_path", str(kept)]) == 0
    two = last()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) or one[name].isnan().all() for name in one)
    mine = {name for name in one if name.startswith("responses.")}
    assert (mine == set()) == (config == "gkd")
    if config == "distillm":
        assert float(one["responses.threshold"]) > 0.75  # also by the validation at the step of the kept checkpoint
        assert int(one["responses.memory.pushed"]) > 0 and one["responses.memory.labels"].shape[0] <= 9


@pytest.mark.slow
def test_killed_and_resumed_equals_untouched(tmp_path: Path) -> None:
    data = runs.little_data(tmp_path, rows=45)
    common = ["--data.train", str(data), "--data.batch_size", "4", "--checkpoint.every_n_train_steps", "5"]
    common += ["--model.responses.max_new_tokens", "8", "--trainer.val_check_interval", "7"]
    common += ["--model.responses.threshold", "0.6", "--trainer.accumulate_grad_batches", "2"]
    assert main([*runs.little(tmp_path / "whole", "distillm", steps=60), *common]) == 0
    cut = [*runs.little(tmp_path / "cut", "distillm", steps=60), *common]
    runs.kill_when(cut, tmp_path / "cut" / "checkpoints" / "last.ckpt")
    code, _, err = runs.finish([*cut, "--ckpt_path", "last"])
    assert code == 0, err
    whole, resumed = runs.student(tmp_path / "whole"), runs.student(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


# ----------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.responses", "OnPolcy"], ["OnPolcy", "OnPolicy", "AdaptiveReplay", "MiniLLM"]),
        (["--model.responses", "OnPolicy", "--model.responses.share", "1.5"], ["share", "1.5"]),
        (["--model.responses", "AdaptiveReplay", "--model.responses.capacity", "0"], ["capacity", "0"]),
        (["--model.responses", "OnPolicy", "--model.responses.top_p", "0"], ["top_p", "0"]),
        (["--model.responses", "OnPolicy", "--model.responses.temperature=-1"], ["temperature", "-1"]),
        (
            ["--model.responses", "OnPolicy", "--model.responses.max_new_tokens", "128"],
            ["max_new_tokens", "max_length"],
        ),
    ],
)
def test_refused_in_one_line(words: list[str], said: list[str], tmp_path: Path, capsys: Any) -> None:
    assert main([*runs.little(tmp_path / "root"), *words]) == 1
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("kd-lightning: error:") and all(word in err for word in said), err
    assert not (tmp_path / "root" / "checkpoints").exists()


def test_a_rollout_source_without_its_columns_is_named() -> None:
    module = Run(tiny("llama"), tiny("llama"), label_loss=ClippedPolicyGradient(), ce_weight=0.5, optimizer=STILL)
    with pytest.raises(ValueError, match="advantage"):
        fit(module, [rows(vocabulary=VOCABULARY)])
