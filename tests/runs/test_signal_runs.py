"""Token weights and sampled tokens in a run: logged, the same however a step is split, resumed, and refused."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import processes
import runs
from architectures import VOCABULARY, tiny
from kd_lightning import (
    AdaptiveReplay,
    Contrastive,
    DistillationLoss,
    DistillationModule,
    ForwardKL,
    GapGate,
    InstructionDataModule,
    LabelLoss,
    Linear,
    MiniLLM,
    OnPolicy,
    ResponseSource,
    ReverseKL,
    SampledReverseKL,
    TeacherEntropyGate,
    TopShare,
    Weighted,
    WeightedSum,
)
from kd_lightning.assets import resolve
from kd_lightning.cli.program import main
from tiny_fits import STILL, Run, assert_same_student, bundled, fit, rows, split, weights


def top_half() -> Weighted:
    """A stateful objective: a threshold and a mean weight."""
    return Weighted(ForwardKL(), TopShare(GapGate(3.0), 0.5), normalize=True)


def state(module: DistillationModule) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.loss.objective.named_buffers()}


# ------------------------------------------------------------------------------------------------------ token weights
def test_the_state_follows_each_step_and_is_logged() -> None:
    module = Run(tiny("llama"), tiny("llama"), top_half(), optimizer=STILL)
    fit(module, [rows(12, VOCABULARY)] * 3)
    assert module.objective_moves
    first, *later = module.logged
    assert first["train/tokens_kept"] == 1
    for logged in later:
        assert 0.3 < logged["train/tokens_kept"] < 0.7
        assert 0 < logged["train/token_weight"] < 1
    assert float(module.loss.objective.mean_weight.now) == pytest.approx(later[-1]["train/token_weight"])  # type: ignore[union-attr]
    again = Run(tiny("llama"), tiny("llama"), top_half(), optimizer=STILL)
    again.configure_model()
    again.load_state_dict(module.state_dict())
    assert all(torch.equal(state(again)[name], x) for name, x in state(module).items())


def test_several_weights_are_logged_by_their_paths() -> None:
    objective = Contrastive(
        WeightedSum([Weighted(ForwardKL(), TeacherEntropyGate(2.0)), ForwardKL()], [1, 1]), top_half()
    )
    module = Run(tiny("llama"), tiny("llama"), objective, optimizer=STILL)
    fit(module, [{**rows(8, VOCABULARY), "source": torch.tensor([0, 2] * 4)}])
    names = {name for name in module.logged[0] if "token" in name}
    paths = ("teacher_responses.parts.0", "student_responses")
    assert names == {f"train/{name}/{path}" for name in ("token_weight", "tokens_kept") for path in paths}


def split_run(sizes: tuple[int, ...], accumulate: int) -> DistillationModule:
    """Three equal steps, whose 12 rows are split differently."""
    batches = [batch for _ in range(3) for batch in split(rows(12), *sizes)]
    module: DistillationModule = fit(bundled(objective=top_half()), batches, accumulate_grad_batches=accumulate)
    return module


def test_a_step_is_the_same_however_its_rows_are_split() -> None:
    whole, parts = split_run((12,), 1), split_run((1, 7, 4), 3)
    assert_same_student(weights(parts), weights(whole))
    assert float(state(whole)["weight.threshold"]) > 0.1
    for name, x in state(whole).items():
        torch.testing.assert_close(state(parts)[name], x, rtol=2e-3, atol=0)


def on_a_rank(rank: int) -> dict[str, Any]:
    """Three steps as one of two ranks, on 5 and 7 rows."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", GROUP_RANK="0")
    os.environ.update(TORCHELASTIC_RUN_ID="test", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    module = fit(bundled(objective=top_half()), [split(rows(12), 5, 7)[rank]] * 3, devices=2, strategy="ddp")
    return {"student": weights(module), "state": state(module)}


@pytest.mark.slow
def test_two_ranks_are_one_process() -> None:
    one, two = processes.run(on_a_rank)
    whole = split_run((12,), 1)
    for found in (one, two):
        assert_same_student(found["student"], weights(whole))
        for name, x in state(whole).items():
            torch.testing.assert_close(found["state"][name], x, rtol=2e-3, atol=0)
    assert all(torch.equal(one["state"][name], two["state"][name]) for name in one["state"])


TOP = ["--model.objective", "Weighted", "--model.objective.divergence", "ToDi", "--model.objective.normalize", "true"]
TOP += ["--model.objective.weight", "TopShare", "--model.objective.weight.weight", "GapGate"]
TOP += ["--model.objective.weight.share", "0.4"]


@pytest.mark.slow
def test_resumed_equals_untouched(tmp_path: Path) -> None:
    data = runs.little_data(tmp_path, rows=29)
    common = ["--data.train", str(data), "--data.batch_size", "4", "--checkpoint.every_n_train_steps", "3", *TOP]
    assert main([*runs.little(tmp_path / "whole", steps=10), *common]) == 0
    cut = [*runs.little(tmp_path / "cut", steps=10), *common]
    assert main([*cut, "--checkpoint.save_top_k", "-1"]) == 0
    kept = tmp_path / "kept.ckpt"
    next((tmp_path / "cut" / "checkpoints").glob("*step=6.ckpt")).rename(kept)
    saved = torch.load(kept, weights_only=True)["state_dict"]
    assert 0 < float(saved["model.loss.token_loss.objective.weight.threshold"])
    assert main([*cut, "--ckpt_path", str(kept)]) == 0
    whole, resumed = runs.student(tmp_path / "whole"), runs.student(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_class_of_another_role_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*runs.little(tmp_path), "--model.objective", "Weighted", "--model.objective.divergence", "ForwardKL"]
    assert main([*words, "--model.objective.weight", "EntropyGate"]) != 0
    said = capsys.readouterr().err
    assert "unknown class EntropyGate" in said and "TeacherEntropyGate, TopShare" in said and "ReverseKL" not in said


# ------------------------------------------------------------------------------------------------------ sampled tokens
def test_a_label_loss_that_reads_the_teacher_asks_it() -> None:
    given = split(rows(8, VOCABULARY), 4, 4)
    for loss, asked in ((None, False), (SampledReverseKL("k1_reward"), True)):
        source = OnPolicy(1, max_new_tokens=4)
        module = Run(
            tiny("llama"), tiny("llama"), ReverseKL(), ce_weight=1, label_loss=loss, responses=source, optimizer=STILL
        )
        fit(module, given)
        assert module.labels_only != asked
        assert ("train/kd" in module.logged[0]) == asked
        assert module.logged[0]["train/loss"] == module.logged[0]["train/ce"]


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize(
    "make", [lambda: OnPolicy(1.0, max_new_tokens=5), lambda: MiniLLM(0.2, inner_epochs=2, max_new_tokens=5)]
)
def test_sampled_tokens_train_with_each_source(make: Callable[[], ResponseSource], baseline: bool) -> None:
    student = tiny("llama")
    before = [p.detach().clone() for p in student.parameters()]
    loss = SampledReverseKL("k1_reward", baseline)
    module = Run(student, tiny("llama"), ce_weight=1.0, label_loss=loss, responses=make())
    fit(module, split(rows(12, VOCABULARY), *(3,) * 4), max_epochs=2)
    assert all(torch.tensor(logged["train/loss"]).isfinite() for logged in module.logged)
    assert any(not torch.equal(x, y) for x, y in zip(before, student.parameters(), strict=True))


def test_fresh_and_replayed_tokens_have_the_weights_of_their_ratio() -> None:
    source = MiniLLM(0.0, inner_epochs=2, max_new_tokens=5)
    module = Run(
        tiny("llama"), tiny("llama"), ce_weight=1.0, label_loss=SampledReverseKL(), responses=source, optimizer=STILL
    )
    fit(module, split(rows(8, VOCABULARY), 4, 4))
    first, second = module.logged  # the student is still: the same responses have the same loss
    assert second["train/loss"] == pytest.approx(first["train/loss"], rel=1e-4)


def test_the_baseline_lowers_the_variance_on_the_tokens_of_the_bundled_pair(tmp_path: Path) -> None:
    data = InstructionDataModule(str(runs.little_data(tmp_path)), tokenizer="asset:student", batch_size=48)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(resolve(f"asset:{name}")).eval() for name in ("student", "teacher")
    )
    labels = batch["labels"][:, 1:]
    with torch.no_grad():
        log_q, log_p = (
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
            for model in (student, teacher)
        )
    counted = labels != -100
    log_q, log_p = (torch.log_softmax(x[counted], -1) for x in (log_q, log_p))
    q, k = log_q.exp(), log_q - log_p
    baseline = (q * k).sum(-1, keepdim=True)
    mean = (q * (k - baseline)).square().sum(-1)  # squared norm of the gradient of reverse KL
    lengths = 1 - 2 * q + q.square().sum(-1, keepdim=True)  # squared norm of the gradient of log q(y)
    plain, lower = ((q * (k - b) ** 2 * lengths).sum(-1) - mean for b in (0, baseline))
    assert counted.sum() > 200 and (lower > 0).all()
    assert lower.mean() < 0.5 * plain.mean()
    assert (lower < plain).double().mean() > 0.98

    # the same through the loss, on tokens that are sampled from the student: the sampled second moments
    sampled = torch.multinomial(q, 64, replacement=True, generator=torch.Generator().manual_seed(0))
    found = []
    for with_baseline in (False, True):
        x = log_q.unsqueeze(1).expand(-1, 64, -1).reshape(1, -1, q.shape[-1])[:, :1920].clone().requires_grad_()
        y = log_p.unsqueeze(1).expand(-1, 64, -1).reshape(1, -1, q.shape[-1])[:, :1920]
        estimate = SampledReverseKL("k1_reward", with_baseline)
        loss = DistillationLoss(ForwardKL(), 1.0, reduction="sum", label_loss=estimate, compile=False)
        (gradient,) = torch.autograd.grad(loss.from_logits(x, y, sampled.reshape(1, -1)[:, :1920]).loss, x)
        found.append(float(gradient.square().sum(-1).mean()))
    expected = [float((second + mean)[:30].mean()) for second in (plain, lower)]
    assert found == pytest.approx(expected, rel=0.2)
    assert found[1] < 0.6 * found[0]


