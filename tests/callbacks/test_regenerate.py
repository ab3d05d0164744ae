"""Responses generated in a run: SeqKD before the first step, DistiLLM-2 before each pass; killed and resumed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch

import runs
from generated_runs import ROWS, contrastive, seqkd
from kd_lightning import DistillationModule
from kd_lightning.callbacks.regenerate import Regeneration
from kd_lightning.cli.program import main
from kd_lightning.data import IGNORE_INDEX, ContrastiveDataModule, PromptDataModule
from kd_lightning.generation.batch_generator import BatchGenerator
from kd_lightning.generation.response_file import Response
from refusals import refused


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.little_data(tmp_path_factory.mktemp("data"), ROWS)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of SeqKD."""
    root = tmp_path_factory.mktemp("whole") / "root"
    assert main(seqkd(root, data)) == 0
    return root


def said(root: Path, side: str = "teacher", number: int = 0) -> dict[int, str]:
    """The finished responses in a file, by row."""
    path = root / "responses" / f"{side}-pass-{number:04d}.0-of-1.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["row_id"]: row["response"] for row in rows if row["finish_reason"] == "eos" and row["response"].strip()}


def same(first: Path, second: Path) -> bool:
    a, b = runs.student(first), runs.student(second)
    return all(torch.equal(a[name], b[name]) for name in a)


# --------------------------------------------------------------------------------------------------------------- SeqKD
def test_what_is_learned_is_what_the_teacher_said(data: Path, whole: Path) -> None:
    words = said(whole)
    assert len(words) > ROWS // 2
    module = PromptDataModule(str(data), tokenizer="asset:student", batch_size=5, max_length=128)
    module.setup("fit")
    assert module.missing_responses() == list(range(ROWS))
    with pytest.raises(
        ValueError, match=r"prompts without responses: add a Regeneration callback to trainer.callbacks"
    ):
        module.train_dataloader()
    module.replace_responses(words)
    assert module.report["train"]["kept"] == len(words)
    assert module.report["train"]["empty"] == ROWS - len(words)
    seen: dict[int, str] = {}
    for batch in module.train_dataloader():
        assert batch["source"].eq(1).all()
        for number, labels in zip(batch["row_ids"].tolist(), batch["labels"], strict=True):
            counted = labels[labels != IGNORE_INDEX]
            assert counted[-1] == module.tokenizer.eos_token_id
            seen[number] = module.tokenizer.decode(counted[:-1])
    assert seen == words
    with pytest.raises(ValueError, match="already have responses: PromptDataModule takes them once"):
        module.replace_responses(words)


