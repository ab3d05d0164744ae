"""A teacher with another tokenizer: what a batch holds, what the report counts, responses in the teacher's tokens."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from boundary_checks import FAMILIES_OF_TOKENIZERS, random_text
from chat_templates import FAMILIES
from kd_lightning.constants import IGNORE_INDEX
from kd_lightning.data import ContrastiveDataModule, InstructionDataModule, PromptDataModule, vocabulary_map
from kd_lightning.data.alignment.responses import whole_characters
from kd_lightning.data.alignment.rows import shares_of
from kd_lightning.data.alignment.token_bytes import token_bytes
from kd_lightning.data.row_report import report_line
from kd_lightning.teachers import HFTeacher
from kd_lightning.training.teacher_setup import alignment_notices
from pair_data import pairs
from tiny_tokenizers import tiny

CHATML, GEMMA, LLAMA2 = FAMILIES["chatml"], FAMILIES["gemma"], FAMILIES["llama2"]
ROWS = [
    {"instruction": f"say {n}", "output": "the answer 🙂 é\n" * (n % 3 + 1) + f"{n}", "hint": f"it is {n} " * n}
    for n in range(9)
]


def student_tokenizer() -> Any:
    return tiny(CHATML.specials, None, "<|im_end|>", template=CHATML.template)


def teacher_tokenizer() -> Any:
    return tiny(GEMMA.specials, "<bos>", "<eos>", kind="metaspace", template=GEMMA.template)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def data(path: str, kind: Any = InstructionDataModule, **kwargs: Any) -> Any:
    tokenizers = {"tokenizer": student_tokenizer(), "teacher_tokenizer": teacher_tokenizer()}
    module = kind(path, **{**tokenizers, "batch_size": 4, "shuffle": False, "max_length": 256, **kwargs})
    module.setup("fit")
    return module


def save(tokenizer: Any, folder: Path) -> None:
    """The folder of a model: its configuration, and its tokenizer if it has one."""
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def read_before(tokenizer: Any, ids: list[int], labels: list[int]) -> dict[int, bytes]:
    """The bytes of the answers that are read before each label, by its position; ends of turns are one byte."""
    table, found, read = token_bytes(tokenizer), {}, b""
    for n, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label:
            found[n] = read
            read += table[token] or b"\xff"
    return found


def check_batch(module: Any, batch: dict[str, torch.Tensor]) -> int:
    """Every pair has read the same bytes; returns the number of pairs."""
    count = 0
    for n in range(len(batch["labels"])):
        ids, own_ids = batch["input_ids"][n].tolist(), batch["teacher_input_ids"][n].tolist()
        labeled = (batch["labels"][n] != IGNORE_INDEX).tolist()
        own_labels = batch["teacher_labels"][n]
        answer = [s >= int((own_labels != IGNORE_INDEX).int().argmax()) for s in range(len(own_ids))]
        ours, theirs = (
            read_before(module.tokenizer, ids, labeled),
            read_before(module.teacher_tokenizer, own_ids, answer),
        )
        for t, s in enumerate(batch["teacher_positions"][n].tolist()):
            if s >= 0:
                assert labeled[t]
                assert batch["teacher_attention_mask"][n, s] == 1
                assert ours[t] == theirs[s]
                count += 1
        assert ((own_labels == IGNORE_INDEX) | (own_labels == batch["teacher_input_ids"][n])).all()
    return count


@pytest.mark.parametrize(
    "own", [{}, {"teacher_prompt": "{prompt} hint: {hint}"}, {"max_length": 48}, {"max_length": 40}]
)
def test_pairs_of_a_batch_have_read_the_same_bytes(own: dict[str, Any], tmp_path: Path) -> None:
    module = data(write(tmp_path / "a.jsonl", ROWS), **own)
    assert module.has_two_tokenizers
    assert module.teacher_has_own_input
    assert module.vocabulary_map is vocabulary_map(module.tokenizer, module.teacher_tokenizer)
    count = sum(check_batch(module, batch) for batch in module.train_dataloader())
    report = module.report["train"]
    assert report["aligned_labels"] == count <= report["labels"]
    assert ("truncated" in report and report["truncated"] > 0) == ("max_length" in own)
    if "max_length" not in own:
        assert count == report["labels"] - report.get("spelled_otherwise", 0)


@pytest.mark.parametrize("kind", [InstructionDataModule, ContrastiveDataModule])
def test_the_same_tokenizer_changes_nothing(kind: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS if kind is InstructionDataModule else pairs(9))
    same = tiny(CHATML.specials, None, "<|im_end|>", template=GEMMA.template)
    module, plain = data(path, kind, teacher_tokenizer=same), data(path, kind, teacher_tokenizer=None)
    assert not module.has_two_tokenizers
    assert module.vocabulary_map is None
    assert module.tokenizer_shares() is None
    assert module.teacher_tokenizer is module.tokenizer
    assert module.report == plain.report
    for batch, other in zip(module.train_dataloader(), plain.train_dataloader(), strict=True):
        assert batch.keys() == other.keys()
        assert all(torch.equal(batch[name], column) for name, column in other.items())
    with pytest.raises(ValueError, match=f"{kind.__name__} has one tokenizer"):
        module.teacher_response([1])


@pytest.mark.parametrize("kind", [InstructionDataModule, ContrastiveDataModule, PromptDataModule])
def test_the_students_side_stays_as_it_is(kind: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", pairs(9) if kind is ContrastiveDataModule else ROWS)
    module, plain = data(path, kind), data(path, kind, teacher_tokenizer=None)
    if kind is PromptDataModule:
        for one in (module, plain):
            one.replace_responses({n: f"the answer é {n}" for n in range(9)})
    rows = 0
    for batch, other in zip(module.train_dataloader(), plain.train_dataloader(), strict=True):
        assert all(torch.equal(batch[name], column) for name, column in other.items())
        assert check_batch(module, batch) > 0
        rows += len(batch["labels"])
    assert rows == 9 * (2 if kind is ContrastiveDataModule else 1)


def test_new_responses_of_a_pair_are_aligned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = data(write(tmp_path / "a.jsonl", pairs(4)), ContrastiveDataModule)
    next(iter(module.train_dataloader()))
    module.replace_responses({0: "another 🙂 answer"}, "student")
    (batch,) = module.train_dataloader()
    assert check_batch(module, batch) > 0
    text = module.teacher_tokenizer.decode(batch["teacher_input_ids"][1])
    assert "another 🙂 answer<end_of_turn>" in text


def test_each_side_has_its_own_chat_template_and_padding(tmp_path: Path) -> None:
    module = data(write(tmp_path / "a.jsonl", ROWS))
    student, teacher = (module.generation_rows("train", 1, role)[0] for role in ("student", "teacher"))
    assert student["prompt"].endswith("<|im_start|>user\nsay 0<|im_end|>\n<|im_start|>assistant\n")
    assert teacher["prompt"] == "<bos><start_of_turn>user\nsay 0<end_of_turn>\n<start_of_turn>model\n"
    assert teacher["prompt_ids"] == module.teacher_tokenizer(teacher["prompt"], add_special_tokens=False).input_ids
    assert student["answer"] == teacher["answer"]
    batch = next(iter(module.train_dataloader()))
    padding = batch["teacher_attention_mask"] == 0
    assert (batch["teacher_input_ids"][padding] == module.teacher_pad_id).all()
    assert (batch["teacher_positions"][batch["labels"] == IGNORE_INDEX] == -1).all()
    assert module.largest_id("teacher") < len(module.teacher_tokenizer)
    assert module.largest_id() == max(max(ids) for ids in module._rows["train"]["input_ids"])


def test_a_row_whose_text_is_changed_is_reported(tmp_path: Path) -> None:
    backend = Tokenizer.from_str(teacher_tokenizer().backend_tokenizer.to_str())
    backend.normalizer = normalizers.NFC()
    teacher = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    teacher.chat_template = GEMMA.template
    rows = [{"instruction": "say", "output": text} for text in ("the answer", "the e\u0301 answer", "another")]
    module = data(write(tmp_path / "a.jsonl", rows), teacher_tokenizer=teacher)
    report = module.report["train"]
    assert (report["kept"], report["spelled_otherwise"]) == (3, 1)
    assert "no_pairs" not in report
    assert 0 < report["labels"] - report["aligned_labels"] <= 4
    line = report_line("train", report, 256)
    assert "1 with answers that the two tokenizers spell differently" in line
    assert f"{report['aligned_labels']} of them where both models have read the same bytes" in line


def test_a_row_that_the_teachers_prompt_leaves_no_room_for_is_dropped(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "hint": "x"}, {**ROWS[1], "hint": "long " * 200}]
    module = data(write(tmp_path / "a.jsonl", rows), teacher_prompt="{prompt} {hint}", max_length=64)
    report = module.report["train"]
    assert (report["kept"], report["cut_away"], report["teacher_cut"]) == (1, 1, 1)


def test_rows_for_no_row_have_no_positions(tmp_path: Path) -> None:
    module = data(write(tmp_path / "a.jsonl", ROWS[:1]))
    (row,) = module.token_rows("train")[0][[-1]]
    assert not any(row["label_mask"])
    assert not any(row["teacher_label_mask"])
    assert set(row["teacher_positions"]) == {-1}


def test_shares_of_the_loaded_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    module = data(path, val=path)
    found, known = module.tokenizer_shares(), module.vocabulary_map
    shared, labels = set(known.student_ids.tolist()), []
    for batch in module.every_row("val"):
        labels += batch["labels"][batch["labels"] != IGNORE_INDEX].tolist()
    assert found.student_tokens == len(shared) / len(module.tokenizer)
    assert found.teacher_tokens == len(shared) / len(module.teacher_tokenizer)
    assert found.student_labels == pytest.approx(sum(token in shared for token in labels) / len(labels))
    assert found.aligned_labels == module.report["val"]["aligned_labels"] / len(labels)
    assert 0.5 < found.teacher_labels <= 1


def test_shares_are_computed_once_for_the_same_rows_and_tokenizers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def counted(rows: Any, known: Any) -> Any:
        calls.append(known)
        return shares_of(rows, known)

    monkeypatch.setattr("kd_lightning.data.rows.read_by_teachers.shares_of", counted)
    path = write(tmp_path / "a.jsonl", ROWS)
    module = data(path, val=path)
    first = module.tokenizer_shares()
    module.setup("fit")
    assert module.tokenizer_shares() is first
    assert module.tokenizer_shares("train") == first
    assert len(calls) == 2
    module.teacher_tokenizer_source = tiny(kind="metaspace")
    module.setup("fit")
    assert module.tokenizer_shares() != first
    assert len(calls) == 3


def test_prompts_without_responses_have_no_shares(tmp_path: Path) -> None:
    module = data(write(tmp_path / "a.jsonl", ROWS), PromptDataModule)
    assert module.tokenizer_shares("train") is None
    ((text, few),) = alignment_notices(module, HFTeacher("asset:teacher"))
    assert "depends on the responses of the run" in text
    assert not few
    module.replace_responses({n: f"the answer {n}" for n in range(9)})
    assert module.tokenizer_shares("train").aligned_labels > 0.5
    ((text, _),) = alignment_notices(module, HFTeacher("asset:teacher"))
    assert "of the student's labels (train) are compared with the teacher" in text


def test_tokenizers_are_loaded_without_rows(tmp_path: Path) -> None:
    tokenizers = {"tokenizer": student_tokenizer(), "teacher_tokenizer": teacher_tokenizer()}
    module = InstructionDataModule(str(tmp_path / "nowhere.jsonl"), **tokenizers)
    assert module.load_tokenizers()
    assert module.has_two_tokenizers
    assert module.splits == []
    assert not InstructionDataModule("nowhere.jsonl").load_tokenizers()


@pytest.mark.parametrize("kind", [PromptDataModule, ContrastiveDataModule])
def test_responses_stay_with_another_teacher_tokenizer(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "a.jsonl", pairs(9) if kind is ContrastiveDataModule else ROWS)
    responses = {n: f"the new é answer {n}" for n in range(9)}
    module, expected = data(path, kind, teacher_tokenizer=None), data(path, kind)
    for one in (module, expected):
        next(iter(one.train_dataloader()), None) if kind is ContrastiveDataModule else None
        one.replace_responses(responses)
    next(iter(module.train_dataloader()))
    save(teacher_tokenizer(), tmp_path / "teacher")
    module.use_teacher_tokenizer_of(str(tmp_path / "teacher"))
    module.setup("fit")
    assert module.missing_responses() == []
    for batch, other in zip(module.train_dataloader(), expected.train_dataloader(), strict=True):
        assert batch.keys() == other.keys()
        assert all(torch.equal(batch[name], column) for name, column in other.items())
        assert check_batch(module, batch) > 0
        assert "the new é answer" in module.tokenizer.decode(batch["input_ids"][-1])


def test_another_teacher_tokenizer_makes_other_rows(tmp_path: Path) -> None:
    module = data(write(tmp_path / "a.jsonl", ROWS), teacher_tokenizer=None)
    before = next(iter(module.train_dataloader()))
    save(teacher_tokenizer(), tmp_path / "teacher")
    module.use_teacher_tokenizer_of(str(tmp_path / "teacher"))
    module.setup("fit")
    assert module.has_two_tokenizers
    batch = next(iter(module.train_dataloader()))
    assert check_batch(module, batch) > 0
    save(student_tokenizer(), tmp_path / "same")
    module.use_teacher_tokenizer_of(str(tmp_path / "same"))
    module.setup("fit")
    assert next(iter(module.train_dataloader())).keys() == before.keys()
    save(None, tmp_path / "none")
    module.use_teacher_tokenizer_of(str(tmp_path / "none"))
    module.setup("fit")
    assert not module.has_two_tokenizers


def test_a_tokenizer_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="teacher_tokenizer: 'nowhere' cannot be loaded"):
        data(write(tmp_path / "a.jsonl", ROWS), teacher_tokenizer="nowhere")


# ---------------------------------------------------------------------------------------------------------- responses
@pytest.mark.parametrize("teacher", [teacher_tokenizer, lambda: tiny(kind="metaspace")])
@pytest.mark.parametrize("index", range(len(ROWS)))
def test_a_response_has_the_teachers_tokens_of_a_row(teacher: Any, index: int, tmp_path: Path) -> None:
    module = data(write(tmp_path / "a.jsonl", ROWS), teacher_tokenizer=teacher())
    row = module._rows["train"][index]
    response = [token for token, label in zip(row["input_ids"], row["label_mask"], strict=True) if label]
    found = module.teacher_response(response)
    first = row["teacher_label_mask"].index(True)
    assert found.ids == row["teacher_input_ids"][first : first + len(found.ids)]
    at = row["label_mask"].index(True)
    expected = row["teacher_positions"][at : at + len(response)]
    assert found.positions == [-1 if s < 0 else s - first for s in expected]
    assert [token != IGNORE_INDEX for token in found.labels] == row["teacher_label_mask"][first:][: len(found.ids)]


@pytest.mark.parametrize("family", FAMILIES_OF_TOKENIZERS)
def test_random_responses(family: str, tmp_path: Path) -> None:
    draw = random.Random(family)
    tokenizer = FAMILIES_OF_TOKENIZERS[family]()
    module = data(write(tmp_path / "a.jsonl", ROWS[:1]), tokenizer=tokenizer)
    table, own = token_bytes(tokenizer), token_bytes(module.teacher_tokenizer)
    for number in range(60):
        ids = tokenizer(random_text(draw), add_special_tokens=False).input_ids
        ids = [*ids, tokenizer.eos_token_id] if number % 2 else ids[: draw.randint(1, len(ids))]
        found = module.teacher_response(ids)
        assert len(found.positions) == len(ids)
        assert len(found.labels) == len(found.ids)
        for t, s in enumerate(found.positions):
            if s >= 0:
                read = b"".join(table[n] or b"" for n in ids[:t]), b"".join(own[n] or b"" for n in found.ids[:s])
                assert read[0].lstrip() == read[1].lstrip()


def test_a_response_that_ends_inside_a_character_is_cut(tmp_path: Path) -> None:
    module = data(write(tmp_path / "a.jsonl", ROWS))
    ids = module.tokenizer("the 🙂", add_special_tokens=False).input_ids[:-1]
    found = module.teacher_response(ids)
    assert module.teacher_tokenizer.decode(found.ids) == "the "
    assert found.positions[-3:] == [-1, -1, -1]
    assert module.teacher_response([]).ids == []


@pytest.mark.parametrize("text", ["", "a", "é", "東", "🙂", "aé東🙂"])
def test_whole_characters(text: str) -> None:
    whole = text.encode()
    assert whole_characters(whole) == text
    for size in range(1, len((text[-1:] or "").encode())):
        assert whole_characters(whole[:-size]) == text[:-1]


def test_special_tokens_inside_a_response_are_words_for_the_teacher(tmp_path: Path) -> None:
    module = data(write(tmp_path / "a.jsonl", ROWS))
    start = module.tokenizer.convert_tokens_to_ids("<|im_start|>")
    words = module.tokenizer("the answer", add_special_tokens=False).input_ids
    found = module.teacher_response([*words, start, *words, module.tokenizer.eos_token_id])
    assert module.teacher_tokenizer.decode(found.ids) == "the answer<|im_start|>the answer<end_of_turn>"
    assert found.positions[len(words)] == -1
    assert found.positions[-1] == len(found.ids) - 1
    typed = module.tokenizer("say <eos> now", add_special_tokens=False).input_ids
    assert module.teacher_tokenizer.convert_tokens_to_ids("<eos>") not in module.teacher_response(typed).ids
