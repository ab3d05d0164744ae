"""The site: every public name has its place, links lead somewhere, what may be copied runs, and it builds strictly."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import kd_lightning
import runs
from kd_lightning.cli.command_parser import OTHER_COMMANDS, TRAINER_COMMANDS
from kd_lightning.data.conversation import parse_row
from locations import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
TEXTS = {str(path.relative_to(DOCS)): path.read_text(encoding="utf-8") for path in PAGES}
DOCUMENTED = re.findall(r"^::: kd_lightning\.([\w.]+)$", "\n".join(TEXTS.values()), re.MULTILINE)
OWN = tuple(OTHER_COMMANDS)
MY_FILE = """
from kd_lightning import Divergence


class SquaredHellinger(Divergence):
    def forward(self, log_p, log_q):
        return 1 - ((log_p + log_q) / 2).exp().sum(-1)


class MyDivergence(SquaredHellinger):
    pass
"""
PARSE = """
import json, os, sys
os.cpu_count = lambda: 64  # the pages speak of machines with eight GPUs
os.sched_getaffinity = lambda process: set(range(64))
from kd_lightning.cli import program as cli
from kd_lightning.cli import trainer_cli
sys.path.append("")
for name in ("instantiate_classes", "_run_subcommand"):
    setattr(trainer_cli.TrainerCLI, name, lambda self, *_: None)
trainer_cli.checkpoint_path = lambda name, root, resume=True: name
for words in json.load(sys.stdin):
    try:
        cli.run(words)
    except (Exception, SystemExit) as error:
        print(words, cli.explain(error))
"""
RUN = """
import json, sys
from kd_lightning.cli import program as cli
for words in json.load(sys.stdin):
    assert cli.main(words) == 0, words
"""
VALUES = {  # of options that stand without one, where 1 will not do
    "--data.train": "rows.jsonl",
    "--data.val": "rows.jsonl",
    "--data.max_length": "64",
    "--model.lora.targets": "all-linear",
    "--model.lr_scheduler": "torch.optim.lr_scheduler.ConstantLR",
    "--model.student": "asset:student",
    "--model.teacher": "asset:teacher",
    "--model.student_kwargs": "{}",
    "--model.teacher_kwargs": "{}",
    "--trainer.default_root_dir": "runs/mine",
    "--trainer.strategy": "auto",
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXTS[page], re.MULTILINE | re.DOTALL)


def shell_lines(page: str) -> list[list[str]]:
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines if "kd-lightning" in line]
    return [line[[Path(word).name for word in line].index("kd-lightning") + 1 :] for line in words]


LINES = [line for page in TEXTS for line in shell_lines(page)]
PAGES_RUN = (
    pytest.param("getting_started.md", marks=pytest.mark.slow), "scale.md", "responses.md", "watching.md",
    pytest.param("data.md", marks=pytest.mark.slow), pytest.param("extending.md", marks=pytest.mark.slow),
)  # fmt: skip


def test_every_public_name_has_one_place() -> None:
    names = [name for name in DOCUMENTED if ("." not in name and name[0].isupper()) or name in kd_lightning.__all__]
    assert sorted(names) == sorted(set(kd_lightning.__all__) - {"__version__"})
    assert "`kd_lightning.__version__`" in TEXTS["reference/index.md"]


def test_every_command_and_every_callback_of_the_program_has_its_place() -> None:
    assert {f"cli.{name}.main" for name in OTHER_COMMANDS} <= set(DOCUMENTED)
    for verb in TRAINER_COMMANDS:
        assert f"`{verb}`" in TEXTS["reference/commands.md"], verb
    source = (ROOT / "kd_lightning" / "cli" / "trainer_cli.py").read_text(encoding="utf-8")
    added = re.findall(r"add_lightning_class_args\((\w+), \"(\w+)\"\)", source)
    assert added
    for name, group in added:
        assert re.search(rf"^\| `{group}` \| \[`{name}`\]", TEXTS["reference/callbacks.md"], re.MULTILINE), name
    for name in ("Baselines", "Dashboard", "Report", "RunConfig", "Predictions"):
        assert name in source
        assert any(place.endswith(f".{name}") for place in DOCUMENTED), name


def test_every_shipped_config_is_named_and_shown_as_it_is() -> None:
    text = TEXTS["configs.md"]
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        assert f'--8<-- "{path.relative_to(ROOT)}"' in text, path
        if path.parent.name == "configs":
            assert f"| [`{path.stem}`](#{path.stem}) |" in text, path


def test_every_notebook_and_no_other_is_on_its_page() -> None:
    titles = [json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"] for path in NOTEBOOKS]
    said = [
        f"{path.stem[:2]} {''.join(title).splitlines()[0].lstrip('# ')}"
        for path, title in zip(NOTEBOOKS, titles, strict=True)
    ]
    assert re.findall(r"^\| \[?(\d\d [^|\]]+?)(?:\]\([^)]*\))? \|", TEXTS["tutorials.md"], re.M) == said


def test_the_picture_of_the_architecture_shows_every_layer_in_order() -> None:
    tree = ast.parse((ROOT / "tests" / "test_imports.py").read_text(encoding="utf-8"))
    values = {ast.unparse(node.target): node.value for node in tree.body if isinstance(node, ast.AnnAssign)}
    layers = ast.literal_eval(values["LAYERS"] or "()")
    level = {name: number for number, names in enumerate(layers, start=1) for name in names}
    shown: dict[str, int] = {}
    number = 0
    for line in re.findall(r"^│ (.*)│$", TEXTS["architecture.md"], re.MULTILINE):
        number = int(line[:2].strip() or number)
        name = line[4:].split()[0]
        assert (ROOT / "kd_lightning" / name).exists(), name
        shown[name.removesuffix(".py")] = number
    assert shown == level


def test_files_named_in_the_architecture_exist() -> None:
    names = re.findall(r"`(\w+/\w+\.py)`", TEXTS["architecture.md"])
    assert len(names) > 15
    for name in names:
        assert (ROOT / "kd_lightning" / name).is_file() or (ROOT / name).is_file(), name


def test_included_files_exist() -> None:
    found = [name for text in TEXTS.values() for name in re.findall(r'^\s*--8<-- "([^":]+)', text, re.MULTILINE)]
    assert "benchmarks/results/exactness.md" in found
    for name in found:
        assert (ROOT / name).is_file(), name


def python(code: str, folder: Path, given: str = "") -> str:
    """What a program of its own prints: classes that pages define must not outlive them."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=folder, env=env, input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("page", [page for page in TEXTS if blocks(page, "python")])
