"""Prompts of `generate`: the date of its first start, variables of the template, and the notice about prompts."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from kd_lightning.assets import resolve
from kd_lightning.cli.generate import main
from kd_lightning.data.text import rendering

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}<empty thought>{% endif %}{{ m.content }}<eos>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% if thinking is defined and not thinking %}<empty thought>"
    "{% endif %}{% endif %}"
)


def model(folder: Path, template: str) -> str:
    copy = shutil.copytree(resolve("asset:student"), folder / "model")
    (copy / "chat_template.jinja").write_text(template)
    return str(copy)


def run(folder: Path, name: str, *more: str) -> bytes:
    rows = [{"instruction": f"Define the noun {n}."} for n in range(6)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = folder / "out.jsonl"
    given = ["--model", name, "--data", str(folder / "data.jsonl"), "--output", str(output), "--max_new_tokens", "4"]
    assert main([*given, "--batch_size", "2", "--progress", "false", *more]) == 0
    return output.read_bytes()


def test_an_output_is_resumed_with_its_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime):
        today_is = 9

        @classmethod
        def now(cls, tz: Any = None) -> Clock:
            return cls(2026, 3, cls.today_is)

    monkeypatch.setattr(rendering, "datetime", Clock)
    name = model(tmp_path, "{{ strftime_now('%d %B %Y') }} " + TEMPLATE)
    whole = run(tmp_path, name)
    assert json.loads(whole.splitlines()[0])["sampling"]["date"] == "2026-03-09"
    (tmp_path / "out.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    Clock.today_is = 10
    assert run(tmp_path, name) == whole
    (tmp_path / "out.jsonl").unlink()
    assert json.loads(run(tmp_path, name).splitlines()[0])["sampling"]["date"] == "2026-03-10"


def test_the_notice_and_the_variables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = model(tmp_path, TEMPLATE)
    first = run(tmp_path, name)
    assert "date" not in json.loads(first.splitlines()[0])["sampling"]
    (notice,) = [line for line in capsys.readouterr().err.splitlines() if "stand behind" in line]
    assert notice.startswith("6 of 6 answers stand behind '<empty thought>' in training")
    assert "chat_template_kwargs.thinking=false" in notice
    (tmp_path / "out.jsonl").unlink()
    run(tmp_path, name, "--chat_template_kwargs", '{"thinking": false}')
    assert "stand behind" not in capsys.readouterr().err
