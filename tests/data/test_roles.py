"""Calls and results of tools in ShareGPT files, and roles that only the chat template knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chat_templates import FAMILIES
from kd_lightning.data import ContrastiveDataModule, InstructionDataModule, PromptDataModule
from kd_lightning.data.conversation import parse_row
from kd_lightning.data.text.text_tokenizer import TextTokenizer
from tiny_tokenizers import tiny

CALL = {"name": "weather", "arguments": {"city": "Paris"}}


def said(role: str, value: Any) -> dict[str, Any]:
    return {"from": role, "value": value}


@pytest.mark.parametrize("role", ["function_call", "Function_Call", "tool_call"])
@pytest.mark.parametrize(
    "call", [CALL, {**CALL, "arguments": json.dumps(CALL["arguments"])}, [CALL, {"name": "clock", "arguments": {}}]]
)
def test_calls_and_results_of_tools(role: str, call: Any) -> None:
    turns = [said("human", "rain?"), said(role, json.dumps(call)), said("observation", "no"), said("gpt", "dry")]
    conversation = parse_row({"conversations": turns}, "row")
    assert [message["role"] for message in conversation.messages] == ["user", "assistant", "tool", "assistant"]
    calls = conversation.messages[1]["tool_calls"]
    assert [one["function"] for one in calls] == (call if isinstance(call, list) else [call])
    assert "content" not in conversation.messages[1] and conversation.answer_turns == [1, 3]


def test_a_call_is_labeled_as_any_other() -> None:
    family = FAMILIES["qwen2 with tools"]
    tokenizer = tiny(family.specials, family.bos, family.eos, kind=family.kind, template=family.template)

    turns = [
        said("human", "rain?"),
        said("function_call", json.dumps(CALL)),
        said("observation", "no"),
        said("gpt", "b"),
    ]
    found = TextTokenizer(tokenizer).tokenize(parse_row({"conversations": turns}, "row"))
    labels = [i for i, marked in zip(found["input_ids"], found["label_mask"], strict=True) if marked]
    assert family.call in tokenizer.decode(labels) and found["unlocated"] == 0 and not found["unread"]


@pytest.mark.parametrize("value", ["weather(Paris)", "[]", "3", '{"arguments": {}}', '{"name": 3}', "", None])
def test_a_call_that_is_not_clear_is_refused(value: Any) -> None:
    turns = [said("human", "rain?"), said("function_call", value)]
    with pytest.raises(ValueError, match=r"^a:3: field 'conversations', message 2: the text of role 'function_call'"):
        parse_row({"conversations": turns}, "a:3")


OWN = (
    "{% for m in messages %}{% if m.role == 'narrator' %}[{{ m.content }}]{% elif m.role in (\"Judge\", 'jury') %}"
    "({{ m.content }}){% else %}<{{ m.role }}>{{ m.content }}</s>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("role", ["narrator", "Judge", "jury"])
def test_a_role_that_the_template_names(role: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    turns = [{"role": role, "content": "the sea"}, {"role": "user", "content": "a"}]
    answer = [{"role": "assistant", "content": "b"}]
    path.write_text(json.dumps({"messages": turns + answer, "chosen": answer, "rejected": answer}))
    for module in (InstructionDataModule, PromptDataModule, ContrastiveDataModule):
        data: Any = module(str(path), tokenizer=tiny(), chat_template=OWN)
        data.setup("fit")
        assert "the sea" in data.generation_rows("train")[0]["prompt"]
        assert data.conversations("train", 1)[0].messages[0]["role"] == role
        other = module(str(path), tokenizer=tiny(), chat_template=FAMILIES["zephyr"].template)
        with pytest.raises(ValueError, match=f"rows.jsonl:1: field 'messages', message 1: unknown role '{role}'"):
            other.setup("fit")
