"""What `preflight` says about rows and prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import runs
from kd_lightning.cli.preflight import main

BUNDLED = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
ASKS = "{% if add_generation_prompt %}<assistant>{% endif %}"
EMPTY_THOUGHT = BUNDLED.replace("{{ m.content }}", "{% if m.role == 'assistant' %}<none>{% endif %}{{ m.content }}")


def turn(role: str, content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def call(content: Any, n: int) -> dict[str, Any]:
    return turn("assistant", content, tool_calls=[{"function": {"name": "weather", "arguments": {"city": n}}}])


Row = Callable[[int], dict[str, Any]]
TOOLS = [{"type": "function", "function": {"name": "weather"}}]
SAYS: dict[str, tuple[str | None, Row, str]] = {
    "a call without words": (
        None,
        lambda n: {
            "messages": [turn("user", f"rain {n}?"), call(None, n), turn("tool", "no"), turn("assistant", "dry")]
        },
        "'tool_calls' (40)",
    ),
    "a call beside words": (
        None,
        lambda n: {"messages": [turn("user", f"rain {n}?"), call("I ask.", n)]},
        "warning: rows: train: 40 answers with words or tool calls that the chat template leaves out",
    ),
    "tools": (
        None,
        lambda n: {"messages": [turn("user", f"rain {n}?"), turn("assistant", "dry")], "tools": TOOLS},
        "warning: rows: train: fields that the chat template does not read: 'tools' (40)",
    ),
    "a tool that poses as a user": (
        BUNDLED.replace("<{{ m.role }}>", "{{ '<assistant>' if m.role == 'assistant' else '<user>' }}") + ASKS,
        lambda n: {"messages": [turn("user", f"rain {n}?"), turn("tool", "no"), turn("assistant", "dry")]},
        "warning: rows: train: fields that the chat template does not read: \"role 'tool'\" (40)",
    ),
    "words that vanish": (
        BUNDLED.replace("{{ m.content }}", "{{ m.content.split('|')[-1] }}") + ASKS,
        lambda n: {"messages": [turn("user", f"rain {n}?"), turn("assistant", "I think.|dry")]},
        "warning: rows: train: 40 answers with words or tool calls that the chat template leaves out",
    ),
    "another prompt": (
        EMPTY_THOUGHT + ASKS.replace("{% endif %}", "{% if quick is defined and quick %}<none>{% endif %}{% endif %}"),
        lambda n: {"messages": [turn("user", f"rain {n}?"), turn("assistant", "dry")]},
        "warning: prompts: 20 of 20 answers stand behind '<none>' in training, where the generation prompt has ''",
    ),
}


@pytest.mark.parametrize("name", SAYS)
def test_what_is_said_about_rows(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template, row, says = SAYS[name]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row(n)) + "\n" for n in range(40)))
    given = ["--config", str(runs.CONFIGS / "quickstart.yaml"), "--trainer.default_root_dir", str(tmp_path / "root")]
    given += ["--data.train", str(path), "--data.val", "null", "--data.test", "null", *runs.CPU]
    given += ["--model.teacher", "null", "--model.ce_weight", "1"]
    if template is not None:
        (tmp_path / "chat.jinja").write_text(template)
        given += ["--data.chat_template", str(tmp_path / "chat.jinja")]
    main(given)
    found = capsys.readouterr().out.splitlines()
    assert any(says in line for line in found), found
    if name == "another prompt":
        assert any("set data.chat_template_kwargs.quick=true" in line for line in found)
