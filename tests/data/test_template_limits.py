"""Chat templates without an end, or with results that fill the memory, are refused in one line."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from chat_templates import FAMILIES
from kd_lightning.data import InstructionDataModule
from kd_lightning.data.conversation import parse_row
from kd_lightning.data.text import template_limits
from kd_lightning.data.text.rendering import read_template
from kd_lightning.data.text.text_tokenizer import TextTokenizer
from tiny_tokenizers import tiny

ROW = {"messages": [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "red"}]}
ENDLESS = {
    "range": "{% for i in range(10**12) %}{% endfor %}",
    "nested loops": "".join(f"{{% for i{n} in range(90000) %}}" for n in range(4)) + "{% endfor %}" * 4,
    "loops that write": "{% for i in range(99999) %}{% for j in range(99999) %}"
    + "x" * 1000
    + "{% endfor %}{% endfor %}",
    "recursive macro": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "two recursive macros": "{% macro a(n) %}{{ b(n) }}{{ b(n) }}{% endmacro %}{% macro b(n) %}{% if n < 90 %}"
    "{{ a(n + 1) }}{{ a(n + 1) }}{% endif %}{% endmacro %}{{ a(0) }}",
    "recursive loop": "{% for i in [1, 2] recursive %}{{ loop([1, 2]) if loop.depth < 100 }}{% endfor %}",
    "text times": "{{ 'a' * 10**12 }}",
    "list times": "{% set x = [0] * 10**10 %}",
    "times list": "{{ (10**10 * [0]) | length }}",
    "text times, no output": "{% if 'a' * 9999999999 == 'b' %}{% endif %}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "powers of powers": "{% set x = 9 ** 9 ** 9 ** 9 ** 9 ** 9 %}",
    "squares": "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "doubled text": "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubled by ~": "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubled by a block": "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set y %}{{ n.x }}"
    "{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
    "doubled list": "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubled reference": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x }}",
    "doubled reference as JSON": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}"
    "{% endfor %}{{ n.x | tojson }}",
    "replace": "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "replace filter": "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "join": "{{ ('b' * 1000000).join('a' * 1000000) }}",
    "center": "{{ 'a' | center(10000000000) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "zfill": "{{ 'a'.zfill(9999999999) }}",
    "expandtabs": "{{ ('\\t' * 99999).expandtabs(999999) }}",
    "indent": "{{ ('\\n' * 99999) | indent(999999) }}",
    "format": "{{ '%10000000000d' % 1 }}",
    "format with a star": "{{ '%*d' % (10**10, 1) }}",
    "format filter": "{{ '%9999999999d' | format(1) }}",
    "format method": "{{ '{:>9999999999}'.format('a') }}",
    "batch": "{{ [1] | batch(10**10, 0) | list }}",
    "slice": "{{ [1] | slice(10**10) | list }}",
    "tojson": "{{ messages | tojson(indent=10**10) }}",
    "copies": "{% for i in range(99999) %}{% for j in range(99) %}{% set x = messages[0:] %}{% endfor %}{% endfor %}",
    "a huge source": "{{ 'a' }}" * 150_000,
    "only for some rows": "{% if messages[0].content == 'one two' %}{{ 'a' * 10**11 }}{% endif %}",
}
BROKEN = {
    "division": "{{ 1 / 0 }}",
    "many loops": "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "syntax": "{% for %}",
    "type": "{{ 1 + 'a' }}",
    "no loader": "{% include 'a' %}",
}


def refused(template: str, tmp_path: Path) -> tuple[str, float, int]:
    """The message, the seconds, and by how many kilobytes the memory of this process grew."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW))
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    data = InstructionDataModule(str(path), tokenizer=tiny(), chat_template="{# x #}" + template)
    with pytest.raises(ValueError, match=r"rows.jsonl:1: the chat template ") as error:
        data.setup("fit")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return str(error.value), time.thread_time() - begin, grown


@pytest.mark.parametrize("template", [*ENDLESS.values(), *BROKEN.values()], ids=[*ENDLESS, *BROKEN])
def test_a_template_that_does_not_end_is_refused(template: str, tmp_path: Path) -> None:
    message, seconds, grown = refused(template, tmp_path)
    assert "\n" not in message and len(message) < 500
    assert seconds < 5 and grown < 1_000_000


