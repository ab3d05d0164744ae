"""Classes that moved keep working under their old path: in a config file, in an inline config, and as a value."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import yaml

import runs
from kd_lightning.cli.program import main
from kd_lightning.reporting.moved_classes import MOVED_CLASSES, update_class_paths

REPLAY = {"class_path": "kd_lightning.replay.AdaptiveReplay", "init_args": {"threshold": 0.2}}


@pytest.mark.parametrize("old", MOVED_CLASSES)
def test_each_path_leads_to_a_class(old: str) -> None:
    module, _, name = MOVED_CLASSES[old].rpartition(".")
    found = getattr(importlib.import_module(module), name)
    assert isinstance(found, type)
    assert found.__name__ == name
    assert name == old.rpartition(".")[2] or old == "kd_lightning.storage.WholeCheckpointIO"
    with pytest.raises((ImportError, AttributeError)):  # a path that still leads somewhere needs no entry
        getattr(importlib.import_module(old.rpartition(".")[0]), name)


def test_every_value_of_a_config_is_looked_at() -> None:
    config = {"a": [{"class_path": "kd_lightning.lora.LoRA"}], "b": "kd_lightning.lora.LoRA", "c": "x", "d": [1, None]}
    new = {"a": [{"class_path": "kd_lightning.LoRA"}], "b": "kd_lightning.LoRA", "c": "x", "d": [1, None]}
    assert update_class_paths(config) == new


def printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    """The config that a fit with these arguments would use."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "quickstart", *words, "--print_config"])
    assert stop.value.code == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def test_a_path_that_moved_in_a_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(json.dumps({"model": {"responses": REPLAY}}))
    (tmp_path / "replay.yaml").write_text(json.dumps(REPLAY))
    for words in (
        ["--config", str(tmp_path / "config.yaml")],
        [f"--config={tmp_path / 'config.yaml'}"],
        ["--config", json.dumps({"model": {"responses": REPLAY}})],
        ["--model.responses", json.dumps(REPLAY)],
        ["--model.responses", str(tmp_path / "replay.yaml")],
        ["--model.responses", REPLAY["class_path"], "--model.responses.threshold", "0.2"],
        [f"--model.responses={REPLAY['class_path']}", "--model.responses.threshold=0.2"],
    ):
        responses = printed(words, capsys)["model"]["responses"]
        assert isinstance(responses, dict), words
        assert responses["class_path"] == "kd_lightning.AdaptiveReplay"
        assert responses["init_args"]["threshold"] == 0.2


def test_callbacks_plugins_and_data_under_old_paths(capsys: pytest.CaptureFixture[str]) -> None:
    callback = "kd_lightning.generation_quality.GenerationQuality"
    words = ["--trainer.callbacks+", callback, "--trainer.callbacks.rows", "8"]
    words += ["--trainer.plugins", json.dumps([{"class_path": "kd_lightning.storage.WholeCheckpointIO"}])]
    words += ["--data", "kd_lightning.data.prompted.PromptDataModule", *runs.CPU]
    found = printed(words, capsys)
    assert found["data"]["class_path"] == "kd_lightning.PromptDataModule"
    assert "kd_lightning.callbacks.GenerationQuality" in json.dumps(found["trainer"]["callbacks"])
    assert "AtomicCheckpointIO" in json.dumps(found["trainer"]["plugins"])
