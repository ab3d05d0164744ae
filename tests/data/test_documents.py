"""Documents are cut into windows in which every token but the first of a document is predicted once."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from chat_templates import FAMILIES
from kd_lightning.data import IGNORE_INDEX, ContrastiveDataModule, InstructionDataModule
from kd_lightning.data.alignment.documents import shared_windows
from kd_lightning.data.alignment.vocabulary import vocabulary_of
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
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_the_teacher_reads_documents_as_the_student_does(settings: dict[str, Any], tmp_path: Path) -> None:
    name = next(iter(settings))
    with pytest.raises(ValueError, match=f"{name} must be null for documents"):
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


OTHERS = {
    "both begin texts": ({"adds_bos": True}, {"kind": "metaspace", "adds_bos": True}),
    "the teacher begins texts": ({"bos": None}, {"kind": "metaspace", "adds_bos": True}),
    "the student begins texts": ({"kind": "metaspace", "adds_bos": True}, {"bos": None}),
    "none begins texts": ({"bos": None}, {"bos": None, "kind": "metaspace"}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_two_tokenizers_read_the_same_bytes_in_each_window(name: str, tmp_path: Path) -> None:
    rng = random.Random(20261130)
    student, teacher = (tiny(**{"template": FAMILIES["chatml"].template, **kwargs}) for kwargs in OTHERS[name])
    found = [story(rng).strip() for _ in range(20)]
    data = module(
        texts(tmp_path / "a.jsonl", *found), tokenizer=student, teacher_tokenizer=teacher, max_length=24, batch_size=1
    )
    assert data.has_two_tokenizers and data.document_splits == {"train"}
    learned: dict[int, list[int]] = {}
    for batch in data.train_dataloader():
        (location,) = data.row_locations("train", batch["row_ids"].tolist())
        ours, theirs = batch["labels"][0], batch["teacher_labels"][0]
        assert max(len(ours), len(theirs)) <= 24 and ours[0] == theirs[0] == IGNORE_INDEX
        assert (ours[1:] == batch["input_ids"][0, 1:]).all()
        assert (theirs[1:] == batch["teacher_input_ids"][0, 1:]).all()
        number = int(location.split(":")[-1].split(" ")[0])
        assert batch["teacher_positions"][0, :2].tolist() == [-1, 1] or number not in learned
        sides = ((student, ours), (teacher, theirs))
        one, other = ("".join(vocabulary_of(side).spell(ids[1:].tolist(), "?")) for side, ids in sides)
        assert one == other if number in learned else one.lstrip(" ") == other.lstrip(" ")
        learned.setdefault(number, []).extend(ours[1:].tolist())
    report = data.report["train"]
    assert "no_pairs" not in report
    assert report["aligned_labels"] > 0.3 * report["labels"]
    for number, text in enumerate(found, start=1):
        whole = [*student(text, add_special_tokens=False).input_ids, student.eos_token_id]
        got = learned.get(number, [])
        assert whole[len(whole) - len(got) :] == got  # nothing is lost behind the first position that both have read
        assert len(whole) - len(got) <= (0 if name == "both begin texts" else 12)


def test_windows_of_two_tokenizers() -> None:
    rng = random.Random(20261131)
    for _ in range(200):
        pairs, at = [], (1, 1)
        for _ in range(rng.randrange(0, 30)):
            pairs.append(at)
            at = at[0] + rng.randrange(1, 4), at[1] + rng.randrange(1, 4)
        size = rng.randrange(4, 12)
        found = shared_windows(pairs, at, size)
        assert [start for (start, _), _ in found[1:]] == [end - 1 for (_, end), _ in found[:-1]]
        assert [start for _, (start, _) in found[1:]] == [end - 1 for _, (_, end) in found[:-1]]
        assert all(2 <= end - start <= size for window in found for start, end in window)
        assert not pairs or (found[0][0][0], found[-1][0][1], found[-1][1][1]) == (0, *at)
    with pytest.raises(ValueError, match="no common bytes within max_length=8 tokens after token 1"):
        shared_windows([(1, 1), (2, 9)], (3, 10), 8)