def test_answers_of_the_file_play_no_part(data: Path, whole: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row.pop("output")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(seqkd(tmp_path / "root", tmp_path / "rows.jsonl")) == 0
    assert same(whole, tmp_path / "root")


def killed_when(words: list[str], path: Path, size: int) -> None:
    process = runs.start(words)
    while not (path.exists() and path.stat().st_size > size):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.kill()
    process.communicate()


def test_killed_while_the_teacher_writes(data: Path, whole: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    file = root / "responses" / "teacher-pass-0000.0-of-1.jsonl"
    more = ("--trainer.callbacks.batch_size", "2")  # many small batches
    other = tmp_path / "other"
    assert main(seqkd(other, data, *more)) == 0
    killed_when(seqkd(root, data, *more), file, 300)
    left = file.read_bytes()
    assert 0 < left.count(b"\n") < ROWS
    assert main(seqkd(root, data, *more)) == 0
    assert file.read_bytes().startswith(left)
    assert said(root) == said(other) and same(other, root)


def test_killed_in_training_and_resumed(data: Path, whole: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    assert main(seqkd(root, data, steps=3)) == 0
    before = (root / "responses" / "teacher-pass-0000.0-of-1.jsonl").read_bytes()
    assert main(seqkd(root, data, "--ckpt_path", "last")) == 0
    assert (root / "responses" / "teacher-pass-0000.0-of-1.jsonl").read_bytes() == before
    assert same(whole, root)


# ------------------------------------------------------------------------------------------------------ DistiLLM-2
def test_new_words_of_the_student_before_each_pass(data: Path, tmp_path: Path) -> None:
    whole, root = tmp_path / "whole", tmp_path / "root"
    assert main(contrastive(whole, data)) == 0
    replaced = sorted(path.name for path in (whole / "responses").glob("student-0*.jsonl"))
    assert replaced == ["student-0002.jsonl", "student-0003.jsonl", "student-0004.jsonl"]  # the first is the teacher's
    texts = [(whole / "responses" / name).read_text() for name in replaced]
    assert texts[0] != texts[1] != texts[2]
    assert [path.name for path in (whole / "responses").glob("student-pass*")] == ["student-pass-0002.0-of-1.jsonl"]
    # killed while the student generates before the second pass, and resumed from the last checkpoint
    killed_when(contrastive(root, data), root / "responses" / "student-pass-0001.0-of-1.jsonl", 300)
    assert main(contrastive(root, data, "--ckpt_path", "last")) == 0
    assert same(whole, root)


def test_a_second_fit_with_one_data_module_generates_each_pass_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, str, int]] = []
    generate_pass = Regeneration.generate_pass

    def counted(self: Regeneration, trainer: L.Trainer, module: L.LightningModule, number: int) -> None:
        calls.append((fit, self.side, number))
        generate_pass(self, trainer, module, number)

    monkeypatch.setattr(Regeneration, "generate_pass", counted)
    rows = runs.little_data(tmp_path, rows=8)
    datamodule = ContrastiveDataModule(
        str(rows), responses="generate", tokenizer="asset:student", batch_size=4, max_length=128
    )
    common: dict[str, Any] = {"max_new_tokens": 3, "keep_unfinished": True}
    for fit in range(2):
        callbacks: list[L.Callback] = [Regeneration("teacher", "once", **common), Regeneration("student", **common)]
        trainer = L.Trainer(
            accelerator="cpu",
            default_root_dir=tmp_path / str(fit),
            max_epochs=2,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            limit_val_batches=0,
            use_distributed_sampler=False,
        )
        trainer.fit(DistillationModule("asset:student", "asset:teacher"), datamodule=datamodule)
    each = [(side, number) for number in range(2) for side in ("teacher", "student")]
    assert calls == [(fit, side, number) for fit in range(2) for side, number in each]


@pytest.mark.parametrize("said", [Response("", "eos", 1), Response("and and", "length", 8)], ids=["empty", "endless"])
def test_a_student_that_says_nothing_more(
    said: Response, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, capfd: Any
) -> None:
    """The previous responses are used again, and no loss is NaN; before the first pass the run is refused."""
    own, calls = BatchGenerator.generate, []

    def generate(writer: Any, prompts: Any, numbered: Any) -> Any:
        calls.append(writer)
        if len(calls) < 3:  # the teacher, and the student before its first pass
            return own(writer, prompts, numbered)
        return ((row, said) for _, rows in numbered for row in rows)

    monkeypatch.setattr(BatchGenerator, "generate", generate)
    root = tmp_path / "root"
    words = [word.replace("contrastive.yaml", "own.yaml") for word in contrastive(root, data, steps=8)]
    text = json.loads((tmp_path / "contrastive.yaml").read_text())
    for callback in text["trainer"]["callbacks"]:
        callback["init_args"] |= {"keep_unfinished": False, "max_new_tokens": 16}
    (tmp_path / "own.yaml").write_text(json.dumps(text))
    assert main(words) == 0
    rows = int(caplog.text.split("student, pass 1: ")[1].split(" responses")[0])
    kind = "empty" if said.finish_reason == "eos" else "cut at max_new_tokens"
    assert f"student, pass 1: {rows} responses, {rows} {kind}" in caplog.text
    assert f"train: replaced 0 of {rows} responses of the student" in caplog.text
    first, second = ((root / "responses" / f"student-{n:04d}.jsonl").read_text() for n in (2, 3))
    assert first == second
    assert all(tensor.isfinite().all() for tensor in runs.student(root).values())
    again = [
        *words,
        "--trainer.default_root_dir",
        str(tmp_path / "again"),
    ]  # no response from the start, of the teacher too
    refused(again, ["the teacher generated no response to train on", kind], capfd)


def state(root: Path) -> dict[str, Any]:
    return torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)  # type: ignore[no-any-return]


@pytest.mark.slow
def test_killed_in_a_pass_and_between_two_and_resumed(data: Path, tmp_path: Path) -> None:
    """Weights, skews, pairs and order are those of an uninterrupted run."""
    whole, root = tmp_path / "whole", tmp_path / "root"
    follow = {"class_path": "ResponseGap"}, {"class_path": "ResponseGap", "init_args": {"side": "student"}}
    sides = [
        {"class_path": name, "init_args": {"alpha": skew}}
        for name, skew in zip(("SkewKL", "SkewReverseKL"), follow, strict=True)
    ]
    arguments = dict(zip(("teacher_responses", "student_responses"), sides, strict=True))
    more = ("--model.objective", json.dumps({"class_path": "Contrastive", "init_args": arguments}))
    assert main(contrastive(whole, data, *more)) == 0
    runs.kill_when(contrastive(root, data, *more), root / "checkpoints" / "epoch=1-step=8.ckpt")
    assert 6 < state(root)["global_step"] < 12  # within the second pass
    resume = ("--ckpt_path", "last")
    killed_when(contrastive(root, data, *more, *resume), root / "responses" / "student-pass-0002.0-of-1.jsonl", 300)
    assert state(root)["global_step"] == 12  # between the second and the third
    assert main(contrastive(root, data, *more, *resume)) == 0
    one, two = state(whole)["state_dict"], state(root)["state_dict"]
    gaps = [name for name in one if name.endswith("mean_gap")]
    assert len(gaps) == 2 and all(one[name].isfinite() for name in gaps)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    for path in (whole / "responses").glob("student-0*.jsonl"):
        assert (root / "responses" / path.name).read_bytes() == path.read_bytes()


