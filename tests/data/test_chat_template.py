"""The labels are the assistant's answers with their end of turn, and nothing else, in every template."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from chat_templates import FAMILIES, Family
from kd_lightning.data.conversation import Conversation, parse_row
from kd_lightning.data.text.encode import encode
from kd_lightning.data.tokenization import TextTokenizer, with_template
from tiny_tokenizers import tiny

USER, OTHER = "What is the answer?", "Tell me a story about the sea."
WORDS = ("The answer is forty two.", "  a little town,\nwhere nobody said a word — ever 🙂", "sunny")
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {}}}]}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


def turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def tokenizer_of(family: Family, kind: str | None = None) -> Any:
    return tiny(family.specials, family.bos, family.eos, kind=kind or family.kind, template=family.template)


def label_runs(tokenizer: Any, row: dict[str, Any], **kwargs: Any) -> list[str]:
    """The runs of labeled tokens, decoded and stripped."""
    found = TextTokenizer(tokenizer, max_length=10_000, **kwargs).tokenize(parse_row(row, "row"))
    runs = itertools.groupby(zip(found["input_ids"], found["label_mask"], strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in run]).strip() for counts, run in runs if counts]


def answers(family: Family, *words: str) -> list[str]:
    return [(text.strip() + family.end).strip() for text in words]


def squeezed(texts: list[str]) -> list[str]:
    # a blank before a special token is lost when some tokenizers decode; it is no word
    return ["".join(text.split()) for text in texts]


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES.keys())
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_one_turn(family: Family, kind: str) -> None:
    row = {"instruction": USER, "input": "now", "output": WORDS[0]}
    found = label_runs(tokenizer_of(family, kind), row)
    if "phi" in next(name for name, other in FAMILIES.items() if other is family):
        assert found == [WORDS[0] + "<|end|>\n<|endoftext|>"]  # this template ends its last turn twice
    else:
        assert squeezed(found) == squeezed(answers(family, WORDS[0]))


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_every_answer_of_a_conversation_and_no_other_turn(family: Family, kind: str) -> None:
    row = {
        "messages": [
            *([turn("system", "Be brief.")] if family.system else []),
            turn("user", USER),
            turn("assistant", WORDS[0]),
            turn("user", OTHER),
            turn("assistant", WORDS[1]),
            turn("user", USER),
        ]
    }
    assert squeezed(label_runs(tokenizer_of(family, kind), row)) == squeezed(answers(family, *WORDS[:2]))


@pytest.mark.parametrize("name", [name for name in FAMILIES if "phi" not in name])
def test_a_conversation_that_ends_with_an_answer(name: str) -> None:
    family = FAMILIES[name]
    messages = [turn("user", USER), turn("assistant", WORDS[0]), turn("user", OTHER), turn("assistant", WORDS[2])]
    found = label_runs(tokenizer_of(family), {"messages": messages})
    assert squeezed(found) == squeezed(answers(family, WORDS[0], WORDS[2]))


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.tools])
def test_a_tool_call_has_labels_and_a_tool_result_has_none(name: str) -> None:
    family = FAMILIES[name]
    messages = [turn("user", USER), CALL, turn("tool", "rain in Paris"), turn("assistant", WORDS[2]), turn("user", "a")]
    tokenizer = tokenizer_of(family)
    found = label_runs(tokenizer, {"messages": messages, "tools": TOOLS})
    assert squeezed(found) == squeezed(answers(family, family.call, WORDS[2]))


def test_tools_and_variables_reach_the_template() -> None:
    tokenizer = tiny(template="{{ tools[0].name }} {{ mood }} {{ messages[0].content }}{{ messages[1].content }}</s>")
    row = {"prompt": [turn("user", "hear:")], "completion": [turn("assistant", "yes")], "tools": '[{"name": "hammer"}]'}
    conversation = parse_row({**row, "chat_template_kwargs": {"mood": "calm"}}, "row")
    text = TextTokenizer(tokenizer, template_kwargs={"mood": "loud"}).chat.locate(conversation).text
    assert text.startswith("hammer calm hear:yes")
    text = TextTokenizer(tokenizer, template_kwargs={"mood": "loud"}).chat.locate(parse_row(row, "row")).text
    assert text.startswith("hammer loud hear:yes")


def test_reasoning_has_labels_if_the_template_keeps_it() -> None:
    tokenizer = tokenizer_of(FAMILIES["qwen3, drops thoughts"])
    first, last = "<think>\nhm\n</think>\n\nforty", "<think>\nthe sea\n</think>\n\na town"
    row = {"messages": [turn("user", USER), turn("assistant", first), turn("user", OTHER), turn("assistant", last)]}
    assert label_runs(tokenizer, row) == ["forty<|im_end|>", last + "<|im_end|>"]


def test_reasoning_has_labels_after_a_prompt_that_opens_it() -> None:
    tokenizer = tokenizer_of(FAMILIES["deepseek, asks for thoughts"])
    row = {"messages": [turn("user", USER), turn("assistant", "hm</think>forty")]}
    assert label_runs(tokenizer, row) == ["forty<|eos|>"]


def test_only_the_completion_has_labels() -> None:
    family = FAMILIES["chatml"]
    row = {
        "prompt": [turn("user", USER), turn("assistant", "hm"), turn("user", OTHER)],
        "completion": [turn("assistant", "a town"), turn("user", "more"), turn("assistant", "the sea")],
    }
    found = ["a town<|im_end|>", "the sea<|im_end|>"]
    assert label_runs(tokenizer_of(family), row) == found
    assert label_runs(tokenizer_of(FAMILIES["marked"]), row) == found


def test_an_answer_that_cannot_be_located_has_no_labels_and_is_reported() -> None:
    twice = (
        "{% for m in messages %}[{{ m.content }}|{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    conversation = parse_row({"instruction": USER, "output": "yes"}, "row")
    found = TextTokenizer(tiny(template=twice)).tokenize(conversation)
    assert found["unlocated"] == 1 and not any(found["label_mask"]) and found["first_label"] == -1


def test_an_answer_that_the_template_leaves_out_is_not_located() -> None:
    silent = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    found = TextTokenizer(tiny(template=silent)).tokenize(parse_row({"instruction": "a", "output": "b"}, "row"))
    assert found["unlocated"] == 1 and not any(found["label_mask"])


def test_an_empty_turn_among_others_has_no_labels() -> None:
    row = {"messages": [turn("user", USER), turn("assistant", " "), turn("user", OTHER), turn("assistant", "yes")]}
    assert label_runs(tokenizer_of(FAMILIES["chatml"]), row) == ["yes<|im_end|>"]


def test_a_template_that_refuses_a_row_is_quoted() -> None:
    row = {"messages": [turn("system", "Be brief."), turn("user", "a"), turn("assistant", "b")]}
    with pytest.raises(ValueError, match="refuses this row: no system role"):
        TextTokenizer(tokenizer_of(FAMILIES["gemma"])).tokenize(parse_row(row, "row"))


def test_the_first_token_is_never_doubled() -> None:
    family = FAMILIES["llama3"]
    tokenizer = tiny(family.specials, family.bos, family.eos, template=family.template, adds_bos=True)
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    for row in ({"instruction": "a", "output": "b"}, {"prompt": "a", "completion": "b"}):
        conversation = parse_row(row, "row")
        ids = TextTokenizer(tokenizer).tokenize(conversation)["input_ids"]
        _, prompt = TextTokenizer(tokenizer).prompt(conversation)
        assert ids.count(tokenizer.bos_token_id) == prompt.count(tokenizer.bos_token_id) == 1
        assert ids[0] == prompt[0] == tokenizer.bos_token_id


def test_a_plain_prompt_and_completion() -> None:
    tokenizer = tiny()
    row = {"prompt": "What is the answer? ", "completion": "forty two"}
    assert label_runs(tokenizer, row) == ["forty two</s>"]
    assert label_runs(tokenizer, {**row, "completion": "forty two</s>"}) == ["forty two</s>"]
    found = TextTokenizer(tokenizer).tokenize(parse_row(row, "row"))
    assert found["input_ids"][-1] == tokenizer.eos_token_id and found["label_mask"][-1]


def test_the_end_is_added_if_the_template_writes_none() -> None:
    bare = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    row = {"messages": [turn("user", "a"), turn("assistant", "b"), turn("user", "a"), turn("assistant", "forty")]}
    assert label_runs(tiny(template=bare), row) == ["b", "forty</s>"]


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_tokenizer_without_a_template_gets_a_plain_one_with_a_notice(adds_bos: bool) -> None:
    tokenizer, notices = tiny(adds_bos=adds_bos), []
    with_template(tokenizer, None, notices.append)
    assert len(notices) == 1 and "chat_template" in notices[0]
    row = {"messages": [turn("user", USER), turn("assistant", "yes"), turn("user", OTHER), turn("assistant", "no")]}
    assert label_runs(tokenizer, row) == ["yes</s>", "no</s>"]
    first = TextTokenizer(tokenizer).tokenize(parse_row(row, "row"))["input_ids"][0]
    assert (first == tokenizer.bos_token_id) == adds_bos
    with_template(tokenizer, None, notices.append)
    assert len(notices) == 1


def test_the_template_of_the_user_comes_first() -> None:
    mine = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    assert label_runs(tokenizer_of(FAMILIES["chatml"]), {"instruction": "a", "output": "b"}, chat_template=mine) == [
        "b>"
    ]


def test_a_token_of_two_turns_is_no_label() -> None:
    tokenizer = tiny()
    text = "the answer"
    (inside,) = [token for token, counts in encode(tokenizer, text, [(4, 10)]) if counts]
    assert tokenizer.decode(inside) == " answer"
    assert not any(counts for _, counts in encode(tokenizer, text, [(6, 10)]))


def test_a_tokenizer_without_offsets_splits_the_text_at_the_answers() -> None:
    tokenizer = tiny()

    class Slow:
        is_fast = False

        def __call__(self, text: str, **kwargs: Any) -> Any:
            return tokenizer(text, **kwargs)

    pairs = list(encode(Slow(), "the answer is forty", [(10, 19)]))
    assert tokenizer.decode([token for token, _ in pairs]) == "the answer is forty"
    assert tokenizer.decode([token for token, counts in pairs if counts]) == " is forty"


def test_a_conversation_survives_the_cache() -> None:
    conversation = parse_row({"messages": [turn("user", "ä"), CALL, turn("tool", "b")], "tools": TOOLS}, "row")
    assert Conversation.load(conversation.dump()) == conversation
