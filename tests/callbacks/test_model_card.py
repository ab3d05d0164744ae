"""The model card of an exported student, and its upload to the hub."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import huggingface_hub
import pytest
import yaml

import runs
from kd_lightning.callbacks import HFExport
from kd_lightning.cli.program import main
from kd_lightning.reporting import hub
from kd_lightning.reporting.model_card import model_card
from kd_lightning.reporting.run_dir import RunFolder


class Hub:
    """Stands for `huggingface_hub.HfApi`; keeps what it is called with."""

    calls: ClassVar[list[tuple[str, str]]] = []
    card = ""
    fails = ""

    def create_repo(self, name: str, private: bool, exist_ok: bool) -> None:
        assert private and exist_ok
        self._called("create", name)

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> Any:
        self._called("upload", repo_id)
        Hub.card = (folder_path / "README.md").read_text(encoding="utf-8")
        assert (folder_path / "model.safetensors").is_file()
        return SimpleNamespace(repo_url=f"https://hub/{repo_id}")

    def _called(self, what: str, name: str) -> None:
        Hub.calls.append((what, name))
        if Hub.fails == what:
            raise RuntimeError("no answer\nfrom hf_abcdEFGH1234567890")


@pytest.fixture
def hub_stub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    Hub.calls, Hub.card, Hub.fails = [], "", ""
    return Hub


def run(folder: Path, *more: str) -> int:
    data = str(runs.little_data(folder, rows=12))
    words = ["--data.train", data, "--data.test", data, "--results.max_new_tokens", "4", *more]
    return main([*runs.little(folder / "run", "jsd", test=True), *words])


def test_a_run_is_uploaded_with_its_card(
    hub_stub: type[Hub], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--export.push_to_hub", "me/student") == 0
    assert hub_stub.calls == [("create", "me/student"), ("upload", "me/student")]
    assert "uploaded" in capsys.readouterr().err
    assert hub_stub.card == (tmp_path / "run" / "student" / "README.md").read_text(encoding="utf-8")
    after = runs.results(tmp_path / "run")["student_after"]
    assert f"| student after | {after['nll']:.3f} | {after['forward_kl']:.3f} |" in hub_stub.card
    front = yaml.safe_load(hub_stub.card.split("---")[1])
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["knowledge-distillation", "kd-lightning"],
    }  # `asset:student` is no name of the hub
    assert "| teacher | `asset:teacher` |" in hub_stub.card
    assert "| objective | `GeneralizedJSD` |" in hub_stub.card.replace("kd_lightning.", "").replace("divergences.", "")
    for split, line in RunFolder.read(tmp_path / "run").rows.items():
        assert f"| {split} | `{line}` |" in hub_stub.card


def test_a_failed_upload_says_how_to_repeat_it_and_the_run_is_whole(
    hub_stub: type[Hub], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub_stub.fails = "upload"
    assert run(tmp_path, "--export.push_to_hub", "me/student") == 0
    said = capsys.readouterr().err
    assert f"upload it later: hf upload me/student {tmp_path / 'run' / 'student'}" in said
    assert "abcdEFGH" not in said
    assert (tmp_path / "run" / "student" / "README.md").is_file()


def test_nothing_is_trained_if_the_hub_refuses(
    hub_stub: type[Hub], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub_stub.fails = "create"
    assert run(tmp_path, "--export.push_to_hub", "me/student") == 1
    assert "export.push_to_hub me/student: no answer from" in capsys.readouterr().err
    assert not (tmp_path / "run" / "student").exists()


def test_a_token_and_a_name_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match="run `hf auth login`, or set the environment variable HF_TOKEN"):
        hub.create_repository("me/student")
    with pytest.raises(ValueError, match=r"export.push_to_hub must be the name of a repository .*got 'a/b/c'"):
        HFExport(push_to_hub="a/b/c")


def test_a_model_of_the_hub_is_the_base_and_a_folder_is_not() -> None:
    config = {"model.student": "org/small", "model.teacher.class_path": "kd_lightning.ServerTeacher"}
    text = model_card(RunFolder(Path("run"), config, None, {}))
    assert yaml.safe_load(text.split("---")[1])["base_model"] == "org/small"
    assert "| teacher | `ServerTeacher` |" in text
    text = model_card(RunFolder(Path("run"), {"model.student": "/home/me/small"}, None, {}))
    assert "base_model" not in text