def test_the_processor_time_is_limited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(template_limits, "SECONDS", 0.05)
    monkeypatch.setattr(template_limits, "STEPS", 1 << 60)
    loops = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
    assert "it does not end within 0 s" in refused(loops, tmp_path)[0]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("ask", [False, True])
def test_other_templates_render_as_in_transformers(name: str, ask: bool) -> None:
    family = FAMILIES[name]
    tokenizer = tiny(family.specials, family.bos, family.eos, kind=family.kind, template=family.template)
    messages: list[Any] = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "<think>a</think>b"}]
    messages += [{"role": "user", "content": "two"}]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    chat = TextTokenizer(tokenizer).chat
    assert chat._render(parse_row({"messages": messages}, "row"), messages, ask) == expected


RICH = (
    "{% set ns = namespace(n=0, text='') %}"
    "{% macro show(x) %}<{{ x }}>{% endmacro %}{% macro twice() %}{{ caller(1) }}{{ caller(2) }}{% endmacro %}"
    "{% for m in messages[::-1] %}{% set ns.n = ns.n + 1 %}{{ loop.index0 }}/{{ loop.length }}{{ loop.last }}"
    "{% if loop.first %}{{ ns.n * '=' }}{% endif %}{% if m.role == 'tool' %}{% continue %}{% endif %}"
    "{{ show(m.content | trim | upper) }}{{ '%s-%03d' % (m.role, ns.n) }}{{ '{:>6}|'.format(m.role) }}"
    "{% for k, v in m.items() %}{{ k ~ ':' ~ v ~ 1 }}{% endfor %}{{ m | tojson(indent=2) }}"
    "{{ m.content.split('w') | map('upper') | join(', ') }}{{ m.content | replace('o', '00') | indent(2) }}"
    "{{ [1, 2, 3] | batch(2) | list }}{{ (messages | selectattr('role', 'equalto', 'user') | list) | length }}"
    "{{ 2 ** 10 }}{{ m.content[1:3] }}{{ nothing }}{{ none }}{{ {'a': [1]} }}{{ range(3) | list }}{{ 7 % 4 }}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    "{% for x in [[1, [2]]] recursive %}{{ x if x is number else loop(x) }}{% endfor %}{{ 'x' | center(9) }}"
    "{% filter upper %}abc{{ ns.n }}{% endfilter %}{% call(y) twice() %}{{ y + 1 }}{% endcall %}{{ dict(a=1).a }}"
)


def test_everything_that_templates_use_renders_as_in_transformers() -> None:
    messages = [{"role": "user", "content": "one two"}, {"role": "tool", "content": "b"}, *ROW["messages"]]
    (expected,), _ = render_jinja_template(conversations=[messages], chat_template=RICH)
    found = TextTokenizer(tiny(template=RICH)).chat.full_text(parse_row({"messages": messages}, "row"))
    assert found == expected


def test_long_conversations_may_take_more_steps() -> None:
    template = "{% for m in messages %}{% for c in m.content %}{{ c | upper }}{% endfor %}{% endfor %}"
    text = "a b " * 60_000
    conversation = parse_row({"messages": [{"role": "user", "content": text}]}, "row")
    assert TextTokenizer(tiny(template=template)).chat.full_text(conversation) == text.upper()


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1", "cp1252"])
def test_a_template_file_in_another_encoding(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_bytes("{{ 'größe' }}".encode(encoding))
    with pytest.raises(ValueError, match=r"chat_template '.*chat.jinja' is not UTF-8 \(byte 0x\w\w at position \d+\)"):
        InstructionDataModule("a.jsonl", chat_template=str(path))


def test_a_device_and_a_large_file_are_no_templates(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a Jinja template or a file that holds one, got '/dev/zero'"):
        read_template("/dev/zero")
    path = tmp_path / "chat.jinja"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"has 1099511627776 bytes: it must be a file of at most 1000000 characters"):
        read_template(str(path))
