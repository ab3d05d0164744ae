"""A custom teacher with the abstract members alone works in every command, or is refused with an instruction."""

from __future__ import annotations

from pathlib import Path

import pytest

import runs
from kd_lightning import Teacher
from kd_lightning.cli.program import main
from kd_lightning.teachers.base import generating_model
from refusals import refused

SOURCE = """
import torch

from kd_lightning import Head, Teacher


class Bigram(Teacher):
    def __init__(self, split: bool = True) -> None:
        self.split, self.embedding, self.weight = split, None, None

    @property
    def name(self):
        return None

    @property
    def head(self):
        return Head(self.weight) if self.split else None

    def load(self, device="cpu"):
        if self.weight is None:
            numbers = torch.Generator().manual_seed(0)
            self.embedding, self.weight = (torch.randn(2048, 16, generator=numbers) for _ in range(2))
        self.to(device)

    def to(self, device):
        self.embedding, self.weight = self.embedding.to(device), self.weight.to(device)

    def hidden(self, batch):
        return self.embedding[batch["input_ids"]]

    def logits(self, batch):
        return self.hidden(batch) @ self.weight.T

    def fingerprint(self):
        return "a bigram model"
"""
SPLIT = pytest.mark.parametrize("split", ["true", "false"], ids=["hidden", "logits"])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the user is in, with the teacher's file next to the data."""
    (tmp_path / "bigram_teacher.py").write_text(SOURCE)
    runs.little_data(tmp_path, rows=24)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def words(split: str, *extra: str, config: str = "quickstart") -> list[str]:
    """Arguments of a short fit from the custom teacher."""
    teacher = ["--model.teacher", "bigram_teacher.Bigram", "--model.teacher.split", split]
    few = ["--data.train", "train.jsonl", "--data.val", "train.jsonl", "--data.test", "train.jsonl"]
    return [*runs.little(Path("root"), config, steps=2, test=True), *teacher, *few, *extra]


@SPLIT
def test_fit_validate_and_test(split: str, folder: Path) -> None:
    short = ["--trainer.limit_test_batches", "2", "--results.max_new_tokens", "2"]
    assert main(words(split, *short, "--generation.every_n_validations", "1", "--generation.rows", "2")) == 0
    table = runs.results(folder / "root")
    assert table["teacher"]["nll"] > 0 and table["teacher"]["exact_match"] is None
    assert table["student_after"]["forward_kl"] < table["student_before"]["forward_kl"]
    for verb in ("validate", "test"):
        assert main([verb, *words(split)[1:], "--ckpt_path", "last"]) == 0


@SPLIT
def test_cached_once_and_read(split: str, folder: Path) -> None:
    kind = ["--kind", "hidden", "--dtype", "float32"] if split == "true" else ["--kind", "top_k", "--k", "9"]
    assert main(["cache", *words(split)[1:], "--output", "cache", *kind]) == 0
    cached = ["--model.teacher", "CachedTeacher", "--model.teacher.path", "cache"]
    plain = runs.little(Path("from_cache"), steps=2)
    assert (
        main([*plain, *cached, "--data.train", "train.jsonl", "--data.val", "train.jsonl", "--data.test", "null"]) == 0
    )
    if split == "true":
        assert main([*words(split, "--model.teacher_cache", "true"), "--trainer.default_root_dir", "other"]) == 0
        live, read = runs.student(folder / "from_cache"), runs.student(folder / "other")
        assert live.keys() == read.keys()


@SPLIT
def test_preflight(split: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["preflight", *words(split)[1:]])
    out = capsys.readouterr()
    assert "Traceback" not in out.out + out.err
    assert code in (0, 1) and "memory and time" in out.out + out.err


@SPLIT
def test_a_plan_needs_a_configuration(split: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    refused(["plan", *words(split)[1:], "--world_size", "1"], ["Bigram has no configuration", "pass a model"], capfd)


def test_it_cannot_generate(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said = ["Regeneration", "teacher that can generate", "got Bigram"]
    refused(words("true", "--data.val", "asset:validation", config="seqkd"), said, capfd)
    mixed = ["--model.responses", "MiniLLM", "--model.responses.max_new_tokens", "4", "--model.responses.teacher_share"]
    refused(words("true", *mixed, "0.2"), ["teacher_share must be 0", "can generate", "got Bigram"], capfd)
    assert main(words("true", *mixed, "0.0", "--trainer.limit_test_batches", "0")) == 0


def test_what_the_contract_says_of_it(folder: Path) -> None:
    from bigram_teacher import Bigram  # type: ignore[import-not-found]

    split, whole = Bigram(), Bigram(split=False)
    for teacher in (split, whole):
        assert isinstance(teacher, Teacher)
        teacher.load()
        assert (teacher.model, teacher.can_generate, generating_model(teacher)) == (None, False, None)
        assert teacher.config_source is None and not teacher.shares_student
    assert (split.vocabulary, whole.vocabulary) == (2048, None)
