"""Documents are cut into windows in which every token but the first of a document is predicted once."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from chat_templates import FAMILIES
from kd_lightning.data import IGNORE_INDEX, ContrastiveDataModule, InstructionDataModule
from kd_lightning.data.prompt import PromptDataModule
from kd_lightning.data.rows.documents import require_prompts, windows
from tiny_tokenizers import TEXT, tiny

TOKENIZERS = {
    "no first token": {"bos": None},
    "a first token": {"adds_bos": True},
    "no end": {"bos": None, "eos": None},
    "sentencepiece": {"kind": "metaspace", "adds_bos": True},
}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def texts(path: Path, *found: str) -> str:
    return write(path, [{"text": text} for text in found])


def module(train: str, **kwargs: Any) -> InstructionDataModule:
    tokenizer = tiny(template=FAMILIES["chatml"].template)
    settings = {"tokenizer": tokenizer, "batch_size": 4, "max_length": 8, "shuffle": False, **kwargs}
    data = InstructionDataModule(train, **settings)
    data.setup("fit")
    return data


def story(rng: random.Random) -> str:
    words = [*" ".join(TEXT).split(), "Größe", "日本語", "🙂", "\n", "\n\n", "\t"]
    return " ".join(rng.choice(words) for _ in range(rng.randrange(1, 60)))


def test_each_position_but_the_first_is_predicted_once() -> None:
    for length in range(40):
        for size in range(2, 12):
            found = list(windows(length, size))
            predicted = [at for start, end in found for at in range(start + 1, end)]
            assert predicted == list(range(1, length))
            assert all(2 <= end - start <= size for start, end in found)
            assert all(end - start == size for start, end in found[:-1])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_labels_of_the_windows_are_the_document(name: str, tmp_path: Path) -> None:
    rng = random.Random(20261129)
    tokenizer = tiny(**{"template": FAMILIES["chatml"].template, **TOKENIZERS[name]})
    found = [story(rng) for _ in range(40)]
    for max_length in (8, 13, 512):
        data = module(texts(tmp_path / f"{max_length}.jsonl", *found), tokenizer=tokenizer, max_length=max_length)
        labels: dict[int, list[int]] = {}
        firsts: dict[int, int] = {}
        kept = [row for batch in data.train_dataloader() for row in zip(*batch.values(), strict=True)]
        assert len(kept) == data.report["train"]["kept"]
        for ids, mask, targets, row_id, _ in kept:
            (location,) = data.row_locations("train", [int(row_id)])
            number = int(location.split(":")[-1].split(" ")[0])
            firsts.setdefault(number, int(ids[0]))
            there = mask.bool()
            assert targets[0] == IGNORE_INDEX and (targets[~there] == IGNORE_INDEX).all()
            assert (targets[1:][there[1:]] == ids[1:][there[1:]]).all()
            if labels.get(number):
                assert ids[0] == labels[number][-1]  # a window begins with the token before
            labels.setdefault(number, []).extend(targets[there][1:].tolist())
        for number, text in enumerate(found, start=1):
            whole = tokenizer(text, add_special_tokens=TOKENIZERS[name].get("adds_bos", False)).input_ids
            if tokenizer.eos_token_id is not None:
                whole = [*whole, tokenizer.eos_token_id]
            if len(whole) > 1:
                assert [firsts[number], *labels[number]] == whole
            else:
                assert number not in labels


def test_the_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": TEXT[0], "domain": "a"}, {"text": " \n"}])
    with caplog.at_level("INFO"):
        data = module(source)
    report = data.report["train"]
    assert report["documents"] == 2 and report["empty"] == 1 and report["truncated"] == 0
    assert report["kept"] == report["rows"] - 1 > 2
    assert "dropped without text" in caplog.text and "2 documents cut into rows" in caplog.text
    assert data.document_splits == {"train"}
    assert data.generation_rows("train") == [] and data.conversations("train", 3) == []
    assert set(data.row_fields("train", "domain").values()) == {"a"}
    first, second = data.row_locations("train", [0, 1])
    assert first == f"{source}:1 (tokens 1 to 8)" and second == f"{source}:1 (tokens 8 to 15)"


def test_special_tokens_in_a_text_are_words(tmp_path: Path) -> None:
    tokenizer = tiny()
    words = module(texts(tmp_path / "a.jsonl", "The </s> end"), max_length=64)
    (batch,) = words.train_dataloader()
    ids = batch["input_ids"][0].tolist()
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    assert words.report["train"]["control_tokens"] == 1
    (batch,) = module(texts(tmp_path / "b.jsonl", "The end</s>"), max_length=64).train_dataloader()
    ended = batch["input_ids"][0].tolist()
    assert ended.count(tokenizer.eos_token_id) == 1  # an end that is there is not doubled
    data = module(texts(tmp_path / "c.jsonl", "The </s> end"), max_length=64, allow_special_tokens=True)
    assert next(iter(data.train_dataloader()))["input_ids"][0].tolist().count(tokenizer.eos_token_id) == 2


def test_a_row_of_another_form_may_have_a_text(tmp_path: Path) -> None:
    row = {"instruction": "say", "output": "answer", "text": "Below is an instruction"}
    data = module(write(tmp_path / "a.jsonl", [row]), max_length=64)
    assert data.document_splits == set() and data.generation_rows("train")[0]["answer"] == "answer"


ROW = {"instruction": "say", "output": "answer"}
MIXED = {
    "documents last": (
        [ROW, {"text": "a b"}],
        r"a.jsonl:2: this is a document .*a.jsonl:1 is a row with a prompt.*to mix them",
    ),
    "documents first": ([{"text": "a b"}, ROW], r"a.jsonl:2: this is a row with a prompt, .*a.jsonl:1 is a document"),
    "no text": ([{"text": 3}], r"a.jsonl:1: field 'text' must be a string, got int"),
    "empty": ([{"text": " "}], r"a.jsonl: every text is empty: training needs at least one document with text"),
}


@pytest.mark.parametrize("case", MIXED.values(), ids=MIXED.keys())
def test_rows_that_cannot_be_documents_are_refused(case: tuple[list[Any], str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=case[1]):
        module(write(tmp_path / "a.jsonl", case[0]))


@pytest.mark.parametrize(
    "settings",
    [
        {"teacher_prompt": "{prompt}!"},
        {"teacher_chat_template": "{{ messages }}"},
        {"teacher_chat_template_kwargs": {"a": 1}},
        {"teacher_tokenizer": tiny(kind="metaspace", template=FAMILIES["chatml"].template)},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_the_teacher_reads_documents_as_the_student_does(settings: dict[str, Any], tmp_path: Path) -> None:
    name = next(iter(settings))
    says = "student's tokenizer.*another one: cut the texts" if name == "teacher_tokenizer" else f"{name} must be null"
    with pytest.raises(ValueError, match=says):
        module(texts(tmp_path / "a.jsonl", TEXT[0]), **settings)


def test_what_needs_prompts_is_refused(tmp_path: Path) -> None:
    source = texts(tmp_path / "a.jsonl", TEXT[0])
    data = module(source, test=source)
    data.setup("test")
    with pytest.raises(ValueError, match=r"model\.responses must be null: the train rows are documents"):
        require_prompts(data, "train", "model.responses must be null")
    require_prompts(data, "val", "model.responses must be null")
    require_prompts(None, "train", "model.responses must be null")
    with pytest.raises(ValueError, match=r"a.jsonl: predict needs prompts"):
        data.predict_dataloader()
    for kind in (PromptDataModule, ContrastiveDataModule):
        with pytest.raises(ValueError, match=r"a.jsonl:1: a (row|pair) needs .*this one has 'text'"):
            kind(source, tokenizer=tiny(template=FAMILIES["chatml"].template)).setup("fit")


def test_documents_and_prompts_may_be_different_splits(tmp_path: Path) -> None:
    source = texts(tmp_path / "a.jsonl", TEXT[0])
    data = module(source, val=write(tmp_path / "b.jsonl", [ROW]), max_length=64)
    assert data.document_splits == {"train"} and len(data.generation_rows("val")) == 1