# ----------------------------------------------------------------------------------------------------------- ranks
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_share_the_work_and_write_the_same(strategy: str, data: Path, whole: Path, tmp_path: Path) -> None:
    """Five batches for two ranks: one has a batch less, and the model may be sharded over both."""
    one, two = tmp_path / "one", tmp_path / "two"
    more = ("--trainer.callbacks.batch_size", "10", "--trainer.callbacks.temperature", "0")
    assert main(seqkd(one, data, *more, steps=1)) == 0
    words = [*seqkd(two, data, *more, steps=1), "--trainer.devices", "2", "--trainer.strategy", strategy]
    code, _, err = runs.finish(words)
    assert code == 0, err
    found: dict[int, str] = {}
    for rank in range(2):
        path = two / "responses" / f"teacher-pass-0000.{rank}-of-2.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found |= {row["row_id"]: row["response"] for row in rows if row["finish_reason"] == "eos"}
    assert {n: text for n, text in found.items() if text.strip()} == said(one)


@pytest.mark.slow
def test_a_student_that_is_spread_over_ranks_writes_the_same(data: Path, tmp_path: Path) -> None:
    """Between two passes, with weights that were trained in between."""
    one, two = tmp_path / "one", tmp_path / "two"
    more = ("--data.shuffle", "false")
    words = [contrastive(root, data, *more, steps=7) for root in (one, two)]
    text = json.loads((tmp_path / "contrastive.yaml").read_text())
    for callback in text["trainer"]["callbacks"]:
        callback["init_args"] |= {"temperature": 0, "batch_size": 10}
    (tmp_path / "contrastive.yaml").write_text(json.dumps(text))
    assert main(words[0]) == 0
    spread = ["--data.batch_size", "4", "--trainer.devices", "2", "--trainer.strategy", "fsdp2"]
    code, _, err = runs.finish([*words[1], *spread])
    assert code == 0, err
    for number in (2, 3):  # before the first pass and the second
        texts = [(root / "responses" / f"student-{number:04d}.jsonl").read_text().splitlines() for root in (one, two)]
        assert len(texts[0]) == len(texts[1]) == ROWS
        assert sum(a == b for a, b in zip(*texts, strict=True)) >= (ROWS if number == 2 else ROWS - 2)  # near ties


# --------------------------------------------------------------------------------------------------------- refused
REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "temperature": (["--trainer.callbacks.temperature=-1"], ["temperature", "-1"]),
    "top_p": (["--trainer.callbacks.top_p", "0"], ["top_p", "0"]),
    "batch_size": (["--trainer.callbacks.batch_size", "0"], ["batch_size", "0"]),
    "room": (["--trainer.callbacks.max_new_tokens", "128"], ["max_new_tokens", "max_length", "128"]),
    "when": (["--trainer.callbacks.when", "every_pass"], ["when", "once", "every_pass"]),
    "nobody writes": (["--trainer.callbacks", "[]"], ["Regeneration", "trainer.callbacks"]),
    "no teacher": (["--model.teacher", "null"], ["teacher"]),
    "nowhere to": (["--data", "InstructionDataModule"], ["Regeneration", "InstructionDataModule"]),
    "no end": (["--trainer.callbacks.max_new_tokens", "1"], ["max_new_tokens", "1", "cut"]),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_a_bad_argument(case: Any, data: Path, tmp_path: Path, capfd: Any) -> None:
    refused(seqkd(tmp_path / "root", data, *case[0], steps=1), case[1], capfd)
    assert not (tmp_path / "root" / "student").exists()


@pytest.mark.parametrize("bad", [{"side": "both"}, {"when": "never"}, {"batch_size": 0}, {"max_new_tokens": 0}])
def test_a_bad_argument_in_python(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Regeneration(**bad)


@pytest.mark.parametrize("make", [seqkd, contrastive])
def test_preflight_does_not_miss_words_that_come_later(make: Any, data: Path, tmp_path: Path, capfd: Any) -> None:
    words = make(tmp_path / "root", data)[1:]
    assert main(["preflight", *words]) == 0
    assert "error" not in capfd.readouterr().out
    assert main(["preflight", *words, "--trainer.callbacks", "[]"]) == 1
    assert not (tmp_path / "root" / "responses").exists()
