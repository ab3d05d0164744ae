"""Learning-rate schedules follow the run; what does not fit it, and missing metrics, are named before step 0."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, EarlyStopping, LearningRateFinder, ModelCheckpoint
from torch.optim import lr_scheduler
from transformers import get_scheduler

import runs
from kd_lightning import DistillationModule
from kd_lightning.cli.configs import expand_configs
from kd_lightning.cli.program import main, run
from kd_lightning.reporting.moved_classes import update_class_paths
from kd_lightning.training.learning_rate import schedulers
from kd_lightning.training.learning_rate.monitors import check_callbacks
from kd_lightning.training.learning_rate.run_length import schedule_notes
from kd_lightning.training.learning_rate.schedulers import WarmupLR, steps_given, whole_steps
from refusals import refused
from tiny_fits import Batch, bundled, fit, rows, split

Build = Any
SGD = functools.partial(torch.optim.SGD, lr=0.5, momentum=0.9)
BATCHES: list[Batch] = split(rows(12), *[2] * 6)


def rates(build: Build, steps: int, count: int | None = None) -> list[float]:
    """Learning rates of a run of `steps` steps."""
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))])
    with steps_given(steps):
        scheduler = build(optimizer)
    found = []
    for _ in range(count or steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("path", sorted(runs.CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_config_decays_over_its_run_whatever_its_length(path: Path) -> None:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    found, steps = config["model"]["lr_scheduler"], config["trainer"]["max_steps"]
    if found is None:
        return
    if path.stem == "real_pair":
        return
    assert found["class_path"] == "torch.optim.lr_scheduler.PolynomialLR"
    power = found["init_args"]["power"]
    ours = functools.partial(schedulers.PolynomialLR, **found["init_args"])
    before = functools.partial(lr_scheduler.PolynomialLR, total_iters=steps, power=power)
    assert rates(ours, steps) == rates(before, steps)
    longer = rates(ours, 5 * steps)
    assert min(longer) > 0 and longer[-1] < 0.05 * longer[0]


def test_the_config_of_a_real_pair_warms_up_and_decays_over_its_run_whatever_its_length() -> None:
    config = yaml.safe_load((runs.CONFIGS / "real_pair.yaml").read_text(encoding="utf-8"))
    found = config["model"]["lr_scheduler"]
    assert found["class_path"] == "WarmupLR"
    for steps in (100, config["trainer"]["max_steps"], 5_000):
        learning_rates = rates(functools.partial(WarmupLR, **found["init_args"]), steps)
        warmup = steps // 20
        assert learning_rates == rates(functools.partial(cosine, warmup=warmup, steps=steps), steps)
        assert learning_rates[0] == 0 and learning_rates[warmup] == 0.5 == max(learning_rates)
        assert 0 < learning_rates[-1] < 0.001


def cosine(optimizer: torch.optim.Optimizer, warmup: int, steps: int) -> Any:
    """The schedule of transformers."""
    return get_scheduler("cosine", optimizer, warmup, steps)


RELATIVE = {
    "PolynomialLR": ({"total_iters": None}, {"total_iters": 40}),
    "LinearLR": (
        {"total_iters": 0.25, "end_factor": 0.1, "start_factor": 1.0},
        {"total_iters": 10, "end_factor": 0.1, "start_factor": 1.0},
    ),
    "ConstantLR": ({"total_iters": 0.5}, {"total_iters": 20}),
    "CosineAnnealingLR": ({"T_max": None}, {"T_max": 40}),
    "CosineAnnealingWarmRestarts": ({"T_0": 0.5}, {"T_0": 20}),
    "StepLR": ({"step_size": 0.1}, {"step_size": 4}),
    "MultiStepLR": ({"milestones": [0.5, 30]}, {"milestones": [20, 30]}),
    "CyclicLR": (
        {"base_lr": 0.1, "max_lr": 1.0, "step_size_up": 0.25, "step_size_down": 0.5},
        {"base_lr": 0.1, "max_lr": 1.0, "step_size_up": 10, "step_size_down": 20},
    ),
    "OneCycleLR": ({"max_lr": 1.0}, {"max_lr": 1.0, "total_steps": 40}),
}


@pytest.mark.parametrize("name", RELATIVE)
def test_lengths_relative_to_the_run_equal_whole_steps(name: str) -> None:
    relative, whole = RELATIVE[name]
    theirs = rates(functools.partial(getattr(lr_scheduler, name), **whole), 40)
    assert rates(functools.partial(getattr(schedulers, name), **relative), 40) == theirs
    assert rates(functools.partial(getattr(schedulers, name), **whole), 70, 40) == theirs  # PyTorch's, any run


@pytest.mark.parametrize("length", [0, -3, 0.0, 1.5, True, "7"])
def test_a_length_out_of_range_is_refused(length: Any) -> None:
    with pytest.raises(ValueError, match=rf"T_max must be .*got {re.escape(repr(length))}"), steps_given(10):
        whole_steps("T_max", length)
    with pytest.raises(ValueError, match=r"T_max null follows the length of the run.*trainer\.max_steps"):
        whole_steps("T_max", None)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant_with_warmup", "polynomial", "inverse_sqrt"])
def test_warm_up_by_the_names_of_transformers(name: str) -> None:
    theirs = rates(lambda optimizer: get_scheduler(name, optimizer, 5, 50), 50)
    assert rates(functools.partial(WarmupLR, name=name, num_warmup_steps=0.1), 50) == theirs


def test_a_name_or_a_function_of_transformers_stands_for_the_class() -> None:
    expected = {"class_path": schedulers.__name__ + ".WarmupLR", "init_args": {"name": "linear"}}
    assert update_class_paths({"model": {"lr_scheduler": "linear"}}) == {"model": {"lr_scheduler": expected}}
    by_path = {"class_path": "transformers.get_linear_schedule_with_warmup", "init_args": {"num_warmup_steps": 3}}
    found = update_class_paths({"lr_scheduler": by_path})["lr_scheduler"]
    assert found == {**expected, "init_args": {"name": "linear", "num_warmup_steps": 3}}
    words = expand_configs(["fit", "--model.lr_scheduler", "linear", "--model.lr_scheduler=StepLR"])
    assert yaml.safe_load(words[2]) == expected
    assert words[3].endswith("schedulers.StepLR")


def lengths(**kwargs: Any) -> Any:
    return functools.partial(schedulers.PolynomialLR, **kwargs)


NOTES = {
    "ends": (lengths(total_iters=20), "ends at step 20, the run at step 100: the learning rate is 0"),
    "longer": (lengths(total_iters=300), "the run ends at step 100, before PolynomialLR does at step 300"),
    "rises": (functools.partial(lr_scheduler.CosineAnnealingLR, T_max=30), "the learning rate rises again"),
    "warm-up": (functools.partial(WarmupLR, num_warmup_steps=100), "the warm-up at step 100"),
    "hugging face": (lambda optimizer: get_scheduler("linear", optimizer, 2, 40), "ends at step 40"),
    "hugging face cosine": (functools.partial(WarmupLR, num_training_steps=40), "rises again"),
    "step": (functools.partial(lr_scheduler.StepLR, step_size=100), "step_size 100"),
    "milestones": (functools.partial(lr_scheduler.MultiStepLR, milestones=[5, 400]), "milestones 400"),
    "falls": (functools.partial(lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.2, total_iters=9), "0.2 times"),
}


@pytest.mark.parametrize("name", NOTES)
def test_a_schedule_that_does_not_fit_the_run_is_named(name: str) -> None:
    build, text = NOTES[name]
    with steps_given(100):
        (note,) = schedule_notes(build(SGD([torch.nn.Parameter(torch.zeros(1))])), 100)
    assert text in note


def test_a_schedule_that_fits_has_no_note() -> None:
    builds = [lengths(), functools.partial(schedulers.LinearLR, total_iters=9), WarmupLR, schedulers.CosineAnnealingLR]
    for build in [*builds, functools.partial(schedulers.OneCycleLR, max_lr=1.0)]:
        with steps_given(100):
            assert not list(schedule_notes(build(SGD([torch.nn.Parameter(torch.zeros(1))])), 100))


def test_a_resumed_run_with_more_steps_keeps_its_own_length() -> None:
    def built(steps: int) -> tuple[torch.optim.Optimizer, schedulers.PolynomialLR]:
        optimizer = SGD([torch.nn.Parameter(torch.zeros(1))])
        with steps_given(steps):
            return optimizer, schedulers.PolynomialLR(optimizer)

    _, first = built(10)
    for _ in range(5):
        first.optimizer.step()
        first.step()
    optimizer, second = built(20)
    second.load_state_dict(first.state_dict())
    assert second.total_iters == 20
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * 0.75)


# ------------------------------------------------------------------------------------------------------------- in a run
def test_one_cycle_that_is_too_short_is_refused_before_step_0() -> None:
    short = functools.partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=4)
    module = bundled(optimizer=SGD, lr_scheduler=short)
    with pytest.raises(ValueError, match="OneCycleLR has 4 steps and the run 6"):
        fit(module, BATCHES)
    assert module.trainer.global_step == 0


def test_one_cycle_on_a_fresh_run_mentions_no_checkpoint(recwarn: pytest.WarningsRecorder) -> None:
    fit(bundled(optimizer=SGD, lr_scheduler=functools.partial(schedulers.OneCycleLR, max_lr=0.1)), BATCHES)
    assert not [one for one in recwarn if "checkpoint" in str(one.message)]


def test_plateau_steps_once_per_validation_with_the_default_monitor() -> None:
    never = {"threshold": 1e9, "threshold_mode": "abs"}  # no value is an improvement
    plateau = functools.partial(schedulers.ReduceLROnPlateau, factor=0.5, patience=0, **never)
    module = fit(bundled(optimizer=SGD, lr_scheduler=plateau), BATCHES, BATCHES[:1], val_check_interval=2)
    config = module.trainer.lr_scheduler_configs[0]
    assert config.scheduler.last_epoch == 3
    assert module.trainer.optimizers[0].param_groups[0]["lr"] == 0.5 * 0.5**2  # the first value is the best


MODULE = DistillationModule("asset:student", "asset:teacher")
CALLBACKS: dict[str, tuple[Callback, str]] = {
    "early": (EarlyStopping("val_loss"), "EarlyStopping: monitor must be one of val/kd, .*got 'val_loss'"),
    "checkpoint": (ModelCheckpoint(monitor="val/acc"), "ModelCheckpoint: monitor must be one of .*got 'val/acc'"),
    "train": (EarlyStopping("train/lost"), "got 'train/lost'"),
    "rate": (LearningRateFinder(), "LearningRateFinder is not supported"),
    "size": (BatchSizeFinder(), "BatchSizeFinder is not supported"),
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_that_would_end_the_run_is_refused_before_step_0(name: str) -> None:
    callback, text = CALLBACKS[name]
    with pytest.raises(ValueError, match=text):
        check_callbacks([callback], MODULE, True)


def test_a_monitor_without_validation_is_refused() -> None:
    with pytest.raises(ValueError, match="EarlyStopping: monitor val/ce needs validation"):
        fit(MODULE, BATCHES, callbacks=[EarlyStopping("val/ce")])


# ------------------------------------------------------------------------------------------------------ in the program
def words(folder: Path) -> list[str]:
    data = str(runs.little_data(folder))
    found = ["--config", str(runs.CONFIGS / "jsd.yaml"), "--trainer.default_root_dir", str(folder / "root"), *runs.CPU]
    found += ["--data.train", data, "--data.val", data, "--data.test", "null", "--data.batch_size", "16"]
    return [*found, *runs.QUIET]


def test_lengths_and_names_are_accepted_on_the_command_line(tmp_path: Path) -> None:
    for given, name in (
        (["--model.lr_scheduler.total_iters", "0.25"], "PolynomialLR"),
        (["--model.lr_scheduler", "cosine", "--model.lr_scheduler.num_warmup_steps", "0.05"], "WarmupLR"),
        (["--model.lr_scheduler", "torch.optim.lr_scheduler.CosineAnnealingLR"], "CosineAnnealingLR"),
    ):
        module = run(["fit", *words(tmp_path), *given], start=False).model
        with steps_given(80):
            scheduler = module.lr_scheduler_callable(SGD([torch.nn.Parameter(torch.zeros(1))]))  # type: ignore[misc]
        assert type(scheduler).__name__ == name


def test_the_program_refuses_a_monitor_that_is_not_logged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = ["--model.lr_scheduler", "ReduceLROnPlateau", "--model.lr_scheduler.monitor", "loss"]
    refused(["fit", *words(tmp_path), *given], ["model.lr_scheduler.monitor", "val/kd", "'loss'"], capfd)


def test_the_smaller_limit_counts_in_fit_and_report(tmp_path: Path) -> None:
    given = ["--trainer.max_epochs", "2", "--model.lr_scheduler.total_iters", "50"]
    assert main(["fit", *words(tmp_path), *given]) == 0
    report = (tmp_path / "root" / "report.md").read_text(encoding="utf-8")
    assert "the run ends at step 6, before PolynomialLR does at step 50" in report
    assert "validation never runs: the first one is due after 500 training batches, and the run has 6" in report
