"""A run killed in the middle ends as the run that nobody touched, to the last bit."""

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch

import runs
from kd_lightning.cli.program import main
from locations import SUPPORT

CASES = {
    "taid, accumulation 2, validation in between": [
        "taid",
        "--trainer.accumulate_grad_batches",
        "2",
        "--trainer.val_check_interval",
        "7",
    ],
    "forward KL, two workers": ["quickstart", "--data.num_workers", "2"],
    "labels only, no shuffling": ["sft", "--data.shuffle", "false"],
    "adaptive, two workers, accumulation 2": [
        "taid",
        "--data.num_workers",
        "2",
        "--trainer.accumulate_grad_batches",
        "2",
    ],
}


def words(root: Path, data: Path, config: str, *extra: str) -> list[str]:
    few = ["--data.batch_size", "4", "--checkpoint.every_n_train_steps", "5"]
    return [*runs.little(root, config, steps=120), *few, "--data.train", str(data), *extra]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_killed_and_resumed_equals_untouched(case: list[str], tmp_path: Path) -> None:
    data = runs.little_data(tmp_path, rows=45)  # 12 batches an epoch, the last one short: the kill lies in mid-epoch
    assert main(words(tmp_path / "whole", data, *case)) == 0
    cut = words(tmp_path / "cut", data, *case)
    runs.kill_when(cut, tmp_path / "cut" / "checkpoints" / "last.ckpt")
    code, _, err = runs.finish([*cut, "--ckpt_path", "last"])
    assert code == 0, err
    whole, resumed = runs.student(tmp_path / "whole"), runs.student(tmp_path / "cut")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["checkpoint", "export"])
def test_killed_while_writing_keeps_what_was_there(what: str, tmp_path: Path) -> None:
    data, sign = runs.little_data(tmp_path, rows=29), tmp_path / "sign"
    common = ["--data.train", str(data), "--data.batch_size", "4", "--checkpoint.every_n_train_steps", "2"]
    assert main([*runs.little(tmp_path / "whole", "taid", steps=12), *common]) == 0
    cut = [*runs.little(tmp_path / "cut", "taid", steps=12), *common]
    if what == "export":  # there is an older student, of a shorter run
        assert main([*runs.little(tmp_path / "cut", "taid", steps=2), *common]) == 0
        older = runs.student(tmp_path / "cut")
        cut += ["--export.overwrite", "true"]
    half = str(SUPPORT / "half_writes.py")
    runs.kill_when([what, str(sign), *cut], sign, program=(half,))

    last = torch.load(tmp_path / "cut" / "checkpoints" / "last.ckpt", weights_only=True)
    assert 0 < last["global_step"] <= 12
    if what == "export":
        kept = runs.student(tmp_path / "cut")
        assert all(torch.equal(kept[name], older[name]) for name in older)
    assert main([*cut, "--ckpt_path", "last"]) == 0
    whole, resumed = runs.student(tmp_path / "whole"), runs.student(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_resumed_in_one_process_equals_untouched(tmp_path: Path) -> None:
    data = runs.little_data(tmp_path, rows=29)  # 8 batches an epoch, across the end of two
    common = ["--data.train", str(data), "--data.batch_size", "4", "--checkpoint.every_n_train_steps", "3"]
    common += ["--trainer.val_check_interval", "5"]
    assert main([*runs.little(tmp_path / "whole", "taid", steps=18), *common]) == 0
    first = [*runs.little(tmp_path / "cut", "taid", steps=18), *common]
    kept = tmp_path / "kept.ckpt"
    assert main([*first, "--checkpoint.save_top_k", "-1"]) == 0
    step = next((tmp_path / "cut" / "checkpoints").glob("*step=9.ckpt"))
    step.rename(kept)
    assert main([*first, "--ckpt_path", str(kept)]) == 0
    whole, resumed = runs.student(tmp_path / "whole"), runs.student(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


class Dies(L.Callback):
    """As a process does that is killed before a micro-batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch:
            raise KeyError("killed")


EPOCHS = ["--trainer.max_epochs", "3", "--trainer.max_steps", "-1", "--trainer.check_val_every_n_epoch", "1"]
EPOCHS += ["--trainer.val_check_interval", "1.0"]
UNNOTICED: dict[str, tuple[str, int, list[str]]] = {
    "epochs, killed in the first batch after one": ("quickstart", 16, EPOCHS),
    "epochs cut short": ("quickstart", 7, [*EPOCHS, "--trainer.limit_train_batches", "3"]),
    "epochs, loaders anew": ("quickstart", 17, [*EPOCHS, "--trainer.reload_dataloaders_every_n_epochs", "1"]),
    "new words each epoch": ("distillm2", 4, EPOCHS),
    "validation within a window": (
        "quickstart",
        10,
        ["--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "3"],
    ),
    "validation within a window, and a coin": (
        "distillm",
        10,
        ["--trainer.accumulate_grad_batches", "4", "--trainer.val_check_interval", "6"],
    ),
}


@pytest.mark.parametrize("name", UNNOTICED)
def test_checkpoints_of_validations_are_gone_on_with_to_the_last_bit(name: str, tmp_path: Path) -> None:
    config, batch, more = UNNOTICED[name]
    common = ["--data.train", str(runs.little_data(tmp_path, rows=29)), *more]
    writer = {"distillm2": "--trainer.callbacks", "distillm": "--model.responses"}
    common += [f"{writer[config]}.max_new_tokens", "4"] if config in writer else []

    def given(root: str) -> list[str]:
        return [*runs.little(tmp_path / root, config, steps=12), "--data.batch_size", "4", *common]

    assert main(given("whole")) == 0
    with pytest.raises(KeyError, match="killed"):
        main([*given("cut"), "--trainer.callbacks+", "test_resume.Dies", "--trainer.callbacks.batch", str(batch)])
    assert main([*given("cut"), "--ckpt_path", "last"]) == 0
    whole, resumed = runs.student(tmp_path / "whole"), runs.student(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_refused_resume_leaves_the_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "root"
    assert main(runs.little(root, steps=2)) == 0
    before = (root / "config.yaml").read_text()
    other = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1", "--ckpt_path", "last"]
    assert main([*runs.little(root, steps=4), *other]) == 1
    assert (
        "the checkpoint was saved with another optimizer than SGD (it has no dampening, momentum): resume with"
        in capsys.readouterr().err
    )
    assert (root / "config.yaml").read_text() == before


def test_an_override_at_resume_is_honoured(tmp_path: Path) -> None:
    root = tmp_path / "root"
    assert main(runs.little(root, steps=2)) == 0
    assert main([*runs.little(root, steps=4), "--model.temperature", "3.0", "--ckpt_path", "last"]) == 0
    assert "temperature: 3.0" in (root / "config.yaml").read_text()
    last = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 4
    assert "hyper_parameters" not in last


def test_a_rate_that_the_checkpoint_overrules_is_said(tmp_path: Path) -> None:
    root = tmp_path / "root"
    assert main([*runs.little(root, steps=2), "--model.optimizer.lr", "1e-3"]) == 0
    with pytest.warns(
        UserWarning, match=r"learning rate 0\.001 restored from the checkpoint; the configured 0\.008 is ignored"
    ):
        assert main([*runs.little(root, steps=4), "--ckpt_path", "last"]) == 0