def test_python_on_the_pages_runs(page: str, tmp_path: Path) -> None:
    python("import torch\ntorch.manual_seed(0)\n" + "\n".join(blocks(page, "python")), tmp_path)


def test_rows_on_the_page_of_the_data_have_forms_that_are_read() -> None:
    rows = [json.loads(line) for block in blocks("data.md", "json") for line in block.splitlines()]
    assert len(rows) == 5
    for row in rows:
        assert not parse_row(row, "data.md").empty, row


def inline_options() -> list[list[str]]:
    """What stands in a line of text as `--option value …`, with what it needs to be read as words of `fit`."""
    found = {words for text in TEXTS.values() for words in re.findall(r"(?<!`)`(--\w[^`\n]*)`(?!`)", text)}
    out = []
    for words in sorted(found):
        split = shlex.split(words)
        if "." not in split[0] or any("…" in word and word != "…" for word in split):
            continue  # an option of a command, of a paper's repository, or a whole group
        line: list[str] = []
        if split[0].startswith("--model.responses."):
            line = ["--model.responses", "OnPolicy"]
        for i, word in enumerate(split):
            line.append("0.5" if word == "…" else word)
            if word.startswith("--") and (i + 1 == len(split) or split[i + 1].startswith("--")):
                line.append(VALUES.get(word, "1"))
        out.append(line)
    return out


def test_commands_and_options_on_the_pages_exist(tmp_path: Path) -> None:
    lines: list[list[str]] = []
    for words in inline_options():  # as many in one reading as do not contradict one another
        names = {word for word in words if word.startswith("--")}
        line = next((line for line in lines if names.isdisjoint(line)), None)
        if line is None:
            lines.append(line := ["fit", "--config", "quickstart"])
        line += words
    assert len(lines) > 2
    assert len(LINES) > 12
    for verb, *words in LINES:
        if verb not in OWN:
            lines.append([verb, *words])
            continue
        source = (ROOT / "kd_lightning" / "cli" / f"{verb}.py").read_text(encoding="utf-8")
        own = {*re.findall(r'"(--\w+)"', source), *(f"--{name}" for name in re.findall(r"^    (\w+): ", source, re.M))}
        rest = [word for word in words if word.startswith("--") and word not in own]
        if verb in ("generate", "compare", "prune"):
            assert not rest, (verb, rest)
        else:
            kept = [words[i : i + 2] for i, word in enumerate(words) if word in rest]
            lines.append(["fit", *(word for pair in kept for word in pair)])
    (tmp_path / "my_file.py").write_text(MY_FILE, encoding="utf-8")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    failed = python(PARSE, tmp_path, json.dumps(lines)).splitlines()
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("page", PAGES_RUN)
def test_the_lines_run_as_they_stand(page: str, tmp_path: Path) -> None:
    """In a folder of one's own, on fewer rows and steps."""
    few = [*runs.CPU, *runs.QUIET, "--trainer.max_steps", "2", "--trainer.val_check_interval", "1"]
    few += ["--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1", "--results.max_new_tokens", "2"]
    few += ["--data.batch_size", "4"]
    runs.little_data(tmp_path, rows=8).rename(tmp_path / "my_rows.jsonl")
    rows = [word for name in ("train", "val", "test") for word in (f"--data.{name}", "my_rows.jsonl")]
    (tmp_path / "my_file.py").write_text(MY_FILE, encoding="utf-8")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    lines = []
    for verb, *words in shell_lines(page):
        short = {"fit": few, "test": few[:-2], "predict": [*runs.CPU, "--trainer.limit_predict_batches", "1"]}.get(
            verb, []
        )
        short = [*short, "--generation.rows", "4"] if "--generation.every_n_validations" in words else short
        if verb == "cache" or "--model.teacher_cache" in words:  # the teacher reads every row
            short = [*short, *rows]
        lines.append([verb, *words, *short])
    python(RUN, tmp_path, json.dumps(lines))


def test_every_row_of_a_table_has_as_many_cells_as_its_head() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "benchmarks").rglob("*.md"))]
    for page in pages:
        for part in re.split(r"\n\s*\n", page.read_text(encoding="utf-8")):
            rows = [line.strip() for line in part.splitlines() if line.strip().startswith("|")]
            cells = {len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", row))) for row in rows}
            assert len(cells) <= 1, (page.name, rows[:2], cells)
