"""What a run shows of generated responses: scalars by name, and samples as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import runs
from generated_runs import contrastive, seqkd
from kd_lightning.callbacks.samples import Samples, generated_rows
from kd_lightning.cli.program import main
from kd_lightning.data.tokenization import load_tokenizer

LOGGED = ["--trainer.log_every_n_steps", "1", "--samples.every_n_steps", "2", "--samples.rows", "3"]
WRITING = {"train/response_length", "train/finished", "train/empty", "train/generate_share", "train/student_share"}
WROTE = {
    side: [f"train/{side}_{name}" for name in ("response_length", "finished", "empty")]
    for side in ("teacher", "student")
}


def on_policy(config: str, *more: str) -> Any:
    def words(root: Path, data: Path) -> list[str]:
        common = ["--data.train", str(data), "--model.responses.max_new_tokens", "8", *more]
        return [*runs.little(root, config, steps=6), *common]

    return words


def pairs(root: Path, data: Path) -> list[str]:
    return contrastive(root, data, "--model.objective", json.dumps(runs.GAPS), steps=8)


RUNS: dict[str, tuple[Any, set[str], set[str]]] = {
    "gkd": (on_policy("gkd", "--model.responses.share", "1.0"), WRITING, {"student"}),
    "distillm": (
        on_policy("distillm", "--model.responses.threshold", "1.0"),
        WRITING | {"train/replay_fill", "train/replay_threshold", "schedule/responses.fresh_share"},
        {"student"},
    ),
    "minillm": (on_policy("minillm"), WRITING | {"train/reward", "train/importance"}, {"student"}),
    "seqkd": (
        lambda root, data: seqkd(root, data, "--trainer.callbacks.max_new_tokens", "16", steps=4),
        {"train/regenerate_share", *WROTE["teacher"]},
        {"teacher"},
    ),
    "distillm2": (
        pairs,
        {
            "train/regenerate_share",
            *WROTE["teacher"],
            *WROTE["student"],
            "train/student_share",
            "schedule/teacher_responses.assistant.teacher_weight",
            "schedule/student_responses.assistant.teacher_weight",
            "schedule/student_responses.assistant.teacher_weight.schedule",
        },
        {"student", "teacher"},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_what_is_written_is_logged_and_can_be_read(name: str, tmp_path: Path) -> None:
    words, scalars, authors = RUNS[name]
    data = runs.little_data(tmp_path, 48)
    assert main([*words(tmp_path / "root", data), *LOGGED]) == 0
    events = EventAccumulator(str(tmp_path / "root" / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    assert scalars <= set(events.Tags()["scalars"])
    for share in scalars & {"train/generate_share", "train/regenerate_share"}:
        values = [event.value for event in events.Scalars(share)]
        assert all(0 <= value < 1 for value in values) and max(values) > 0
    for side in ("teacher", "student"):
        if WROTE[side][0] in scalars:
            passes = {event.step for event in events.Scalars(WROTE[side][0])}
            assert passes == ({0} if side == "teacher" else {0, 6})
            assert 0 < events.Scalars(WROTE[side][0])[0].value <= 16
            assert all(0 <= event.value <= 1 for name in WROTE[side][1:] for event in events.Scalars(name))
    shown = events.Tensors("trained on/text_summary")
    assert len(shown) >= 2
    assert len({event.step for event in shown}) == len(shown)
    for event in shown:
        lines = event.tensor_proto.string_val[0].decode().splitlines()
        assert lines[0] == "| prompt | who | response | tokens |"
        assert 1 <= len(lines) - 2 <= 3
        assert {line.rsplit("|", 4)[1].strip() for line in lines[2:]} <= authors


def test_another_logger_falls_back_quietly(tmp_path: Path) -> None:
    logger = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(tmp_path / "csv")]
    words, _, _ = RUNS["gkd"]
    assert main([*words(tmp_path / "root", runs.little_data(tmp_path)), *LOGGED, *logger]) == 0
    assert "train/generate_share" in next(tmp_path.rglob("metrics.csv")).read_text()


def test_rows_that_a_model_wrote() -> None:
    tokenizer = load_tokenizer("asset:student")
    cat, dog, end = (*tokenizer("cat dog").input_ids[:2], tokenizer.eos_token_id)
    batch = {
        "input_ids": torch.tensor([[cat, dog, end], [dog, cat, end], [cat, dog, dog], [cat, cat, end]]),
        "attention_mask": torch.ones(4, 3, dtype=torch.long),
        "labels": torch.tensor([[-100, dog, end], [-100, cat, end], [-100, dog, dog], [-100, -100, -100]]),
        "source": torch.tensor([0, 1, 2, 2]),
    }
    words = [tokenizer.decode([token]).strip() for token in (cat, dog)]
    both = " ".join(tokenizer.decode([dog, dog]).split())
    wanted = [[words[1], "teacher", words[0], "2"], [words[0], "student", both, "2"]]
    assert generated_rows(batch, tokenizer, 5) == wanted
    assert generated_rows(batch, tokenizer, 1) == wanted[:1]


@pytest.mark.parametrize("bad", [{"every_n_steps": -1}, {"rows": 0}])
def test_a_bad_argument(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Samples(**bad)
