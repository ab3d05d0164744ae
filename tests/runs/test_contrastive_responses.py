"""New responses between epochs, and the first ones of a run of prompts: what is read, kept, found again."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from kd_lightning.data import IGNORE_INDEX, ContrastiveDataModule
from pair_data import halves, module, pairs, tokenizer, write

PAIRS, BATCH = 14, 3
PASS = -(-PAIRS // BATCH)


def responses_of(data: ContrastiveDataModule) -> dict[int, list[str]]:
    """Both responses by number of the pair."""
    found: dict[int, list[str]] = {}
    for number, _, _, text in halves(data):
        found.setdefault(number, []).append(text.removesuffix("<|im_end|>"))
    return found


def rooted(tmp_path: Path, rows: list[dict[str, Any]], **kwargs: Any) -> ContrastiveDataModule:
    data = module(write(tmp_path / "a.jsonl", rows), **kwargs)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        default_root_dir=str(tmp_path),
        is_global_zero=True,
        distributed_sampler_kwargs=None,
        limit_train_batches=1.0,
        limit_val_batches=1.0,
        fit_loop=L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu").fit_loop,
    )
    return data


# ----------------------------------------------------------------------------------------------------------- in place
def test_new_responses_of_the_student_with_the_teachers_old_ones(tmp_path: Path) -> None:
    data = rooted(tmp_path, pairs(5))
    loader = data.train_dataloader()
    list(loader)
    data.replace_responses({n: f"new {n}" for n in (0, 1, 3, 4)})
    expected = {n: [row["teacher_response"], f"new {n}"] for n, row in enumerate(pairs(5))}
    expected[2][1] = pairs(5)[2]["student_response"]
    assert responses_of(data) == expected
    read = [data.tokenizer.decode(x[x != IGNORE_INDEX]) for batch in loader for x in batch["labels"]]
    assert read == [text + "<|im_end|>" for n in range(5) for text in expected[n]]  # a loader that was there before


def test_batches_are_made_by_the_new_lengths(tmp_path: Path) -> None:
    data = rooted(tmp_path, [{**row, "instruction": "say"} for row in pairs(12)], shuffle=True)
    loader = data.train_dataloader()
    data.replace_responses({n: "word " * (1 + n % 4 * 10) for n in range(12)})
    for batch in loader:
        assert len(set((batch["row_ids"] % 4).tolist())) == 1


def test_an_empty_response_keeps_the_old_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = rooted(tmp_path, pairs(3))
    before = responses_of(data)
    with caplog.at_level(logging.INFO):
        data.replace_responses({0: "", 1: " \n", 2: "new"})
    assert responses_of(data) == {**before, 2: [before[2][0], "new"]}
    assert (
        "train: replaced 1 of 3 responses of the student, ignored 2 that are empty or begin after max_length="
        in caplog.text
    )
    data.replace_responses({2: ""})
    assert responses_of(data)[2][1] == "new"


def test_an_endless_response_is_truncated(tmp_path: Path) -> None:
    data = rooted(tmp_path, pairs(1), max_length=40)
    data.replace_responses({0: "again and " * 500})
    (batch,) = data.train_dataloader()
    assert batch["input_ids"].shape == (2, 40) and batch["labels"][1, -1] != IGNORE_INDEX


@pytest.mark.parametrize(
    ("responses", "side", "message"),
    [
        ({7: "a"}, "student", "responses must have row_ids of training pairs as keys, got 7"),
        ({0: 3}, "student", r"responses\[0\] must be a string, got int"),
        ({0: "a"}, "both", "side must be 'teacher' or 'student', got 'both'"),
    ],
)
def test_responses_that_are_refused(responses: Any, side: str, message: str, tmp_path: Path) -> None:
    data = rooted(tmp_path, pairs(2))
    with pytest.raises(ValueError, match=message):
        data.replace_responses(responses, side)
    assert not (tmp_path / "responses").exists()


# ------------------------------------------------------------------------------------------------------- from nothing
PROMPTS = [{"instruction": f"say {n}", "output": "left out"} for n in range(4)]


def test_a_run_may_begin_with_prompts_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        data = rooted(tmp_path, PROMPTS, responses="generate")
    assert "train: 4 of 4 pairs, 4 of them without both responses yet" in caplog.text
    assert data.missing_responses("teacher") == data.missing_responses("student") == [0, 1, 2, 3]
    prompts = data.generation_rows("train")
    assert [row["index"] for row in prompts] == [0, 1, 2, 3]
    assert prompts[1]["prompt"] == "<|im_start|>user\nsay 1<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(ValueError, match=r"a.jsonl: no pair can be used: 4 dropped with an empty response"):
        data.train_dataloader()
    data.replace_responses({n: f"good {n}" for n in range(4)}, "teacher")
    data.replace_responses({0: "bad 0", 1: "", 2: "bad 2", 3: "bad 3"})
    assert data.missing_responses("teacher") == [] and data.missing_responses("student") == [1]
    assert responses_of(data) == {n: [f"good {n}", f"bad {n}"] for n in (0, 2, 3)}
    assert data.report["train"]["kept"] == 3 and data.report["train"]["empty"] == 1
    assert [row["index"] for row in data.generation_rows("train")] == [0, 2, 3]

    again = rooted(tmp_path, PROMPTS, responses="generate")
    again.load_state_dict(data.state_dict())
    assert responses_of(again) == responses_of(data) and again.state_dict() == data.state_dict()


def test_half_of_a_pair_may_be_there(tmp_path: Path) -> None:
    rows = [{"prompt": "say:", "teacher_response": "yes"}, {"prompt": "say:", "chosen": "yes", "rejected": "no"}]
    data = rooted(tmp_path, rows, responses="generate")
    assert data.missing_responses("teacher") == [] and data.missing_responses("student") == [0]
    data.replace_responses({0: "maybe"})
    assert responses_of(data) == {0: ["yes", "maybe"], 1: ["yes", "no"]}


# -------------------------------------------------------------------------------------------------------- found again
class Recorder(L.LightningModule):
    """Trains nothing; records the tokens of every batch; replaces responses before each pass except the first."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.fail_at = fail_at
        self.seen: list[list[list[int]]] = []
        self.passes: list[int] = []

    def on_fit_start(self) -> None:
        self.trainer.datamodule.add_before_pass(self.respond)  # type: ignore[attr-defined]

    def respond(self, number: int) -> None:
        self.passes.append(number)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if number == 0 and data.responses == "generate":
            for side in ("teacher", "student"):
                first = {n: f"{side} {n}" if n != 2 else "" for n in data.missing_responses(side)}
                data.replace_responses(first, side)
        if number > 0:
            there = [row["index"] for row in data.generation_rows("train")]
            words = {n: f"pass {number} says " + "much " * ((n * number) % 7) for n in there}
            data.replace_responses(words if number == 1 else {**words, 5: ""})

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        if self.global_step == self.fail_at:
            raise KeyboardInterrupt
        self.seen.append([*batch["labels"].tolist(), batch["source"].tolist(), batch["row_ids"].tolist()])
        return self.weight * 0.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    folder: Path, workers: int = 0, fail_at: int | None = None, ckpt: str | None = None, late: bool = False
) -> Recorder:
    rows = [{"instruction": f"say {n}"} for n in range(PAIRS)] if late else pairs(PAIRS)
    path = write(folder / "a.jsonl", rows) if not (folder / "a.jsonl").exists() else str(folder / "a.jsonl")
    settings: dict[str, Any] = {"batch_size": BATCH, "num_workers": workers, "seed": 3}
    data = ContrastiveDataModule(path, tokenizer=tokenizer(), responses="generate" if late else "data", **settings)
    recorder = Recorder(fail_at)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice about loggers and workers
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=3,
            default_root_dir=folder,
            callbacks=[ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        try:
            trainer.fit(recorder, datamodule=data, ckpt_path=ckpt, weights_only=True)
        except SystemExit:
            assert fail_at is not None  # how Lightning ends a run that was interrupted
    return recorder


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> list[list[list[int]]]:
    run = fit(tmp_path_factory.mktemp("untouched"))
    assert run.passes == [0, 1, 2]
    return run.seen


def test_a_pass_holds_every_pair_once_and_the_next_has_new_responses(untouched: list[list[list[int]]]) -> None:
    assert len(untouched) == 3 * PASS
    passes = [untouched[n * PASS : (n + 1) * PASS] for n in range(3)]
    for batches in passes:
        assert sorted(n for batch in batches for n in batch[-1]) == sorted([*range(PAIRS), *range(PAIRS)])
    assert passes[0] != passes[1] != passes[2]


@pytest.mark.parametrize(("step", "workers"), [(2, 0), (PASS, 0), (PASS + 2, 0), (2 * PASS, 2), (2 * PASS + 3, 2)])
def test_a_resumed_run_reads_the_remaining_batches(
    untouched: list[list[list[int]]], step: int, workers: int, tmp_path: Path
) -> None:
    killed = fit(tmp_path, workers, fail_at=step + 1)
    assert killed.seen == untouched[: step + 1]
    resumed = fit(tmp_path, workers, ckpt=str(tmp_path / f"step={step}.ckpt"))
    assert resumed.seen == untouched[step:]
    assert resumed.passes == [number for number in range(3) if number * PASS >= step]


@pytest.mark.parametrize(("step", "workers"), [(2, 0), (PASS, 2), (PASS + 2, 0)])
def test_a_run_that_began_with_prompts_reads_the_remaining_batches(step: int, workers: int, tmp_path: Path) -> None:
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = fit(tmp_path / "whole", late=True)
    assert whole.passes == [0, 1, 2] and len(whole.seen) == 3 * PASS
    assert {n for batch in whole.seen for n in batch[-1]} == set(range(PAIRS)) - {2}
    fit(tmp_path / "cut", fail_at=step + 1, late=True)
    resumed = fit(tmp_path / "cut", workers, ckpt=str(tmp_path / "cut" / f"step={step}.ckpt"), late=True)
    assert resumed.seen == whole.seen[step:]


def test_missing_or_changed_responses_are_refused(tmp_path: Path) -> None:
    fit(tmp_path, fail_at=PASS + 3)
    ckpt = str(tmp_path / f"step={PASS + 2}.ckpt")
    file = tmp_path / "responses" / "student-0001.jsonl"
    lines = file.read_text().splitlines()
    assert json.loads(lines[3]) == {"row_id": 3, "response": "pass 1 says " + "much " * 3}
    file.write_text("\n".join(lines[1:]))
    with pytest.raises(ValueError, match=r"student-0001.jsonl: changed since the checkpoint was saved"):
        fit(tmp_path, ckpt=ckpt)
    file.unlink()
    with pytest.raises(
        ValueError, match=r"student-0001.jsonl: missing, but the checkpoint was trained on these responses"
    ):
        fit(tmp_path, ckpt=ckpt)


# --------------------------------------------------------------------------------------------------------------- ranks
def test_ranks_share_the_pairs(tmp_path: Path) -> None:
    data = rooted(tmp_path, pairs(PAIRS), shuffle=True)
    seen = []
    for rank in range(2):
        data.trainer.distributed_sampler_kwargs = {"rank": rank, "num_replicas": 2}  # type: ignore[union-attr,misc]
        batches = list(data.train_dataloader())
        for batch in batches:
            assert batch["source"].tolist() == [1, 2] * (len(batch["source"]) // 2)
        seen.append([n for batch in batches for n in batch["row_ids"][::2].tolist()])
    assert sorted(seen[0] + seen[1]) == list(range(PAIRS)) and len(seen[0]) == len(seen[1])


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    data = rooted(tmp_path, pairs(2))
    data.trainer.is_global_zero = False  # type: ignore[union-attr,misc]
    data.replace_responses({0: "new"})
    assert data.state_dict()["files"]["student"]["name"] == "student-0001.jsonl"
    assert not (tmp_path / "responses").exists()
