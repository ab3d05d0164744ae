"""Consoles of any encoding, and characters that act on them."""

from __future__ import annotations

import ast
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

import runs
from kd_lightning.console import printable, use_any_console_encoding
from locations import ROOT
from refusals import refused

LETTERS = "naïve – 3 ≥ 2 ± 1 … √x “q” α 模型 \ud800 ok"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "koi8-r", "utf-8"])
def test_output_degrades(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(raw, encoding=encoding))
    use_any_console_encoding()
    print(LETTERS)
    sys.stdout.flush()
    text = raw.getvalue().decode(encoding)
    assert text.endswith(" ok\n") and "2" in text
    if encoding == "ascii":
        assert text == 'naive - 3 >= 2 +- 1 ... sqrtx "q" alpha \\u6a21\\u578b \\ud800 ok\n'
    if encoding == "utf-8":
        assert text == LETTERS.replace("\ud800", "\\ud800") + "\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\rb\x08\x7f\x9b31m", r"a\rb\x08\x7f\x9b31m"),
        ("abc\u202efed\u2066\u200e", r"abc\u202efed\u2066\u200e"),
        ("line\u2028line \U000e0041", r"line\u2028line \U000e0041"),
        ("half \udc80", r"half \udc80"),
        ("tab\tline\nné 模 👩‍👧 ±", "tab\tline\nné 模 👩‍👧 ±"),
    ],
)
def test_what_acts_on_a_terminal_is_shown_as_an_escape(text: str, shown: str) -> None:
    assert printable(text) == shown


def text_files_without_encoding(tree: ast.AST) -> list[int]:
    """Lines of the calls that read or write text in the encoding of the locale."""
    lines = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        given: dict[str | None, ast.expr] = {keyword.arg: keyword.value for keyword in call.keywords}
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        mode = [*call.args[isinstance(call.func, ast.Name) :], ast.Constant("r")][0] if name == "open" else None
        binary = mode is not None and any(
            isinstance(node, ast.Constant) and "b" in str(node.value) for node in ast.walk(given.get("mode", mode))
        )
        opens = name == "open" and not binary and "timeout" not in given  # `timeout`: of a URL
        starts = name in ("run", "Popen", "check_output") and "text" in given
        if (name in ("read_text", "write_text") or opens or starts) and "encoding" not in given:
            lines.append(call.lineno)
    return lines


@pytest.mark.parametrize("folder", ["kd_lightning", "scripts", "benchmarks"])
def test_files_are_utf8_in_any_locale(folder: str) -> None:
    found = {
        str(path): lines
        for path in (ROOT / folder).rglob("*.py")
        if (lines := text_files_without_encoding(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert found == {}


COMMANDS = {
    "all": ["--help"],
    "fit": ["fit", "--help"],
    "compare": ["compare", "--help"],
    "compare runs": ["compare", "run", "--output", "page.md"],
    "config": ["fit", "--config", "umläut.yaml", "--print_config"],
    "error": ["generate", "--data", "größe.jsonl", "--output", "x.txt"],
}
CODE = """
import io, sys
from kd_lightning.cli.program import main
for args in {commands!a}:
    try:
        status = main(args)
    except SystemExit as end:
        status = end.code
    print("status", status, flush=True)
"""


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "cp1252"},
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=["cp1252", "ascii", "C"],
)
def test_commands_on_consoles_that_are_not_utf8(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "umläut.yaml").write_text("data: {train: [größe – 模.jsonl]}\n", encoding="utf-8")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("model: {teacher: größe – 模 ≥}\ndata: {train: a}\n", encoding="utf-8")
    row = '{"nll": 1.5, "forward_kl": 0.5, "exact_match": 0.25}'
    results = f'{{"teacher": {row}, "student_before": {row}, "student_after": {row}}}'
    (run / "results.json").write_text(results, encoding="utf-8")
    names = list(COMMANDS)
    ascii_only = environment.get("LC_ALL") == "C"  # such a system cannot name the file
    if ascii_only:
        (tmp_path / "plain.yaml").write_bytes((tmp_path / "umläut.yaml").read_bytes())
    commands = [[word.replace("umläut", "plain") if ascii_only else word for word in COMMANDS[name]] for name in names]
    code = CODE.format(commands=commands)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        check=True,
    )
    encoding = environment.get("PYTHONIOENCODING", "ascii")
    out, err = done.stdout.decode(encoding), done.stderr.decode(encoding)
    assert [line for line in out.splitlines() if line.startswith("status")] == ["status 0"] * 5 + ["status 1"]
    assert "Traceback" not in err and "codec" not in err
    assert err.splitlines()[-1].startswith("kd-lightning: error: ")
    assert "25.0 %" in out and "\\u6a21.jsonl" in out
    assert "### " not in (page := (tmp_path / "page.md").read_text(encoding="utf-8")) and "±" in page


@pytest.mark.parametrize("word", ["\udcff.jsonl", "a\ud800b"])
def test_arguments_that_are_not_utf8(word: str, capfd: pytest.CaptureFixture[str]) -> None:
    refused(["compare", word], ["argument", "is not UTF-8"], capfd)


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["ascii", "C"],
)
def test_a_run_on_a_console_that_is_not_utf8(environment: dict[str, str], tmp_path: Path) -> None:
    row = {"instruction": "naïve größe – 模型 \x1b[31m", "input": "", "output": "ü ≥ 模 [bold]"}
    for name in ("train", "test"):
        text = json.dumps({**row, "input": name}, ensure_ascii=False) + "\n"
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    data = ["--data.train", "train.jsonl", "--data.val", "test.jsonl", "--data.test", "test.jsonl"]
    words = [*runs.little(Path("run"), steps=1, test=True), *data, "--results.task", "größe"]
    for command in ("preflight", "fit"):
        done = subprocess.run(
            [sys.executable, "-m", "kd_lightning", command, *words[1:]],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            check=False,
        )
        out, err = done.stdout.decode("ascii"), done.stderr.decode("ascii")
        assert "Traceback" not in err and "codec" not in err and "\x1b" not in out + err
        assert done.returncode == 0 or command == "preflight"
    assert "größe – 模型" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
