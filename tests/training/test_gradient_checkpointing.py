"""Gradient checkpointing of the student: the same loss and gradient, less memory, on one device and on two ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import processes
import runs
from architectures import tiny
from kd_lightning import DistillationModule
from kd_lightning.cli.program import main, run
from kd_lightning.distributed.dtensor import full_tensor
from kd_lightning.models.loading import load_causal_lm
from kd_lightning.models.lora import LoRA
from kd_lightning.strategies import FSDP2Strategy
from sharded_fits import joined
from tiny_fits import SGD, assert_same_student, bundled, fit, rows, split, weights

BATCHES = split(rows(6, vocabulary=70), 4, 2)


def model(kind: str, seed: int) -> Any:
    torch.manual_seed(seed)
    return tiny(kind)


def trained(kind: str, switch: bool, **kwargs: Any) -> tuple[list[Tensor], dict[str, Tensor], int]:
    """Losses of the steps, weights after them, and how often a layer ran."""
    ran = []

    class Counted(DistillationModule):
        def on_train_start(self) -> None:
            super().on_train_start()
            layer = next(part for part in self.student.modules() if isinstance(part, nn.ModuleList))[0]
            next(layer.children()).register_forward_hook(lambda *_: ran.append(1))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            losses.append(loss.detach().clone())
            return loss

    losses: list[Tensor] = []
    module = Counted(
        model(kind, 0), model(kind, 1), optimizer=SGD, ce_weight=0.5, gradient_checkpointing=switch, **kwargs
    )
    fit(module, BATCHES)
    return losses, weights(module), len(ran)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_the_same_value_and_gradient(kind: str) -> None:
    (one, plain, once), (two, spared, twice) = (trained(kind, switch) for switch in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert all(torch.equal(plain[name], spared[name]) for name in plain)
    assert twice == 2 * once > 0


def test_with_adapters() -> None:
    (_, plain, once), (_, spared, twice) = (trained("llama", switch, lora=LoRA(r=2)) for switch in (False, True))
    assert all(torch.equal(plain[name], spared[name]) for name in plain)
    assert twice == 2 * once > 0


@pytest.mark.parametrize("key", ["gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing"])
def test_the_attempt_through_the_arguments_of_the_model(key: str) -> None:
    match = f"student_kwargs must not contain '{key}': set the module's gradient_checkpointing"
    with pytest.raises(ValueError, match=match):
        DistillationModule("asset:student", "asset:teacher", student_kwargs={key: True})
    with pytest.raises(ValueError, match=f"teacher_kwargs must not contain '{key}': it is not trained"):
        load_causal_lm("asset:teacher", kwargs={key: True}, role="teacher")


def test_of_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    words = [*runs.little(tmp_path / "root", steps=1), "--data.train", str(runs.little_data(tmp_path))]
    assert main([*words, "--model.student_kwargs", '{"gradient_checkpointing": true}']) == 1
    err = capsys.readouterr().err
    assert "--model.gradient_checkpointing true" in err and "Traceback" not in err
    module = run([*words, "--model.gradient_checkpointing", "true"], start=False).model
    module.configure_model()
    assert module.student.is_activation_checkpointing


def test_a_model_that_has_none() -> None:
    student = model("llama", 0)
    type(student).supports_gradient_checkpointing = False
    try:
        with pytest.raises(ValueError, match=r"gradient_checkpointing is not supported by .*: set gradient_check"):
            DistillationModule(student, ce_weight=1.0, gradient_checkpointing=True).configure_model()
    finally:
        type(student).supports_gradient_checkpointing = True
    with pytest.raises(ValueError, match="gradient_checkpointing must be True or False, got 'yes'"):
        DistillationModule("asset:student", ce_weight=1.0, gradient_checkpointing="yes")  # type: ignore[arg-type]


def on_ranks(rank: int) -> list[dict[str, Tensor]]:
    """Weights by ddp without and with it, and by fsdp2 without and with it."""
    joined(rank, 2)
    batches = split(rows(8, vocabulary=1000), 2, 2, 2, 2)[rank::2]
    found = []
    for strategy in (lambda: "ddp", FSDP2Strategy):
        for switch in (False, True):
            module = fit(bundled(gradient_checkpointing=switch), batches, devices=2, strategy=strategy())
            found.append({name: full_tensor(value) for name, value in weights(module).items()})
    return found


@pytest.mark.slow
def test_on_two_ranks() -> None:
    ddp, spared, fsdp2, spared_shards = processes.run(on_ranks)[0]
    assert_same_student(ddp, spared, atol=0.0)
    assert_same_student(fsdp2, spared_shards, atol=0.0)
