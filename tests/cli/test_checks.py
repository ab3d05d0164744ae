"""Configurations that cannot run are refused with one line, before a folder is created."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.utilities import rank_zero_info  # noqa: F401 - its log handler keeps the stream of its import

import runs
from kd_lightning.cli.checks.changed_classes import changed_class_notices
from kd_lightning.cli.configs import expand_configs, hide_contents
from kd_lightning.cli.error_messages import unknown_argument
from kd_lightning.cli.program import run
from refusals import refused

SECTIONS: dict[str, tuple[object, str]] = {
    "trainer": (3, "trainer must be a mapping of arguments to values, got 3"),
    "results": (None, "results must be a mapping of arguments to values, got null"),
    "data": ([1], "data must be a mapping of arguments to values or the name of a class, got [1]"),
    "export": ("best", "export must be a mapping of arguments to values, got 'best'"),
    "generation": (True, "generation must be a mapping of arguments to values, got True"),
    "model": (["asset:student"], "model must be a mapping of arguments to values, got ['asset:student']"),
}


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("inline", [True, False])
def test_a_section_of_the_wrong_type(name: str, inline: bool, tmp_path: Path) -> None:
    value, said = SECTIONS[name]
    source = json.dumps({name: value})
    if not inline:
        (tmp_path / "bad.yaml").write_text(source)
        source = str(tmp_path / "bad.yaml")
    with pytest.raises(ValueError) as found:
        expand_configs(["fit", "--config", source])
    assert said in str(found.value)
    assert inline or str(tmp_path / "bad.yaml") in str(found.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"- a\n- b\n", "holds no mapping of arguments to values"),
        (b"hunter2 and more\n", "holds no mapping of arguments to values"),
        (b"model:\n  student: [hunter2\nx: y", "line 3: not readable as YAML"),
        (b"\xff\xfe", "not a text in UTF-8"),
    ],
)
def test_a_config_that_is_none(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    for option in ("--config", "--trainer"):
        with pytest.raises(ValueError) as found:
            expand_configs(["fit", f"{option}={path}"])
        assert f"{option} {path}" in str(found.value)
        assert said in str(found.value)
        assert "hunter2" not in str(found.value)


NAN = {"class_path": "PolynomialLR", "init_args": {"power": float("nan")}}
# Each is refused before anything is written; a dictionary is given as a config.
REFUSED: dict[str, tuple[list[str] | dict[str, object], list[str]]] = {
    "section on the command line": (["--samples", "4"], ["samples must be a mapping", "'4'"]),
    "student of a class": ({"model": {"student": {"class_path": "torch.nn.ReLU"}}}, ["model.student must be a folder"]),
    "student that is a number": ({"model": {"student": 3.5}}, ["model.student must be a folder", "3.5"]),
    "optimizer of another role": (["--model.optimizer", "torch.nn.ReLU"], ["model.optimizer must be an optimizer"]),
    "optimizer that is a number": ({"model": {"optimizer": 1}}, ["model.optimizer must be an optimizer", "got 1"]),
    "scheduler by a short name": (
        ["--model.lr_scheduler", "lineal"],
        ["must be a learning rate scheduler", "LinearLR"],
    ),
    "scheduler of another role": (["--model.lr_scheduler", "torch.optim.Adam"], ["must be a learning rate scheduler"]),
    "scheduler without an argument": (
        ["--model.lr_scheduler", "StepLR"],
        ["step_size", "--model.lr_scheduler.step_size VALUE"],
    ),
    "divergence of another role": (["--model.objective", "torch.nn.ReLU"], ["model.objective must be one of AMiD"]),
    "learning rate": (["--model.optimizer.lr=-2"], ["model.optimizer: Invalid lr: -2"]),
    "learning rate that is infinite": ({"model": {"optimizer": {"init_args": {"lr": float("inf")}}}}, ["lr", "finite"]),
    "betas": (["--model.optimizer.betas", "[1.5, 0.9]"], ["model.optimizer: Invalid betas at index 0: 1.5"]),
    "weight decay": (["--model.optimizer.weight_decay=-3"], ["model.optimizer", "weight_decay", "-3"]),
    "power": ({"model": {"lr_scheduler": NAN}}, ["model.lr_scheduler.power must be a finite number, got nan"]),
    "warm-up": (
        ["--model.lr_scheduler", "LinearLR", "--model.lr_scheduler.total_iters=-5"],
        ["model.lr_scheduler: total_iters must be at least 1 step, got -5"],
    ),
    "period": (
        ["--model.lr_scheduler", "StepLR", "--model.lr_scheduler.step_size", "0"],
        ["model.lr_scheduler: step_size must be at least 1 step, got 0"],
    ),
    "temperature": ({"model": {"temperature": float("nan")}}, ["model.temperature must be a finite number, got nan"]),
    "val_check_interval": (["--trainer.val_check_interval=-4"], ["trainer.val_check_interval", "-4"]),
    "val_check_interval in batches": (["--trainer.val_check_interval", "0.0"], ["trainer.val_check_interval", "0.0"]),
    "accumulate_grad_batches": (["--trainer.accumulate_grad_batches=-7"], ["accumulate_grad_batches", "-7"]),
    "devices": (["--trainer.devices", "0"], ["trainer.devices must be 'auto' or a number of at least 1, got '0'"]),
    "no number of devices": (["--trainer.devices", "two"], ["trainer.devices", "'two'"]),
    "share of a device": (["--trainer.devices", "0.5"], ["trainer.devices", "'0.5'"]),
    "list of devices": (["--trainer.devices", "0,-1"], ["trainer.devices must list indices"]),
    "many devices": (["--trainer.devices", "4000"], ["trainer.devices must be at most", "4000"]),
    "num_nodes": (["--trainer.num_nodes=-1"], ["trainer.num_nodes must be at least 1, got -1"]),
    "gradient_clip_val": (["--trainer.gradient_clip_val=-0.5"], ["trainer.gradient_clip_val", "-0.5"]),
    "log_every_n_steps": (["--trainer.log_every_n_steps=-1"], ["trainer.log_every_n_steps", "-1"]),
    "max_steps": (["--trainer.max_steps=-5"], ["trainer.max_steps must be at least -1 (-1: no limit), got -5"]),
    "max_epochs": (["--trainer.max_epochs=-5"], ["trainer.max_epochs must be at least -1 (-1: no limit), got -5"]),
    "limit_test_batches": (["--trainer.limit_test_batches", "2.5"], ["trainer.limit_test_batches", "2.5"]),
    "limit_train_batches": ({"trainer": {"limit_train_batches": float("nan")}}, ["limit_train_batches", "nan"]),
    "precision": (["--trainer.precision", "8bit"], ["trainer.precision must be one of", "bf16-mixed", "'8bit'"]),
    "precision without its package": (
        ["--trainer.precision", "transformer-engine-float16"],
        ["transformer-engine-float16 needs the package transformer_engine"],
    ),
    "no integer": (["--trainer.max_steps", "2.5"], ["trainer.max_steps must be int, got '2.5'"]),
    "teacher": (["--model.teacher", "/nowhere/model"], ["/nowhere/model"]),
    "validation file": (["--data.val", "/nowhere/rows.jsonl"], ["/nowhere/rows.jsonl"]),
    "test file": (["--data.test", "/nowhere/rows.jsonl", "--trainer.limit_test_batches", "1"], ["/nowhere/rows.jsonl"]),
    "task": (
        ["--results.task", "poem", "--trainer.limit_test_batches", "1"],
        ["results.task must be the `task` of a test row (one of category, ", "'poem'"],
    ),
    "monitor of the export": (
        ["--export.which", "best", "--export.monitor", "val/bleu"],
        ["export.monitor must be one of val/", "'val/bleu'"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_nothing_is_written_before_the_arguments_are_checked(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given, said = REFUSED[name]
    if isinstance(given, dict):
        (tmp_path / "more.yaml").write_text(yaml.safe_dump(given))
        given = ["--config", str(tmp_path / "more.yaml")]
    root = tmp_path / "runs" / "root"
    refused([*runs.little(root), *given], said, capfd)
    assert not root.parent.exists()


def test_a_folder_that_is_there_is_left_as_it_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    refused([*runs.little(tmp_path), "--model.optimizer.lr=-2"], ["Invalid lr"], capfd)
    refused([*runs.little(tmp_path), "--data.val", "/nowhere.jsonl"], ["/nowhere.jsonl"], capfd)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    "option",
    ["--model.objective", "--model.lora", "--model.optimizer", "--trainer.callbacks", "--trainer.logger", "--data"],
)
@pytest.mark.parametrize("content", ["swordfish\n", "password: swordfish\n", "- swordfish\n", "a: [swordfish\n"])
def test_the_contents_of_a_file_are_not_shown(
    option: str, content: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "secret.txt"
    path.write_text(content)
    inside = option.removeprefix("--").split(".")
    nested: object = str(path)
    for part in reversed(inside):
        nested = {part: nested}
    for given in ([option, str(path)], [f"{option}={path}"], ["--config", json.dumps(nested)]):
        line = refused([*runs.little(tmp_path / "root"), *given], [inside[-1]], capfd)
        assert "swordfish" not in line
        assert "password" not in line


def test_an_error_without_the_words_of_a_file_stays() -> None:
    text = 'Parser key "trainer.max_steps": Expected an int'
    assert hide_contents(text, ["fit"]) == text


NAMES = ["model.student", "model.lora.r", "model.optimizer", "model.lr_scheduler", "model.objective", "model.lora"]
NAMES += ["export.which", "export.monitor", "trainer.max_steps", "trainer.devices", "data.batch_size", "data.train"]
NAMES += ["results.batch_size", "results.task", "trainer.default_root_dir", "samples.rows", "generation.rows"]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("lr", "model.optimizer.lr"),
        ("model.lr", "model.optimizer.lr"),
        ("model.learning_rate", "model.optimizer.lr"),
        ("trainer.epochs", "trainer.max_epochs"),
        ("batch_size", "data.batch_size"),
        ("trainer.batch_size", "data.batch_size"),
        ("prompts", "data.train"),
        ("max_steps", "trainer.max_steps"),
        ("task", "results.task"),
        ("model.optimizr.lr", "model.optimizer.lr"),
        ("modle.optimizer.lr", "model.optimizer.lr"),
        ("output_dir", "trainer.default_root_dir"),
        ("rows", None),  # two arguments have this name
        ("export.push_to_hub", None),
        ("model.wings", None),
        ("model.lora.q", None),
    ],
)
def test_a_hint_names_what_was_meant_or_nothing(given: str, meant: str | None) -> None:
    line = unknown_argument(f"unrecognized arguments: --{given} 1", NAMES)
    assert line.endswith(": --help lists the arguments" if meant is None else f"(did you mean --{meant}?)")


@pytest.mark.parametrize("name", ["kl", "KLDiv", "fkl", "RKL", "jsd", "tvd", "forwardkl"])
def test_a_divergence_by_another_name(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    meant = {"kl": "ForwardKL or ReverseKL", "KLDiv": "ForwardKL or ReverseKL", "fkl": "ForwardKL", "RKL": "ReverseKL"}
    meant |= {"jsd": "GeneralizedJSD", "tvd": "TotalVariation", "forwardkl": "ForwardKL"}
    refused(
        [*runs.little(tmp_path / "root"), "--model.objective", name],
        [f"model.objective: unknown class {name} (did you mean {meant[name]}?)"],
        capfd,
    )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ["--model.optimizer", "SGD"],
            "SGD instead of AdamW: keeps lr 0.008, weight_decay 0.1 of the config and",
        ),
        (
            ["--model.optimizer=Rprop", "--model.optimizer.lr", "1"],
            "Rprop instead of AdamW: has no betas, ",
        ),
        (["--model.optimizer", "AdamW"], None),
        (["--model.optimizer.lr", "0.1"], None),
    ],
)
def test_another_optimizer_says_what_it_keeps(more: list[str], said: str | None, tmp_path: Path) -> None:
    words = expand_configs([*runs.little(tmp_path / "root"), *more])
    lines = changed_class_notices(words, run(words, start=False).parsed)
    assert len(lines) == (said is not None)
    assert said is None or f"--model.optimizer {said}" in lines[0]


@pytest.mark.parametrize("name", ["CSVLogger", "lightning.pytorch.loggers.TensorBoardLogger"])
@pytest.mark.parametrize("in_config", [False, True])
def test_a_logger_writes_into_the_folder_of_the_run(name: str, in_config: bool, tmp_path: Path) -> None:
    named: list[str] = ["--trainer.logger", name]
    if in_config:
        named = ["--config", json.dumps({"trainer": {"logger": [{"class_path": name, "init_args": {"name": "x"}}]}})]
    cli = run([*runs.little(tmp_path / "root"), *named], start=False)
    assert [type(logger).__name__ for logger in cli.trainer.loggers] == [name.rpartition(".")[2]]
    assert cli.trainer.loggers[0].save_dir == str(tmp_path / "root")
    assert not (tmp_path / "root").exists()