class Everything(ResponseSource):
    """A custom source that declares nothing."""

    def forward(self, batch: dict[str, Tensor], context: Any) -> dict[str, Tensor]:
        return batch


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"responses": OnPolicy(1.0, temperature=0.7)},
            "the sampling temperature and the loss's temperature must be equal .*, got 0.7 in OnPolicy and 1",
        ),
        ({"responses": OnPolicy(1.0), "temperature": 2.0}, "must be equal .*, got 1 in OnPolicy and 2"),
        ({"responses": OnPolicy(1.0, temperature=0.0)}, "must be equal .*, got 0 in OnPolicy and 1"),
        ({"responses": OnPolicy(1.0, top_p=0.9)}, "top_p must be 1 for SampledReverseKL, got 0.9 in OnPolicy"),
        ({"responses": MiniLLM(temperature=1.5)}, "must be equal .*, got 1.5 in MiniLLM and 1"),
        ({"responses": AdaptiveReplay()}, "AdaptiveReplay trains on responses again .* gives no importance weights"),
    ],
)
def test_tokens_that_are_sampled_otherwise_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        DistillationModule(tiny("llama"), tiny("llama"), ce_weight=1.0, label_loss=SampledReverseKL(), **settings)
    assert "\n" not in str(refused.value)
    settings.pop("responses")
    DistillationModule(
        tiny("llama"), tiny("llama"), responses=AdaptiveReplay(temperature=0.3), **settings
    )  # others may


