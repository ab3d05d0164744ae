"""The teacher's own input: prompts from the fields of a row, labels that are the same tokens, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from chat_templates import FAMILIES
from kd_lightning.constants import IGNORE_INDEX
from kd_lightning.data import ContrastiveDataModule, InstructionDataModule, PromptDataModule
from pair_data import pairs
from tiny_tokenizers import tiny

CHATML = FAMILIES["chatml"]
ROWS = [
    {"instruction": f"say {n}", "output": f"the answer {n} " * (n % 3 + 1), "hint": f"it is {n} " * n, "size": n}
    for n in range(9)
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def tokenizer() -> Any:
    return tiny(CHATML.specials, None, "<|im_end|>", template=CHATML.template)


def data(path: str, kind: Any = InstructionDataModule, **kwargs: Any) -> Any:
    module = kind(path, **{"tokenizer": tokenizer(), "batch_size": 4, "shuffle": False, "max_length": 256, **kwargs})
    module.setup("fit")
    return module


def labeled(ids: torch.Tensor, labels: torch.Tensor) -> list[list[int]]:
    return [row[there].tolist() for row, there in zip(ids, labels != IGNORE_INDEX, strict=True)]


def test_a_batch_holds_both_inputs_and_the_same_labels(tmp_path: Path) -> None:
    module = data(write(tmp_path / "a.jsonl", ROWS), teacher_prompt="{prompt}\nhint {size}: {hint}{{x}}")
    plain = data(write(tmp_path / "b.jsonl", ROWS))
    for batch, other in zip(module.train_dataloader(), plain.train_dataloader(), strict=True):
        assert all(torch.equal(batch[name], column) for name, column in other.items())
        own = {name: batch[f"teacher_{name}"] for name in ("input_ids", "attention_mask", "labels")}
        assert own["input_ids"].shape == own["attention_mask"].shape == own["labels"].shape
        assert labeled(batch["input_ids"], batch["labels"]) == labeled(own["input_ids"], own["labels"])
        for n, ids, mask in zip(batch["row_ids"].tolist(), own["input_ids"], own["attention_mask"], strict=True):
            text = module.tokenizer.decode(ids[mask.bool()])
            assert f"user\nsay {n}\nhint {n}: {ROWS[n]['hint']}{{x}}<|im_end|>" in text


@pytest.mark.parametrize("kind", [InstructionDataModule, ContrastiveDataModule])
def test_the_prompt_alone_gives_the_students_input(kind: Any, tmp_path: Path) -> None:
    rows = ROWS if kind is InstructionDataModule else pairs(9)
    module = data(write(tmp_path / "a.jsonl", rows), kind, teacher_prompt="{prompt}", max_length=72)
    count = 0
    for batch in module.train_dataloader():
        for name in ("input_ids", "attention_mask", "labels"):
            assert torch.equal(batch[name], batch[f"teacher_{name}"])
        count += len(batch["labels"])
    assert count == len(rows) * (2 if kind is ContrastiveDataModule else 1)


def test_the_last_user_turn_is_replaced_and_other_turns_stay(tmp_path: Path) -> None:
    turns = [("system", "be"), ("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns], "hint": "five"}
    module = data(write(tmp_path / "a.jsonl", [row]), teacher_prompt="{hint} {prompt}")
    (student,), (teacher,) = (module.generation_rows("train", role=role) for role in ("student", "teacher"))
    assert teacher["prompt"] == student["prompt"].replace("three", "five three")
    assert (teacher["answer"], teacher["row"]) == (student["answer"], student["row"])
    (batch,) = module.train_dataloader()
    assert labeled(batch["input_ids"], batch["labels"]) == labeled(batch["teacher_input_ids"], batch["teacher_labels"])
    assert int((batch["labels"] != IGNORE_INDEX).sum()) > len("four")


def test_plain_texts_and_parts(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "say "}, {"type": "text", "text": "it"}]
    rows = [
        {"prompt": "say it", "completion": " then", "hint": "x"},
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "then"}], "hint": "x"},
    ]
    for row in rows:
        module = data(write(tmp_path / "a.jsonl", [row]), teacher_prompt="{prompt}, {hint}")
        (found,) = module.generation_rows("train", role="teacher")
        assert "say it, x" in found["prompt"]


def test_another_template_for_the_teacher(tmp_path: Path) -> None:
    template = CHATML.template.replace("{%- for", "TEACHER{%- for", 1)
    template = template if "TEACHER" in template else "TEACHER" + template
    file = tmp_path / "teacher.jinja"
    file.write_text(template)
    for given in (template, str(file)):
        module = data(write(tmp_path / "a.jsonl", ROWS), teacher_chat_template=given)
        (batch, *_) = module.train_dataloader()
        assert "TEACHER" in module.tokenizer.decode(batch["teacher_input_ids"][0])
        assert "TEACHER" not in module.tokenizer.decode(batch["input_ids"][0])
        assert module.tokenizer.chat_template == CHATML.template  # the exported one


def test_variables_of_the_teachers_template(tmp_path: Path) -> None:
    template = "{{ kind | default('none') }}{{ more | default('none') }}" + CHATML.template
    kwargs = {"chat_template": template, "chat_template_kwargs": {"kind": "small", "more": "yes"}}
    module = data(write(tmp_path / "a.jsonl", ROWS), teacher_chat_template_kwargs={"kind": "large"}, **kwargs)
    (student, *_), (teacher, *_) = (module.generation_rows("train", 1, role) for role in ("student", "teacher"))
    assert student["prompt"].startswith("smallyes")
    assert teacher["prompt"].startswith("largeyes")


@pytest.mark.parametrize("text", ["{hint", "hint}", "{}", "{0}", "{hint.upper}", "{hint[0]}", "{hint!r}", "{size:3d}"])
def test_a_format_that_names_something_else_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="teacher_prompt"):
        InstructionDataModule(write(tmp_path / "a.jsonl", ROWS), teacher_prompt=text)


@pytest.mark.parametrize("value", [None, ["a"], {"a": 1}, "absent"])
def test_a_field_that_is_missing_or_no_text_is_refused_with_file_and_line(value: Any, tmp_path: Path) -> None:
    rows = [dict(row) for row in ROWS]
    rows[5]["hint"] = value
    if value == "absent":
        del rows[5]["hint"]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=r"a\.jsonl:6: .*'hint'"):
        data(path, teacher_prompt="{prompt} {hint}")


def test_a_conversation_without_a_user_is_refused(tmp_path: Path) -> None:
    row = {"messages": [{"role": "system", "content": "be"}, {"role": "assistant", "content": "x"}]}
    with pytest.raises(ValueError, match=r"a\.jsonl:1: teacher_prompt replaces the last user turn"):
        data(write(tmp_path / "a.jsonl", [row]), teacher_prompt="{prompt} more")


def test_labels_that_do_not_fit_behind_the_teachers_prompt_are_removed_on_both_sides(tmp_path: Path) -> None:
    rows = [{"instruction": "say", "output": "a b c d e f g h", "hint": "x " * n} for n in range(0, 60, 6)]
    module = data(write(tmp_path / "a.jsonl", rows), teacher_prompt="{hint}{prompt}", max_length=40)
    found = {}
    for batch in module.train_dataloader():
        assert batch["teacher_input_ids"].shape[1] <= 40
        pairs = (labeled(batch[f"{side}input_ids"], batch[f"{side}labels"]) for side in ("", "teacher_"))
        for n, one, other in zip(batch["row_ids"].tolist(), *pairs, strict=True):
            assert one == other
            found[n] = len(one)
    counts = module.report["train"]
    assert 0 < len(found) < len(rows)  # the longest leave no label
    assert len(set(found.values())) > 1  # others leave some
    assert counts["teacher_cut"] == len(rows) - sum(count == max(found.values()) for count in found.values())
    with pytest.raises(ValueError, match="no answer fits max_length=40 after the teacher's prompt"):
        data(write(tmp_path / "b.jsonl", rows[-1:]), teacher_prompt="{hint}{prompt}", max_length=40)


def test_a_template_that_ends_answers_otherwise_is_refused_or_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    end = CHATML.template.replace("<|im_end|>", " END")
    with pytest.raises(ValueError, match=r"a\.jsonl:1: the teacher's chat template writes the answer as .* in 9 of 9"):
        data(path, teacher_chat_template=end)
    some = end.join(["{% if 'say 3' in messages[0]['content'] %}", "{% else %}" + CHATML.template + "{% endif %}"])
    module = data(path, teacher_chat_template=some)
    assert module.report["train"]["teacher_difference"] == 1
    assert 3 not in torch.cat([batch["row_ids"] for batch in module.train_dataloader()]).tolist()


def test_pairs_and_replaced_responses(tmp_path: Path) -> None:
    rows = [{**row, "hint": f"hint {n}"} for n, row in enumerate(pairs(5))]
    module = data(write(tmp_path / "a.jsonl", rows), ContrastiveDataModule, teacher_prompt="{prompt} {hint}")
    module.replace_responses({1: "something new", 2: ""})
    texts = []
    for batch in module.train_dataloader():
        ours, theirs = (labeled(batch[f"{side}input_ids"], batch[f"{side}labels"]) for side in ("", "teacher_"))
        assert ours == theirs
        for n, ids in zip(batch["row_ids"].tolist(), batch["teacher_input_ids"], strict=True):
            assert f"hint {n}" in module.tokenizer.decode(ids)
        texts += [module.tokenizer.decode(ids) for ids in ours]
    assert sum("something new" in text for text in texts) == 1


def test_prompts_with_later_responses(tmp_path: Path) -> None:
    module = data(write(tmp_path / "a.jsonl", ROWS), PromptDataModule, teacher_prompt="{prompt} {hint}")
    assert "it is 3" in module.generation_rows("train", role="teacher")[3]["prompt"]
    module.replace_responses({n: f"new {n}" for n in range(9)})
    (batch, *_) = module.train_dataloader()
    assert labeled(batch["input_ids"], batch["labels"]) == labeled(batch["teacher_input_ids"], batch["teacher_labels"])


def test_the_longest_row_is_each_models_own(tmp_path: Path) -> None:
    module = data(write(tmp_path / "a.jsonl", ROWS), teacher_prompt="{prompt} {hint}")
    assert module.longest("teacher") > module.longest("student") == module.longest()
    assert module.teacher_has_own_input
    assert not data(write(tmp_path / "a.jsonl", ROWS)).teacher_has_own_input
