"""A model is asked with what stood before its words in training, and with the date of the run."""

from __future__ import annotations

import json
import logging
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from chat_templates import FAMILIES
from kd_lightning.data import IGNORE_INDEX, ContrastiveDataModule, InstructionDataModule, PromptDataModule
from kd_lightning.data.conversation import parse_row
from kd_lightning.data.text import rendering
from kd_lightning.data.text.prompt_notice import prompt_notice
from kd_lightning.data.text.text_tokenizer import TextTokenizer
from tiny_tokenizers import tiny

IM = FAMILIES["chatml"].specials
HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
LAST = "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
EMPTY = "<think>\n\n</think>\n\n"
BEFORE = "{% if m.role == 'assistant' and '<think>' not in m.content %}" + EMPTY + "{% endif %}"
OPENS = {  # the text before an answer without thoughts, the generation prompt, and the variable that mends it
    "an empty thought": (
        HEAD
        + BEFORE
        + LAST
        + "{% if enable_thinking is defined and enable_thinking is false %}"
        + EMPTY
        + "{% endif %}{% endif %}",
        "enable_thinking=false",
    ),
    "a thought is opened": (
        HEAD
        + BEFORE
        + LAST
        + "{% if not (no_reasoning | default(false)) %}<think>\n{% else %}"
        + EMPTY
        + "{% endif %}{% endif %}",
        "no_reasoning=true",
    ),
    "a thought is opened, not trained": (
        HEAD + LAST + "{% if thinking is not defined or thinking %}<think>\n{% endif %}{% endif %}",
        "thinking=false",
    ),
    "no variable": (HEAD + BEFORE + LAST + "{% endif %}", None),
    "no generation prompt": (HEAD + "{{ m.content }}<|im_end|>\n{% endfor %}", None),
}


def tokenizer(template: str) -> Any:
    return tiny((*IM, "<think>", "</think>"), None, "<|im_end|>", template=template)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ROWS = [{"instruction": "the answer " * n, "output": "a town" * n} for n in range(1, 4)]
ROWS += [
    {"messages": [*({"role": role, "content": "the sea"} for role in ("user", "assistant") * 2)]},
    {"prompt": "the little ", "completion": "town"},
    {"prompt": "the little", "completion": " town"},
]


