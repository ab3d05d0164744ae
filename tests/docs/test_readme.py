"""What a reader may copy from the pages is executed, and every name on them exists."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

import runs
from kd_lightning.cli.program import main
from locations import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIGS = (
    "quickstart",
    "sft",
    "reverse_kl",
    "jsd",
    "akl",
    "alpha",
    "abkd",
    "skew_kl",
    "skew_reverse_kl",
    "taid",
    "amid",
    "seqkd",
    "gkd",
    "distillm",
    "distillm2",
    "minillm",
    "opd",
    "eopd",
    "self_distillation",
    "cross_tokenizer",
    "pretraining",
    "draft",
)


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    assert found, f"README.md has no section '{title}'"
    return found[1]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def command(name: str) -> str:
    found = re.search(rf"<!-- command: {name} -->\n```sh\n(.*?)```", README, re.DOTALL)
    assert found, f"README.md has no block under '<!-- command: {name} -->'"
    return found[1].strip()


def method_rows() -> list[list[str]]:
    rows = [line.strip("| ").split("|") for line in section("Methods").splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_the_two_commands_are_one_line_each_and_start_from_nothing() -> None:
    for name, end in (("run", "kd-lightning fit --config configs/quickstart.yaml"), ("test", "python -m pytest -n 2")):
        line = command(name)
        assert "\n" not in line
        assert line.startswith("python3 -m venv .venv && .venv/bin/pip install -q ")
        assert line.endswith(".venv/bin/" + end)


def test_ci_runs_the_second_command_as_it_stands() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "<!-- command: test -->" in script
    assert '"$line"' in script
    assert command("test") not in script, "a second copy of the line can drift"


def test_the_lines_without_lightning_run_and_the_loss_falls() -> None:
    first, second = blocks(section("Ten lines without Lightning"), "python")
    losses: list[float] = []
    names = {"losses": losses}
    step = "    optimizer.step()\n"
    assert step in first
    exec(compile(first.replace(step, step + "    losses.append(loss.item())\n"), "README", "exec"), names)
    assert len(losses) == 10
    assert losses[-1] < losses[0]
    exec(compile(second, "README", "exec"), names)
    assert names["loss"].item() > 0


def test_the_lines_with_lightning_run_and_leave_a_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(section("Ten lines of Python"), "python")
    exec(compile(block, "README", "exec"), {"__name__": "README"})
    assert (tmp_path / "runs/python/student/model.safetensors").is_file()
    assert (tmp_path / "runs/python/student/config.json").is_file()


def shell_lines(title: str) -> list[list[str]]:
    lines = [line for block in blocks(section(title), "sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("kd-lightning ")]


def test_the_commands_run_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of one's own, on fewer rows and steps."""
    few = [*runs.CPU, *runs.QUIET, "--trainer.max_steps", "2", "--trainer.val_check_interval", "1"]
    few += ["--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1", "--results.max_new_tokens", "2"]
    few += ["--data.batch_size", "4"]
    rows = runs.little_data(tmp_path, rows=16).read_text(encoding="utf-8").splitlines()
    (tmp_path / "my_rows.jsonl").write_text("\n".join(rows[:8]), encoding="utf-8")
    (tmp_path / "my_val.jsonl").write_text("\n".join(rows[8:]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    lines = shell_lines("Start")
    assert [verb for _, verb, *_ in lines] == ["preflight", "fit"]
    for _, verb, *words in [*lines, [*lines[1], "--ckpt_path", "last"]]:
        more = [*few, "--trainer.max_steps", "3"] if "--ckpt_path" in words else few
        assert main([verb, *words, *(runs.CPU if verb == "preflight" else more)]) == 0, words


def test_the_promised_number_of_lines() -> None:
    (block,) = blocks(section("Ten lines of Python"), "python")
    assert len([line for line in block.splitlines() if line.strip()]) <= 10


def test_every_class_of_the_method_table_exists() -> None:
    import kd_lightning

    text = section("Methods")
    names = [row[3].split(",")[0].strip("`") for row in method_rows()]
    names += re.findall(r"`([A-Z]\w+)`", text[text.index("Without a config") :])
    assert len(names) > 15
    for name in names:
        assert isinstance(getattr(kd_lightning, name), type), name


def test_every_shipped_config_of_a_loss_has_a_row() -> None:
    assert sorted(row[4].strip("`") for row in method_rows()) == sorted(CONFIGS)
    for name in CONFIGS:
        text = (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
        row = next(row for row in method_rows() if row[4] == f"`{name}`")
        assert re.search(rf"\b{row[3].split(',')[0].strip('`')}\b", text) or name == "sft", name


def test_every_method_names_a_notebook_that_has_its_class() -> None:
    for name, _, _, kind, config, book in method_rows():
        text = (ROOT / re.findall(r"\]\((tutorials/[^)]+)\)", book)[0]).read_text(encoding="utf-8")
        wanted = (kind.split(",")[0].strip("`"), config.strip("`"))
        assert any(re.search(rf"\b{word}\b", text) for word in wanted), name


def test_every_file_named_exists() -> None:
    for page in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
        paths = re.findall(r"`((?:kd_lightning|configs|tests|scripts|\.ci)/[\w./]*)`", text)
        for path in links + paths:
            assert (ROOT / path).exists(), f"{page}: {path}"


def test_pages_fit_on_a_screen() -> None:
    for page in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"):
        assert len((ROOT / page).read_text(encoding="utf-8").splitlines()) <= 60, page


def test_every_dependency_has_a_lower_bound_and_its_reason() -> None:
    source = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for dependency in tomllib.loads(source)["project"]["dependencies"]:
        assert ">=" in dependency, dependency
        (line,) = [line for line in source.splitlines() if f'"{dependency}"' in line and line.startswith("  ")]
        assert "#" in line, line


def test_every_excepted_warning_has_its_reason() -> None:
    source = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    first, *exceptions = tomllib.loads(source)["tool"]["pytest"]["ini_options"]["filterwarnings"]
    assert first == "error"
    for exception in exceptions:
        (line,) = [line for line in source.splitlines() if exception in line.replace("\\\\", "\\").replace('\\"', '"')]
        assert "#" in line, line
