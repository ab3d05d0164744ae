"""Pairs of responses: what a batch of them holds, how they are read and joined, what is dropped and reported."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from kd_lightning.constants import SOURCES
from kd_lightning.data import IGNORE_INDEX, ContrastiveDataModule
from pair_data import halves, module, pairs, write

TEACHER, STUDENT = (SOURCES.index(name) for name in ("teacher", "student"))


def chat(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def test_a_batch_holds_both_halves_of_its_pairs(tmp_path: Path) -> None:
    data = module(write(tmp_path / "a.jsonl", pairs(7)))
    batches = list(data.train_dataloader())
    assert [len(batch["row_ids"]) for batch in batches] == [6, 6, 2]
    for batch in batches:
        assert batch["source"].tolist() == [TEACHER, STUDENT] * (len(batch["source"]) // 2)
        assert torch.equal(batch["row_ids"][::2], batch["row_ids"][1::2])
        assert batch["input_ids"].shape[1] == int(batch["attention_mask"].sum(1).max())
    expected = []
    for n, row in enumerate(pairs(7)):
        for source, side in ((TEACHER, "teacher"), (STUDENT, "student")):
            expected.append((n, source, chat(row["instruction"]), row[f"{side}_response"] + "<|im_end|>"))
    assert halves(data) == expected


PROMPTS: dict[str, tuple[dict[str, Any], str]] = {
    "instruction": ({"instruction": "say", "input": "it", "output": "left out"}, chat("say\nit")),
    "text": ({"prompt": "say it:"}, "say it:"),
    "turns": ({"prompt": [{"role": "user", "content": "say"}]}, chat("say")),
    "messages": (
        {"messages": [{"role": "user", "content": "say"}, {"role": "assistant", "content": "left out"}]},
        chat("say"),
    ),
}


@pytest.mark.parametrize("names", [("teacher_response", "student_response"), ("chosen", "rejected")])
@pytest.mark.parametrize("case", PROMPTS.values(), ids=PROMPTS.keys())
def test_the_forms_of_a_pair(case: tuple[dict[str, Any], str], names: tuple[str, str], tmp_path: Path) -> None:
    fields, prompt = case
    data = module(write(tmp_path / "a.jsonl", [{**fields, names[0]: "good", names[1]: "bad"}]))
    assert halves(data) == [(0, 1, prompt, "good<|im_end|>"), (0, 2, prompt, "bad<|im_end|>")]
    assert data.generation_rows("train")[0]["prompt"] == prompt


def test_responses_as_turns(tmp_path: Path) -> None:
    question = {"role": "user", "content": "say"}
    good, bad = ({"role": "assistant", "content": text} for text in ("good", "bad"))
    rows = [
        {"prompt": [question], "chosen": [good], "rejected": [bad]},
        {"chosen": [question, good], "rejected": [question, bad]},
        {"prompt": "say", "chosen": [question, good], "rejected": [question, bad]},
    ]
    found = halves(module(write(tmp_path / "a.jsonl", rows)))
    assert [row[2:] for row in found] == [(chat("say"), "good<|im_end|>"), (chat("say"), "bad<|im_end|>")] * 3


def test_two_files_are_joined_by_prompt_and_equal_prompts_in_file_order(tmp_path: Path) -> None:
    good = [{"instruction": p, "output": "x", "response": f"good {n}"} for n, p in enumerate("abac")]
    bad = [{"instruction": p, "output": "x", "response": f"bad {n}"} for n, p in enumerate("caba")]
    data = module(
        write(tmp_path / "good.jsonl", good), student_responses=write(tmp_path / "bad.jsonl", bad), batch_size=1
    )
    found = [row[2:] for row in halves(data)]
    expected = [(0, 1), (1, 2), (2, 3), (3, 0)]
    for n, (teacher, student) in enumerate(expected):
        prompt = chat("abac"[n])
        assert found[2 * n : 2 * n + 2] == [
            (prompt, f"good {teacher}<|im_end|>"),
            (prompt, f"bad {student}<|im_end|>"),
        ]


def test_dropped_pairs_are_reported_with_file_and_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = "a story about a town by the sea " * 6
    turns = [[{"role": "user", "content": c}, {"role": "assistant", "content": "b"}] for c in "ab"]
    path = write(
        tmp_path / "a.jsonl",
        [
            {"instruction": "a", "teacher_response": "b", "student_response": "c"},
            {"instruction": "a", "teacher_response": "b"},
            {"instruction": "a", "student_response": "b", "teacher_response": None},
            {"instruction": "a", "teacher_response": "b", "student_response": " "},
            {"chosen": turns[0], "rejected": turns[1]},
            {"instruction": long, "teacher_response": "b", "student_response": "c"},
            {"instruction": "a", "teacher_response": "b", "student_response": long},
        ],
    )
    with caplog.at_level(logging.INFO):
        data = module(path, max_length=30)
    assert data.report["train"] == {
        "rows": 7,
        "kept": 2,
        "side_missing": 2,
        "prompt_differs": 1,
        "no_partner": 0,
        "empty": 1,
        "cut_away": 1,
        "unlocated": 0,
        "truncated": 1,
    }
    message = [record.message for record in caplog.records if record.message.startswith("train:")]
    assert message == [
        f"train: 2 of 7 pairs, 2 dropped with one response missing ({path}:2, {path}:3), 1 dropped with two different "
        f"prompts ({path}:5), 1 dropped with an empty response ({path}:4), 1 dropped with a response that does not "
        f"begin within max_length=30 ({path}:6), 1 truncated to max_length=30"
    ]
    assert sorted({row[0] for row in halves(data)}) == [0, 6]
    assert data.row_locations("train", [6]) == [f"{path}:7"]
    assert module(path, max_length=30).report == data.report  # from the cache, too


def test_prompts_without_a_partner_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = write(tmp_path / "good.jsonl", [{"instruction": p, "response": "x"} for p in "abc"])
    bad = write(tmp_path / "bad.jsonl", [{"instruction": p, "response": "y"} for p in "bdefg"])
    with caplog.at_level(logging.INFO):
        data = module(good, student_responses=bad)
    assert data.report["train"]["no_partner"] == 6 and data.report["train"]["kept"] == 1
    assert f"({good}:1, {good}:3, {bad}:2 and 3 more)" in caplog.text
    assert {row[2] for row in halves(data)} == {chat("b")}


def test_pairs_of_similar_length_share_a_batch_and_a_pass_holds_each_once(tmp_path: Path) -> None:
    data = module(write(tmp_path / "a.jsonl", pairs(40)), shuffle=True, batch_size=4)
    seen, padding = [], {}
    for grouped in (True, False):
        data.group_by_length = grouped
        batches = list(data.train_dataloader())
        seen = torch.cat([batch["row_ids"] for batch in batches]).tolist()
        assert sorted(seen) == sorted([*range(40), *range(40)]) and seen != sorted(seen)
        padding[grouped] = sum(int((1 - batch["attention_mask"]).sum()) for batch in batches)
    assert padding[True] < padding[False]


def test_workers_read_the_same(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", pairs(13))
    alone, together = (list(module(path, shuffle=True, num_workers=n).train_dataloader()) for n in (0, 2))
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_validation_takes_instructions_and_of_pairs_the_teachers_response(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", pairs(3))
    plain = write(tmp_path / "b.jsonl", [{"instruction": "a", "output": "b"}])
    data = module(path, val=[plain, path])
    batch = next(iter(data.val_dataloader()))
    words = [data.tokenizer.decode(labels[labels != IGNORE_INDEX]) for labels in batch["labels"]]
    assert words == ["b<|im_end|>", "the answer 0<|im_end|>", "the answer 1<|im_end|>"]
    assert batch["source"].tolist() == [0, 0, 0]


# ------------------------------------------------------------------------------------------------------- bad input
def test_no_pair_that_can_be_used(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"instruction": "a", "teacher_response": "b"}] * 5)
    with pytest.raises(
        ValueError, match=r"a.jsonl: no pair can be used: 5 dropped with one response missing .*a.jsonl:3 and 2"
    ):
        module(path)
    good = write(tmp_path / "good.jsonl", [{"prompt": "a", "response": "x"}])
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "b", "response": "y"}])
    with pytest.raises(ValueError, match="2 dropped without a partner in the other file") as error:
        module(good, student_responses=bad)
    assert "\n" not in str(error.value)
    path = write(tmp_path / "b.jsonl", [{"instruction": "a", "teacher_response": "b", "student_response": "c"}])
    with pytest.raises(ValueError, match="1 dropped with a response that does not begin within max_length=8"):
        module(path, max_length=8)


BAD_ROWS = {
    "no response": (
        {"instruction": "a", "output": "b"},
        "a.jsonl:2: a pair needs a prompt .* has 'instruction', 'outpu",
    ),
    "no prompt": ({"teacher_response": "a", "student_response": "b"}, "a.jsonl:2: a pair needs a prompt"),
    "a number": ({"prompt": "a", "chosen": 3, "rejected": "b"}, "a.jsonl:2: field 'chosen' must be a string, got int"),
    "no turn": (
        {"prompt": "a", "chosen": [], "rejected": "b"},
        "a.jsonl:2: field 'chosen' must hold at least one mess",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_bad_row_is_named_with_its_line(case: tuple[dict[str, Any], str], tmp_path: Path) -> None:
    row, message = case
    with pytest.raises(ValueError, match=message) as error:
        module(write(tmp_path / "a.jsonl", [*pairs(1), row]))
    assert "\n" not in str(error.value)


def test_a_file_without_responses_cannot_be_joined(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", [{"prompt": "a", "response": "x"}])
    bad = write(tmp_path / "bad.jsonl", [{"instruction": "a", "output": "y"}])
    with pytest.raises(ValueError, match=r"bad.jsonl:1: a row needs 'response' and its prompt .*'instruction', 'out"):
        module(good, student_responses=bad)


def test_bad_arguments() -> None:
    for kwargs, message in (
        ({"responses": "later"}, "responses must be 'data' or 'generate', got 'later'"),
        (
            {"responses": "generate", "student_responses": "b"},
            "student_responses must be None with responses='generate', got 'b'",
        ),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"train": []}, "train must name at least one file"),
    ):
        with pytest.raises(ValueError, match=message):
            ContrastiveDataModule(**{"train": "a.jsonl", **kwargs})  # type: ignore[arg-type]