@pytest.mark.parametrize("name", OPENS)
@pytest.mark.parametrize("kind", ["val", "test"])
def test_rows_are_asked_with_what_stands_before_their_answers(name: str, kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    data = InstructionDataModule(path, **{kind: path}, tokenizer=tokenizer(OPENS[name][0]), shuffle=False)
    data.setup("fit" if kind == "val" else "test")
    data.setup("fit")
    (batch,) = data.train_dataloader()
    for row, ids, labels in zip(data.generation_rows(kind), batch["input_ids"], batch["labels"], strict=True):
        marked = (labels != IGNORE_INDEX).nonzero().flatten().tolist()
        begin = max(n for n in marked if n - 1 not in marked)  # of the last answer
        assert row["prompt_ids"] == ids[:begin].tolist()
        assert data.tokenizer.decode(row["prompt_ids"]).startswith(row["prompt"][:10])


@pytest.mark.parametrize("family", [name for name in FAMILIES if "phi" not in name and "deepseek" not in name])
def test_usual_templates_ask_as_they_did(family: str, tmp_path: Path) -> None:
    chosen = FAMILIES[family]
    text = TextTokenizer(tiny(chosen.specials, chosen.bos, chosen.eos, kind=chosen.kind, template=chosen.template))
    for row in ROWS[:3]:
        conversation = parse_row(row, "row")
        asked = text.chat.prompt(conversation)[0]
        if "thoughts" not in family:
            assert text.trained_prompt(conversation, asked) is None
            assert text.prompt(conversation)[0] == asked


@pytest.mark.parametrize("name", OPENS)
def test_the_notice_names_the_variable_that_mends_it(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template, variable = OPENS[name]
    path = write(tmp_path / "rows.jsonl", ROWS[:3])
    with caplog.at_level(logging.INFO):
        data = InstructionDataModule(path, tokenizer=tokenizer(template))
        data.setup("fit")
    (notice,) = [
        record.message for record in caplog.records if "in training, where the generation prompt" in record.message
    ]
    assert "\n" not in notice and notice.startswith("3 of 3 answers stand behind")
    assert ("set data.chat_template_kwargs." in notice) == (variable is not None)
    if variable is not None:
        assert f"set data.chat_template_kwargs.{variable}," in notice
        key, value = variable.split("=")
        given = {key: json.loads(value)}
        mended = InstructionDataModule(path, tokenizer=tokenizer(template), chat_template_kwargs=given)
        mended.setup("fit")
        assert prompt_notice(mended.text_tokenizer, mended.conversations("train", 9)) is None
        conversation = mended.conversations("train", 1)[0]
        assert mended.text_tokenizer.prompt(conversation)[0] == mended.text_tokenizer.chat.prompt(conversation)[0]


def test_an_answer_with_thoughts_needs_no_notice() -> None:
    text = TextTokenizer(tokenizer(OPENS["an empty thought"][0]))
    rows = [parse_row({"instruction": "a", "output": "<think>\nhm\n</think>\n\nforty"}, "row")]
    assert prompt_notice(text, rows) is None
    assert prompt_notice(text, [parse_row(ROWS[0], "row")]) is not None


# ------------------------------------------------------------------------------------------------------------- the date
DATED = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<|im_start|>system\nToday is {{ date_string }}<|im_end|>\n" + HEAD + LAST + "{% endif %}"
)


class Clock(datetime):
    """A clock that stands still."""

    day = 3

    @classmethod
    def now(cls, tz: Any = None) -> Clock:
        return cls(2026, 2, cls.day, 23, 59)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[Clock]:
    monkeypatch.setattr(rendering, "datetime", Clock)
    monkeypatch.setattr(Clock, "day", 3)
    return Clock


def ids_of(data: InstructionDataModule) -> list[list[int]]:
    return [row.tolist() for batch in data.train_dataloader() for row in batch["input_ids"]]


PAIRS = [{"prompt": row["instruction"], "chosen": row["output"], "rejected": "red"} for row in ROWS[:3]]


@pytest.mark.parametrize("kind", [InstructionDataModule, ContrastiveDataModule])
def test_a_resumed_run_keeps_its_date(kind: Any, tmp_path: Path, clock: type[Clock]) -> None:
    turns = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in PAIRS]
    path = write(tmp_path / "rows.jsonl", ROWS[:3] if kind is InstructionDataModule else turns)

    def module() -> Any:
        data = kind(path, tokenizer=tokenizer(DATED), shuffle=False)
        data.setup("fit")
        return data

    first = module()
    assert "Today is 03 Feb 2026" in first.generation_rows("train")[0]["prompt"]
    assert first.state_dict()["date"] == "2026-02-03"
    ids = ids_of(first)
    clock.day = 4
    resumed, fresh = module(), module()
    assert ids_of(fresh) != ids
    resumed.load_state_dict(first.state_dict())
    assert ids_of(resumed) == ids
    assert "Today is 03 Feb 2026" in resumed.generation_rows("train")[0]["prompt"]
    assert resumed.state_dict() == first.state_dict()


def test_a_given_date_and_templates_without_a_date(tmp_path: Path, clock: type[Clock]) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS[:3])
    data = InstructionDataModule(path, tokenizer=tokenizer(DATED), date="2024-12-31")
    data.setup("fit")
    assert "Today is 31 Dec 2024" in data.generation_rows("train")[0]["prompt"]
    plain = InstructionDataModule(path, tokenizer=tokenizer(FAMILIES["chatml"].template))
    plain.setup("fit")
    digest = plain.text_tokenizer.fingerprint()
    assert plain.state_dict() == {}
    clock.day = 5
    again = InstructionDataModule(path, tokenizer=tokenizer(FAMILIES["chatml"].template))
    again.setup("fit")
    assert again.text_tokenizer.fingerprint() == digest
    with pytest.raises(ValueError, match="date must be a date such as 2026-01-31, got 'today'"):
        InstructionDataModule(path, date="today")


def test_prompts_without_answers_keep_the_generation_prompt(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"instruction": "a"}])
    data = PromptDataModule(path, tokenizer=tokenizer(OPENS["an empty thought"][0]))
    data.setup("fit")
    assert data.generation_rows("train")[0]["prompt"].endswith("<|im_start|>assistant\n")
