"""The data module: what it hands out, what it reports, what it refuses, and what it keeps."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import runs
from chat_templates import FAMILIES
from kd_lightning.data import IGNORE_INDEX, InstructionDataModule, left_pad, tokenization
from tiny_tokenizers import tiny

CHATML = FAMILIES["chatml"]


def tokenizer(**kwargs: Any) -> Any:
    return tiny(CHATML.specials, None, "<|im_end|>", template=CHATML.template, **kwargs)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(count: int) -> list[dict[str, Any]]:
    return [{"instruction": "say" * (n % 5 + 1), "output": f"the answer {n}", "task": "say"} for n in range(count)]


def module(train: str, **kwargs: Any) -> InstructionDataModule:
    data = InstructionDataModule(train, **{"tokenizer": tokenizer(), "batch_size": 4, **kwargs})
    data.setup("fit")
    return data


def test_a_batch(tmp_path: Path) -> None:
    data = module(write(tmp_path / "a.jsonl", rows(10)), shuffle=False)
    batch = next(iter(data.train_dataloader()))
    assert batch["row_ids"].tolist() == [0, 1, 2, 3] and batch["source"].tolist() == [0] * 4
    lengths = batch["attention_mask"].sum(1)
    assert batch["input_ids"].shape == batch["labels"].shape == (4, int(lengths.max()))
    for n, (ids, labels, length) in enumerate(zip(batch["input_ids"], batch["labels"], lengths, strict=True)):
        assert data.tokenizer.decode(labels[labels != IGNORE_INDEX]) == f"the answer {n}<|im_end|>"
        at = labels != IGNORE_INDEX
        assert torch.equal(labels[at], ids[at])
        assert not at[length:].any() and (ids[length:] == data.pad_id).all()


def test_the_end_of_an_answer_is_a_label_even_if_it_is_also_the_padding(tmp_path: Path) -> None:
    data = module(write(tmp_path / "a.jsonl", rows(10)), tokenizer=tokenizer(pad="<|im_end|>"))
    assert data.pad_id == data.tokenizer.eos_token_id
    for batch in data.train_dataloader():
        ends = (batch["labels"] == data.pad_id).sum(1)
        assert ends.tolist() == [1] * len(ends)


def test_one_pass_holds_every_row_of_several_files(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.jsonl", rows(10)), write(tmp_path / "b.jsonl", rows(7))]
    data = module(files)  # type: ignore[arg-type]
    seen = torch.cat([batch["row_ids"] for batch in data.train_dataloader()]).tolist()
    assert sorted(seen) == list(range(17)) and seen != sorted(seen)
    assert data.row_locations("train", [0, 9, 10]) == [f"{files[0]}:1", f"{files[0]}:10", f"{files[1]}:1"]


def test_counts_are_reported_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(
        tmp_path / "a.jsonl",
        [
            {"instruction": "a", "output": "b"},
            {"instruction": "a", "output": " "},
            {"instruction": "a", "output": "a story about a town by the sea " * 4},
            {"instruction": "a story about a town by the sea " * 6, "output": "b"},
        ],
    )
    with caplog.at_level(logging.INFO):
        data = module(path, max_length=30)
    assert data.report["train"] == {"rows": 4, "kept": 2, "empty": 1, "truncated": 1, "cut_away": 1, "unlocated": 0}
    message = [record.message for record in caplog.records if record.message.startswith("train:")]
    assert message == [
        "train: 2 of 4 rows, 1 dropped without an answer to train on, 1 dropped with no answer within "
        "max_length=30, 1 truncated to max_length=30"
    ]
    batches = list(data.train_dataloader())
    assert sorted(torch.cat([batch["row_ids"] for batch in batches]).tolist()) == [0, 2]
    assert max(batch["input_ids"].shape[1] for batch in batches) == 30


def test_answers_that_a_template_hides_are_reported(tmp_path: Path) -> None:
    answers = [{"role": "assistant", "content": text} for text in ("hide", "show")]
    path = write(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "a"}, *answers]}])
    template = "{% for m in messages %}{% if m.content != 'hide' %}[{{ m.content }}{% endif %}</s>{% endfor %}"
    assert module(path, tokenizer=tiny(), chat_template=template).report["train"]["unlocated"] == 1


NOTHING_LEFT = {
    "all empty": (
        [{"instruction": "a", "output": ""}] * 3,
        {},
        "a.jsonl: every answer is empty: training needs at least one row with an answer",
    ),
    "too short": (rows(3), {"max_length": 8}, r"no answer begins within max_length=8: it must be at least \d+"),
    "hidden": (
        rows(3),
        {"chat_template": "{{ messages[0].content }}"},
        "a.jsonl: no answer was found in the rendered chat template",
    ),
}


@pytest.mark.parametrize("case", NOTHING_LEFT.values(), ids=NOTHING_LEFT.keys())
def test_no_row_left_to_train_on(case: tuple[Any, dict[str, Any], str], tmp_path: Path) -> None:
    content, kwargs, message = case
    with pytest.raises(ValueError, match=message):
        module(write(tmp_path / "a.jsonl", content), **kwargs)


def test_the_reported_minimum_length_is_enough(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"instruction": "a story about a town by the sea", "output": "yes"}])
    with pytest.raises(ValueError, match="must be at least") as error:
        module(path, max_length=8)
    needed = int(str(error.value).split()[-1])
    assert module(path, max_length=needed).report["train"]["kept"] == 1
    with pytest.raises(ValueError, match="must be at least"):
        module(path, max_length=needed - 1)


ARGUMENTS = [
    ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ({"max_length": 3}, "max_length must be at least 8, got 3"),
    ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
    ({"train": []}, r"train must name at least one file, folder or data set, got \[\]"),
    ({"chat_template": "/nowhere"}, "chat_template must be a Jinja template or a file that holds one, got '/nowhere'"),
]


@pytest.mark.parametrize("case", ARGUMENTS, ids=lambda case: str(case[0]))
def test_bad_arguments(case: tuple[dict[str, Any], str]) -> None:
    kwargs, message = case
    with pytest.raises(ValueError, match=message):
        InstructionDataModule(**{"train": "a.jsonl", **kwargs})


def test_a_bad_row_is_named_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*rows(2), {"instruction": 3, "output": "b"}])
    with pytest.raises(ValueError, match=r"a.jsonl:3: field 'instruction' must be a string, got int"):
        module(path)
    path = write(tmp_path / "b.jsonl", [*rows(1), {"messages": [{"role": "assistant", "content": "a"}] * 2}])
    refuses = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}"
    with pytest.raises(ValueError, match=r"b.jsonl:2: the chat template refuses this row: begin with the user"):
        module(path, chat_template=refuses + CHATML.template)


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows(2))
    for name, message in ((str(tmp_path), "the folder holds no tokenizer"), ("/nowhere", "no such folder")):
        with pytest.raises(ValueError, match=f"tokenizer: '{name}' cannot be loaded .{message}"):
            module(path, tokenizer=name)
    with pytest.raises(ValueError, match="tokenizer must be given"):
        module(path, tokenizer=None)


def test_a_chat_template_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(CHATML.template)
    data = module(write(tmp_path / "a.jsonl", rows(2)), chat_template=str(tmp_path / "chat.jinja"))
    assert data.chat_template == CHATML.template


def test_the_second_run_finds_the_rows_tokenized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", rows(10))
    calls: list[str] = []
    original = tokenization.TextTokenizer.tokenize

    def counting(self: Any, *args: Any) -> Any:
        calls.append("tokenize")
        return original(self, *args)

    monkeypatch.setattr(tokenization.TextTokenizer, "tokenize", counting)
    first = list(module(path, shuffle=False).train_dataloader())
    assert len(calls) == 10
    again = list(module(path, shuffle=False).train_dataloader())
    assert len(calls) == 10
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again, strict=True))
    module(path, max_length=100)
    assert len(calls) == 20  # other settings, other tokens
    write(tmp_path / "a.jsonl", rows(11))
    assert module(path).report["train"]["rows"] == 11  # another file under the same name


def test_rows_are_tokenized_in_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", rows(40))
    alone = list(module(path, shuffle=False, max_length=99).train_dataloader())
    monkeypatch.setattr(tokenization, "PARALLEL_ROWS", 20)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    together = list(module(path, shuffle=False, max_length=98).train_dataloader())
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one["labels"], other["labels"]) and torch.equal(one["row_ids"], other["row_ids"])


def test_prompts_for_generation(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*rows(3), {"instruction": "a", "output": ""}, *rows(1)])
    data = InstructionDataModule(path, test=path, tokenizer=tokenizer(), batch_size=3)
    data.setup("test")
    prompts = data.generation_rows("test")
    assert [row["index"] for row in prompts] == [0, 1, 2, 4]
    assert prompts[1]["prompt"] == "<|im_start|>user\nsaysay<|im_end|>\n<|im_start|>assistant\n"
    assert data.tokenizer.decode(prompts[1]["prompt_ids"]) == prompts[1]["prompt"]
    assert prompts[1]["answer"] == "the answer 1" and prompts[1]["row"] == rows(3)[1]
    batches = list(data.predict_dataloader())
    assert [batch["row_ids"].tolist() for batch in batches] == [[0, 1, 2], [4]]
    for batch in batches:
        assert batch["attention_mask"][:, -1].all()
        for ids, mask, index in zip(batch["input_ids"], batch["attention_mask"], batch["row_ids"], strict=True):
            (row,) = (row for row in prompts if row["index"] == index)
            assert ids[mask.bool()].tolist() == row["prompt_ids"]


def test_a_prompt_is_what_the_training_row_begins_with(tmp_path: Path) -> None:
    data = module(write(tmp_path / "a.jsonl", rows(4)), shuffle=False)
    (batch,) = data.train_dataloader()
    for row, ids, labels in zip(data.generation_rows("train"), batch["input_ids"], batch["labels"], strict=True):
        begin = int((labels != IGNORE_INDEX).nonzero()[0])
        assert ids[:begin].tolist() == row["prompt_ids"]


def test_left_pad() -> None:
    batch = left_pad([[1, 2, 3], [4], []], 9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [9, 9, 4], [9, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 0]]


def test_no_validation_data_is_no_error(tmp_path: Path) -> None:
    data = module(write(tmp_path / "a.jsonl", rows(4)))
    assert data.val_dataloader() == [] and data.test_dataloader() == []


def test_the_order_follows_the_seed_of_the_run_unless_it_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", rows(40))

    def order(seed: int | None) -> list[int]:
        return [i for batch in module(path, seed=seed).train_dataloader() for i in batch["row_ids"].tolist()]

    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    of_its_own = {seed: order(seed) for seed in (0, 7)}
    assert order(None) == of_its_own[0] != of_its_own[7]
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert order(None) == of_its_own[7] and order(0) == of_its_own[0]


def test_rows_and_batches_for_a_trainer_of_ones_own(tmp_path: Path) -> None:
    data = InstructionDataModule(
        str(runs.little_data(tmp_path, 6)), tokenizer="asset:student", batch_size=3, shuffle=False
    )
    data.setup("fit")
    rows = data.dataset("train")
    own = DataLoader(rows, batch_size=3, collate_fn=data.collate)
    assert len(rows) == 6
    for found, expected in zip(own, data.train_dataloader(), strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    with pytest.raises(ValueError, match=r"split must be one that `setup` has loaded \(train\), got 'val'"):
        data.dataset("val")