def test_sampling_and_loss_may_share_another_temperature() -> None:
    source = OnPolicy(1.0, temperature=0.7, max_new_tokens=4)
    module = Run(
        tiny("llama"), tiny("llama"), ce_weight=1.0, temperature=0.7, label_loss=SampledReverseKL(), responses=source
    )
    fit(module, [rows(4, VOCABULARY)])
    assert module.logged[0]["train/loss"] > 0


@pytest.mark.parametrize("responses", [None, OnPolicy(0.5), OnPolicy(Linear(0.0, 1.0))])
def test_responses_of_the_data_are_warned_of(responses: ResponseSource | None) -> None:
    with pytest.warns(UserWarning, match=r"SampledReverseKL is correct for tokens sampled .*=OnPolicy\(share=1\)"):
        DistillationModule(tiny("llama"), tiny("llama"), label_loss=SampledReverseKL(), responses=responses)


def test_without_a_teacher_it_is_refused_before_the_first_step(tmp_path: Path) -> None:
    data = InstructionDataModule(str(runs.little_data(tmp_path)), tokenizer="asset:student", batch_size=2)
    for loss, responses, message in (
        (SampledReverseKL(), OnPolicy(1.0), "SampledReverseKL reads teacher_log_prob of the teacher: pass teacher="),
        (SampledReverseKL(baseline=True), MiniLLM(0.0), "reads teacher_log_prob and reverse_kl of the teacher"),
    ):
        module = DistillationModule("asset:student", ce_weight=1.0, label_loss=loss, responses=responses)
        trainer = L.Trainer(accelerator="cpu", max_steps=1, logger=False)
        with pytest.raises(ValueError, match=message):
            trainer.fit(module, datamodule=data)


def test_a_custom_source_and_label_loss_are_not_judged() -> None:
    class Plain(LabelLoss):
        def forward(self, log_q_label: Tensor, rows: Any) -> Tensor:
            return -log_q_label

    fit(Run(tiny("llama"), None, ce_weight=1.0, label_loss=Plain(), responses=Everything()), [rows(4, VOCABULARY)])


def test_a_config_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("kd_lightning").setLevel(logging.WARNING)
    words = [*runs.little(tmp_path, "opd", steps=1), "--model.responses.top_p", "0.9"]
    assert main(words) != 0
    said = [line for line in capsys.readouterr().err.splitlines() if "top_p" in line]
    assert len(said) == 1 and "top_p must be 1 for SampledReverseKL, got 0.9 in OnPolicy" in said[0]
