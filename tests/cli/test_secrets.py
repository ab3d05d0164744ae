"""Secrets are in nothing that a run writes or prints; names and values that act on a page or terminal are escaped."""

from __future__ import annotations

import json
import re
from pathlib import Path

import markdown
import pytest
import yaml

import runs
from kd_lightning.cli.program import main
from refusals import refused

KEY, PASSWORD, QUERY = "qX7abc-not-a-key", "pw8-hunter2", "q9-in-the-query"


def loggers(root: Path) -> list[dict[str, object]]:
    options = {"headers": {"Authorization": f"Bearer {KEY}"}, "pad_token": "<pad>", "max_tokens": 7}
    address = f"https://me:{PASSWORD}@host.example/x?access_token={QUERY}"
    keys = {"save_dir": str(root), "api_key": KEY, "address": address, "options": options}
    return [
        {"class_path": "TensorBoardLogger", "init_args": {"save_dir": str(root), "name": "", "version": "tensorboard"}},
        {"class_path": "key_logger.KeyLogger", "init_args": keys},
    ]


def test_a_run_writes_no_secret(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "a|b [red]![x](http:__h)\x1b[31m 5$ 6$"
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"trainer": {"logger": loggers(root)}}), encoding="utf-8")
    rows = [
        {"instruction": f"![i](https://h/{n}.png) <b>\x1b[2J `a` \\| | b", "input": "", "output": "a \\| b\x07"}
        for n in range(16)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["--config", str(config), "--data.train", str(data), "--data.val", str(data), "--data.test", str(data)]
    words += ["--results.task", "[bold]none\x1b[1m", "--generation.every_n_validations", "1", "--generation.seeds", "1"]
    words += ["--trainer.val_check_interval", "2", "--generation.max_new_tokens", "4", "--results.max_new_tokens", "4"]
    assert main([*runs.little(root, steps=2, test=True), *words]) == 0
    printed = "".join(capfd.readouterr())
    written = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert {"config.yaml", "report.md", "results.json", "rows.json"} <= {path.name for path in written}
    for secret in (KEY, PASSWORD, QUERY):
        assert secret not in printed
        assert [path for path, content in written.items() if secret.encode() in content] == []
    assert "\x1b" not in printed and "\x07" not in printed
    saved = yaml.safe_load((root / "config.yaml").read_text(encoding="utf-8"))
    options = saved["trainer"]["logger"][1]["init_args"]["options"]
    assert options == {"headers": {"Authorization": "***"}, "pad_token": "<pad>", "max_tokens": 7}

    page = (root / "report.md").read_text(encoding="utf-8")
    assert not any(mark in page for mark in ("\x1b", "\x07", "https://h/", "<b>"))
    html = markdown.markdown(page, extensions=["markdown.extensions.tables", "markdown.extensions.fenced_code"])
    assert re.findall(r"<a\b|<img (?!alt=\"[\w ]*\" src=\"data:image/png;base64,)[^>]*", html) == []
    lines = [line for line in page.splitlines() if line.startswith("|") and "png" in line]
    assert lines and {line.count("|") for line in lines} == {6}
    assert page.startswith("# a&#124;b &#91;red&#93;!&#91;x&#93;")
    events = b"".join(content for path, content in written.items() if path.name.startswith("events."))
    assert b"samples" in events and b"https://h/" not in events and b"\x1b[2J" not in events

    again = ["fit", "--config", str(root / "config.yaml"), "--ckpt_path", "last", "--trainer.max_steps", "3"]
    line = refused(again, ["trainer.logger.1.api_key", "masked", "pass its value again", "HF_TOKEN"], capfd)
    assert "init_args" not in line
    main(["compare", str(root), "--output", str(tmp_path / "page.md")])
    printed, compared = "".join(capfd.readouterr()), (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "[red]" in printed and "\x1b" not in printed + compared and "![x]" not in compared


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--model.student_kwargs", f"{{token: {KEY}}}"], "student_kwargs.token"),
        (["--model.student_kwargs", f"{{extra: [{{hf_token: {KEY}}}]}}"], "student_kwargs.extra.0.hf_token"),
        (["--model.teacher_kwargs", f"{{use_auth_token: {KEY}}}"], "teacher_kwargs.use_auth_token"),
        (
            [
                "--model.teacher",
                "HFTeacher",
                "--model.teacher.path",
                "asset:teacher",
                "--model.teacher.kwargs",
                f"{{api_key: {KEY}}}",
            ],
            "teacher_kwargs.api_key",
        ),
        (["--model.teacher_kwargs", "{password: 1234567}"], "teacher_kwargs.password"),
    ],
)
def test_secrets_of_models_are_refused(
    words: list[str], named: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for command in ("fit", "preflight"):
        fit = [command, *runs.little(tmp_path / "run")[1:], *words]
        line = refused(fit, [named, "HF_TOKEN"], capfd)
        assert KEY not in line and "1234567" not in line
    assert not list(tmp_path.rglob("config.yaml"))


@pytest.mark.parametrize(
    "words",
    [
        ["--model.no_such", f"token={KEY}"],
        ["--api_key", KEY],
        ["--trainer.logger", f"{{class_path: KeyLog, init_args: {{api_key: {KEY}}}}}"],
        ["--model.student", f"https://me:{KEY}@host/x"],
        ["--data.batch_size", f"{{password: {KEY}}}"],
    ],
)
def test_errors_show_no_secret(words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert KEY not in refused([*runs.little(tmp_path / "run"), *words], [], capfd)


def test_printed_configurations_show_no_secret(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"trainer": {"logger": loggers(tmp_path)}}), encoding="utf-8")
    plain = ["fit", "--config", "quickstart", "--print_config"]
    with pytest.raises(SystemExit):
        main(plain)
    assert "***" not in capfd.readouterr().out
    with pytest.raises(SystemExit):
        main([*plain[:-1], "--config", str(config), "--model.student_kwargs", f"{{token: {KEY}}}", "--print_config"])
    out = capfd.readouterr().out
    assert not any(secret in out for secret in (KEY, PASSWORD, QUERY)) and out.count("***") == 5
    assert yaml.safe_load(out)["trainer"]["logger"][1]["init_args"]["options"]["max_tokens"] == 7
