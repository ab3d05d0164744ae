"""`kd-lightning generate --prompt`: the answers that a file would hold, printed; several models side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fake_server import FakeServer
from kd_lightning.cli.answers import answers_to
from kd_lightning.cli.program import main

PROMPTS = ["Define the noun 'dog'.", "Define the noun [bold]cat[/bold]."]
SHORT = ["--max_new_tokens", "8"]


def in_file(folder: Path, model: str, *more: str) -> list[str]:
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    output = folder / f"{model[6:]}.jsonl"
    words = ["--model", model, "--data", str(folder / "rows.jsonl"), "--output", str(output), "--progress", "false"]
    assert main(["generate", *words, *SHORT, *more]) == 0
    return [json.loads(line)["response"] for line in output.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("more", [(), ("--temperature", "0.9", "--seed", "3"), ("--teacher_prompt", "{prompt} Now.")])
def test_the_answers_are_those_of_a_file(
    more: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ["asset:teacher", "asset:student"]
    expected = {model: in_file(tmp_path, model, *more) for model in models}
    capsys.readouterr()
    words = [word for model in models for word in ("--model", model)]
    words += [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    assert main(["generate", *words, *SHORT, *more]) == 0
    printed = capsys.readouterr().out
    assert PROMPTS[1].split()[-1] in printed  # not taken for markup
    for model in models:
        assert model in printed
        assert main(["generate", "--model", model, "--prompt", PROMPTS[0], *SHORT, *more]) == 0
        assert capsys.readouterr().out == f"{expected[model][0]}\n" or more  # a sample depends on the batch
    if not more:
        assert answers_to(PROMPTS, models, max_new_tokens=8) == expected


def test_a_server_answers(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer() as server:
        assert main(["generate", "--server", server.url, "--prompt", "a\nb", *SHORT]) == 0
    assert capsys.readouterr().out == "on: a\nb\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--prompt", "a", "--output", "x.jsonl"], "--prompt prints answers: remove --output"),
        (["--prompt", "a"], "model must be a folder, hub name or asset: name"),
        (["--model", "a", "--output", "y.jsonl"], "--data is missing: pass --data FILE and --output OUT.jsonl"),
        (["--model", "a", "--data", "x"], "--output is missing"),
        (["--prompt", "a", "--model", "asset:student", "--temperature", "-1"], "temperature"),
    ],
)
def test_what_does_not_fit_is_refused(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *words]) == 1
    assert expected in capsys.readouterr().err
