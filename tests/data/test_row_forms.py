"""The forms of a turn: other names, turns that are not learned, nulls, parts, arguments as text."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from chat_templates import FAMILIES, Family
from kd_lightning.data import InstructionDataModule, PromptDataModule
from kd_lightning.data.conversation import parse_row
from kd_lightning.data.pairs import parse_pair, parse_prompt
from kd_lightning.data.sources import read_rows
from kd_lightning.data.tokenization import TextTokenizer
from tiny_tokenizers import tiny


def turn(role: str, content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def tokenizer_of(family: Family, **kwargs: Any) -> Any:
    return tiny(family.specials, **{"bos": family.bos, "eos": family.eos, "kind": family.kind, **kwargs})


def text_of(template: str, row: dict[str, Any]) -> str:
    text = TextTokenizer(tiny(FAMILIES["chatml"].specials, None, "<|im_end|>", template=template))
    return text.chat.full_text(parse_row(row, "row")) or ""


def label_runs(tokenizer: Any, row: dict[str, Any]) -> list[str]:
    found = TextTokenizer(tokenizer, max_length=10_000).tokenize(parse_row(row, "row"))
    runs = itertools.groupby(zip(found["input_ids"], found["label_mask"], strict=True), key=lambda pair: pair[1])
    return ["".join(tokenizer.decode([token for token, _ in run]).split()) for counts, run in runs if counts]


MARKED_EOS = Family(
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    ("<s>", "</s>"),
    "</s>",
    bos="<s>",
    eos="</s>",
)


@pytest.mark.parametrize("special", ["bos = eos", "pad = eos", "no bos", "no pad"])
@pytest.mark.parametrize("name", [*(name for name in FAMILIES if "phi" not in name), "marked, writes eos"])
def test_every_answer_ends_once_whatever_the_special_tokens_are(name: str, special: str) -> None:
    family = {**FAMILIES, "marked, writes eos": MARKED_EOS}[name]
    changes = {
        "bos = eos": {"bos": family.eos},
        "pad = eos": {"pad": family.eos},
        "no bos": {"bos": None},
        "no pad": {},
    }
    tokenizer = tokenizer_of(family, template=family.template, **changes[special])
    words = ("a colour", "the sea")
    messages = [turn("user", "one"), turn("assistant", words[0]), turn("user", "two"), turn("assistant", words[1])]
    ends = ["".join((word + family.end).split()) for word in words]
    assert label_runs(tokenizer, {"messages": messages}) == ends
    assert label_runs(tokenizer, {"messages": messages[:2]}) == ends[:1]


def test_a_plain_completion_ends_once_if_first_and_last_token_are_one() -> None:
    tokenizer = tiny(bos="</s>", eos="</s>", adds_bos=True)
    found = TextTokenizer(tokenizer).tokenize(parse_row({"prompt": "a", "completion": "b"}, "row"))
    assert found["input_ids"].count(tokenizer.eos_token_id) == 2
    assert label_runs(tokenizer, {"prompt": "a", "completion": "b"}) == ["b</s>"]


@pytest.mark.parametrize(
    "flag", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"trainable": False}, {"loss_mask": 0}, {"loss": False}]
)
@pytest.mark.parametrize("name", ["chatml", "marked", "llama3"])
def test_a_turn_that_is_not_to_be_learned_has_no_labels(name: str, flag: dict[str, Any]) -> None:
    tokenizer = tokenizer_of(FAMILIES[name], template=FAMILIES[name].template)
    learned = {key: 1 for key in flag}
    messages = [
        turn("user", "one", **flag),
        turn("assistant", "seven", **flag),
        turn("user", "two"),
        turn("assistant", "red", **learned),
        turn("user", "three"),
        turn("assistant", "last", **flag),
    ]
    assert label_runs(tokenizer, {"messages": messages}) == ["red" + FAMILIES[name].end]
    assert label_runs(tokenizer, {"prompt": messages[:1], "completion": messages[1:4]}) == ["red" + FAMILIES[name].end]
    conversation = parse_row({"messages": messages}, "row")
    assert conversation.answer == "red" and conversation.excluded == 2 and len(conversation.question) == 3
    assert not any(key in message for message in conversation.messages for key in flag)


def test_rows_without_a_learned_turn_are_reported(tmp_path: Path) -> None:
    chatml = FAMILIES["chatml"]
    tokenizer = tokenizer_of(chatml, template=chatml.template)
    silent = {"messages": [turn("user", "one"), turn("assistant", "seven", train=False)]}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(silent) + "\n" + json.dumps({"instruction": "a", "output": "b"}))
    data = InstructionDataModule(str(path), tokenizer=tokenizer)
    data.setup("fit")
    assert data.report["train"]["kept"] == 1 and data.report["train"]["empty"] == 1
    assert data.report["train"]["excluded"] == 1
    path.write_text(json.dumps(silent))
    data = InstructionDataModule(str(path), tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"empty or excluded by its row \(1 with weight 0"):
        data.setup("fit")


@pytest.mark.parametrize("flag", [{"weight": 0.5}, {"train": "no"}, {"loss_mask": [0, 1]}, {"trainable": 2}])
def test_another_weight_is_refused(flag: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^a:3: .*message 2: '{next(iter(flag))}' must be 0 or 1, false or true, got"):
        parse_row({"messages": [turn("user", "a"), turn("assistant", "b", **flag)]}, "a:3")


PLAIN = [turn("user", "a"), turn("assistant", "b")]
OTHER_NAMES = [
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"conversation": [{"from": "user", "value": "a"}, {"from": "Model", "value": "b"}]},
    {"conversations": PLAIN},
    {"messages": [{"from": "HUMAN", "value": "a"}, {"from": "ChatGPT", "value": "b"}]},
    {"messages": [turn("User", "a"), turn("Assistant", "b")]},
    {"messages": [turn("USER", "a"), turn("model", "b")]},
    {"prompt": [turn("human", "a")], "completion": [turn("MODEL", "b")]},
]


@pytest.mark.parametrize("row", OTHER_NAMES, ids=str)
def test_roles_and_fields_by_other_names(row: dict[str, Any]) -> None:
    conversation = parse_row(row, "row")
    assert conversation.messages == PLAIN and conversation.answer == "b"
    assert parse_prompt(row, "row").messages == PLAIN[:1]


def test_sharegpt_in_pairs_prompts_and_with_a_system_field(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    pair = parse_pair({"conversations": turns[:1], "chosen": turns[1:], "rejected": [turn("model", "c")]}, "row")
    assert not pair.dropped and (pair.teacher.answer, pair.student.answer) == ("b", "c")
    with_system = parse_row({"conversations": turns, "system": "Be brief."}, "row")
    assert with_system.messages == [turn("system", "Be brief."), *PLAIN]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"conversations": turns}))
    data = PromptDataModule(str(path), tokenizer=tiny(template=FAMILIES["chatml"].template))
    data.setup("fit")
    assert data.conversations("train", 1)[0].messages == PLAIN[:1]


@pytest.mark.parametrize("role", ["narrator", "", "assistant2"])
def test_an_unknown_role_is_named(role: str) -> None:
    with pytest.raises(ValueError, match=f"^a:3: field 'messages', message 2: unknown role '{role}': rename it to one"):
        parse_row({"messages": [turn("user", "a"), turn(role, "b")]}, "a:3")


def tool(name: str, **properties: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}


def test_nulls_from_arrow_are_absent_fields_at_any_depth(tmp_path: Path) -> None:
    rows = [
        {"tools": [tool("weather", city={"type": "string"})], "messages": [turn("user", "a"), turn("assistant", "b")]},
        {"tools": [tool("clock", zone={"enum": ["a"]}), tool("sum")], "messages": [turn("user", "c", name="x")]},
    ]
    rows[1]["messages"] += [
        {"role": "assistant", "tool_calls": [{"function": {"name": "clock", "arguments": {"zone": "a"}}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "sum", "arguments": {"of": [{"x": 1}, {"y": 2}]}}}]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "folder"))
    template = "{{ tools | tojson }}{% for m in messages %}{{ m | tojson }}{% endfor %}"
    expected = [parse_row(row, "row") for row in rows]
    for name in ("rows.jsonl", "rows.parquet", "folder"):
        found = [parse_row(row, "row") for _, row in read_rows(str(tmp_path / name), "train")]
        for one, other in zip(found, expected, strict=True):
            assert json.dumps([one.messages, one.tools], sort_keys=True) == json.dumps(
                [other.messages, other.tools], sort_keys=True
            )
            assert "null" not in (TextTokenizer(tiny(template=template)).chat.full_text(one) or "null")


def call(arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


@pytest.mark.parametrize("text", ['{"city": "Paris", "n": [1, {"a": true}]}', "{}", ""])
def test_arguments_as_text_reach_the_template_as_an_object(text: str) -> None:
    template = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}"
    template += "{% endfor %}"
    expected = json.dumps(json.loads(text or "{}"))
    for arguments in (text, json.loads(text or "{}")):
        assert text_of(template, {"messages": [turn("user", "a"), call(arguments)]}) == expected


def test_a_template_that_needs_text_gets_the_arguments_as_text() -> None:
    template = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ '>' + c.function.arguments }}{% endfor %}"
    template += "{% endfor %}"
    for arguments in ('{"a": 1}', {"a": 1}):
        assert text_of(template, {"messages": [turn("user", "a"), call(arguments)]}) == '>{"a": 1}'


@pytest.mark.parametrize("arguments", ["{oops", "[1]", "3", "[" * 5000])
def test_arguments_that_are_no_object_are_refused(arguments: str) -> None:
    with pytest.raises(ValueError, match=r"^a:3: field 'messages', message 2: the arguments of the call of 'f' "):
        parse_row({"messages": [turn("user", "a"), call(arguments)]}, "a:3")


def test_no_content_is_an_empty_string() -> None:
    for absent in ({}, {"content": None}):
        row = {"messages": [turn("user", "a"), {"role": "assistant", "tool_calls": [{"name": "f"}], **absent}]}
        joined = "{% for m in messages %}{{ m['role'] + ':' + m['content'] }};{% endfor %}"
        assert text_of(joined, row) == "user:a;assistant:;"


PARTS = [{"type": "text", "text": "the "}, {"type": "text", "text": "sea"}]
STRINGS = {
    "prints": "{% for m in messages %}[{{ m.content }}]{% endfor %}",
    "joins": "{% for m in messages %}{{ '[' + m['content'] + ']' }}{% endfor %}",
    "guards": "{% for m in messages %}[{% if m.content is string %}{{ m.content }}{% endif %}]{% endfor %}",
}


@pytest.mark.parametrize("template", STRINGS.values(), ids=STRINGS.keys())
def test_text_parts_become_one_string(template: str) -> None:
    row = {"messages": [turn("system", PARTS), turn("user", PARTS), turn("assistant", PARTS)]}
    assert text_of(template, row) == "[the sea][the sea][the sea]"


def test_a_template_that_reads_parts_gets_them() -> None:
    both = (
        "{% for m in messages %}[{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
        "<{{ p.text }}>{% endfor %}{% endif %}]{% endfor %}"
    )
    row = {"messages": [turn("user", PARTS), turn("assistant", "red")]}
    assert text_of(both, row) == "[<the ><sea>][red]"
    parts_alone = "{% for m in messages %}[{% for p in m.content %}<{{ p.text }}>{% endfor %}]{% endfor %}"
    assert text_of(parts_alone, row) == "[<the ><sea>][<red>]"


@pytest.mark.parametrize("name", [name for name in FAMILIES if "phi" not in name])
def test_answers_of_parts_have_the_labels_of_strings(name: str) -> None:
    tokenizer = tokenizer_of(FAMILIES[name], template=FAMILIES[name].template)
    parts = {"messages": [turn("user", PARTS), turn("assistant", PARTS)]}
    string = {"messages": [turn("user", "the sea"), turn("assistant", "the sea")]}
    assert label_runs(tokenizer, parts) == label_runs(tokenizer, string) != []


BAD_PARTS = [
    ({"type": "image", "url": "x"}, "only parts of type 'text' can be read, got type 'image'"),
    ({"type": "input_audio"}, ".*got type 'input_audio'"),
    ({"type": "text", "text": 3}, "'text' must be a string, got int"),
    ({"type": "text", "text": ["a"]}, "'text' must be a string, got list"),
]


@pytest.mark.parametrize("case", BAD_PARTS, ids=str)
def test_other_parts_are_refused(case: tuple[dict[str, Any], str]) -> None:
    part, message = case
    with pytest.raises(ValueError, match=f"^a:3: field 'messages', message 1, part 2: {message}"):
        parse_row({"messages": [turn("user", [PARTS[0], part]), turn("assistant", "b")]}, "a:3")
