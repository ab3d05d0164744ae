"""Preflight names common misconfigurations, and has no findings on the shipped configs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import runs
from architectures import tiny
from kd_lightning.assets import resolve
from kd_lightning.cli.cache import main as cache_command
from kd_lightning.cli.preflight import main
from kd_lightning.data.collate import Collator
from kd_lightning.divergences import Divergence

SPLITS = ("train", "validation", "test")
SHIPPED = sorted(path.stem for path in runs.CONFIGS.glob("*.yaml"))


def lines(name: str, start: int, stop: int, config: str = "quickstart") -> list[str]:
    return runs.bundled(name, config).read_text(encoding="utf-8").splitlines()[start:stop]


def write(path: Path, rows: list[str]) -> str:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(path)


def words(folder: Path, config: str = "quickstart") -> list[str]:
    """Arguments of a small healthy run."""
    data = {name: write(folder / f"{name}.jsonl", lines(name, 0, 96, config)) for name in SPLITS}
    found = ["--config", str(runs.CONFIGS / f"{config}.yaml"), "--trainer.default_root_dir", str(folder / "root")]
    found += ["--data.train", data["train"], "--data.val", data["validation"], "--data.test", data["test"]]
    return [*found, *runs.CPU]


def teacher(folder: Path, change: Callable[[Any], None] = lambda model: None) -> str:
    """A copy of the bundled teacher, changed."""
    model = AutoModelForCausalLM.from_pretrained(resolve("asset:teacher"))
    change(model)
    model.save_pretrained(folder / "teacher")
    AutoTokenizer.from_pretrained(resolve("asset:teacher")).save_pretrained(folder / "teacher")
    return str(folder / "teacher")


class Halved(Divergence):
    """Not a divergence: it is not 0 where the two agree."""

    def forward(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return 0.5 - (log_p.exp() * log_q).sum(-1)


def swapped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    path = Path(teacher(folder)) / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    one, other = (next(token for token, i in vocabulary.items() if i == n) for n in (300, 301))
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    return ["--model.teacher", str(folder / "teacher")]


def without_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    template = AutoTokenizer.from_pretrained(resolve("asset:student")).chat_template
    (folder / "template.jinja").write_text(template.replace(" + '<eos>'", ""))
    return ["--data.chat_template", str(folder / "template.jinja")]


def other_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    student = shutil.copytree(resolve("asset:student"), folder / "student")
    path = student / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 5}))
    return ["--model.student", str(student)]


def other_template(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    text = "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    text += "{% if add_generation_prompt %}### assistant:\n{% endif %}"
    (folder / "template.jinja").write_text(text)
    return ["--data.chat_template", str(folder / "template.jinja")]


def random_teacher(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    def forget(model: Any) -> None:
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.02)

    return ["--model.teacher", teacher(folder, forget)]


def weak_teacher(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return ["--model.teacher", "asset:student", "--model.student", teacher(folder)]


def infinite_teacher(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    def spoil(model: Any) -> None:
        model.to(torch.bfloat16).model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.inf

    return ["--model.teacher", teacher(folder, spoil)]


def junk_vocabulary(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    def grow(model: Any) -> None:
        torch.manual_seed(0)
        model.resize_token_embeddings(2304, mean_resizing=False)
        model.get_output_embeddings().weight.data[2048:].normal_(std=2.0)

    return ["--model.teacher", teacher(folder, grow)]


def collate(change: Callable[[dict[str, Tensor]], None], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    plain = Collator.__call__

    def changed(self: Collator, rows: Any) -> dict[str, Tensor]:
        batch = plain(self, rows)
        change(batch)
        return batch

    monkeypatch.setattr(Collator, "__call__", changed)
    return []


def shifted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return collate(lambda batch: batch.update(labels=batch["labels"].roll(-1, 1)), monkeypatch)


def pad_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    def count(batch: dict[str, Tensor]) -> None:
        padding = batch["attention_mask"] == 0
        batch["labels"][padding] = batch["input_ids"][padding]

    return collate(count, monkeypatch)


def outside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    def move(batch: dict[str, Tensor]) -> None:
        batch["labels"][batch["labels"] != -100] += 2048

    return collate(move, monkeypatch)


def leaked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return ["--data.test", write(folder / "leaked.jsonl", lines("test", 0, 20) + lines("train", 4, 7))]


def doubled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return ["--data.train", write(folder / "doubled.jsonl", lines("train", 0, 60) + lines("train", 0, 12))]


def cut(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    row = {"instruction": "Count.", "output": " ".join(map(str, range(60)))}
    rows = [json.dumps({**row, "instruction": f"Count {n}."}) for n in range(40)]
    return ["--data.train", write(folder / "long.jsonl", rows), "--data.max_length", "40"]


def cut_away(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return ["--data.max_length", "8"]


def finished(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (folder / "root" / "student").mkdir(parents=True)
    return []


def full(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    usage = shutil.disk_usage(folder)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    return []


def added_token(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for name in ("student", "teacher"):
        shutil.copytree(resolve(f"asset:{name}"), folder / name)
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        tokenizer.add_tokens(["<|system|>"])
        tokenizer.save_pretrained(folder / name)
    rows = [line.replace('"instruction": "', '"instruction": "<|system|> ') for line in lines("train", 0, 40)]
    data = write(folder / "added.jsonl", rows)
    return [
        "--model.student",
        str(folder / "student"),
        "--model.teacher",
        str(folder / "teacher"),
        "--data.train",
        data,
    ]


def few_places(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    config = GPT2Config(vocab_size=2048, n_positions=24, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder / "student")
    AutoTokenizer.from_pretrained(resolve("asset:student")).save_pretrained(folder / "student")
    return ["--model.student", str(folder / "student")]


def other_end_and_a_long_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    long = [json.dumps({"instruction": f"Count {n}.", "output": "one two three " * 40}) for n in range(2)]
    train = write(folder / "long.jsonl", lines("train", 0, 62) + long)
    more = ["--data.train", train, "--data.batch_size", "32", "--data.group_by_length", "false"]
    return [*other_end(folder, monkeypatch), *more, "--data.shuffle", "false"]


def taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return ["--trainer.default_root_dir", str(folder / "train.jsonl" / "root")]


def arguments(*given: str) -> Callable[[Path, pytest.MonkeyPatch], list[str]]:
    return lambda folder, monkeypatch: list(given)


BROKEN: dict[str, tuple[Callable[[Path, pytest.MonkeyPatch], list[str]], str, str]] = {
    "two ids swapped": (swapped, "note: tokenizers", "an answer in both tokenizers"),
    "no end in the template": (without_end, "error: tokenizers", "another chat template than the teacher's: it reads"),
    "another end of generation": (other_end, "error: labels", "do not end with an end-of-sequence token ([5])"),
    "another template": (other_template, "error: tokenizers", "another chat template than the teacher's: it reads"),
    "a teacher of random weights": (random_teacher, "error: teacher", "about chance"),
    "a teacher worse than the student": (weak_teacher, "error: teacher", "no better than the student's"),
    "the teacher as its own student": (
        arguments("--model.student", "asset:teacher"),
        "error: teacher",
        "student and teacher give the same probabilities: there is nothing to learn",
    ),
    "inf in a bf16 teacher": (infinite_teacher, "error: output", "contain inf"),
    "junk beyond the tokenizer": (junk_vocabulary, "error: vocabulary", "ids from 2048 on"),
    "labels shifted by one": (shifted, "error: labels", "labels differ from the tokens at their positions"),
    "padding with labels": (pad_counted, "error: labels", "padding has labels (token "),
    "labels outside the vocabulary": (outside, "error: labels", "is outside the student's vocabulary of 2048"),
    "train rows inside test": (leaked, "error: rows", "test: 3 rows are also in train"),
    "rows repeated": (doubled, "error: rows", "train: 12 of 72 rows repeat another row exactly"),
    "every answer truncated": (
        cut,
        "warning: rows",
        "train: 40 of 40 rows are truncated at max_length 40",
    ),
    "evaluated on the bundled rows": (
        arguments("--data.test", "asset:test"),
        "warning: rows",
        "test: still the bundled rows, while train is not",
    ),
    "no answer within max_length": (cut_away, "error: ", "no answer begins within max_length=8"),
    "learning rate a hundred times": (arguments("--model.optimizer.lr", "0.8"), "error: step", "it must fall"),
    "temperature 50": (arguments("--model.temperature", "50"), "error: temperature", "nearly uniform"),
    "no divergence": (
        arguments("--model.objective", "test_preflight.Halved"),
        "error: objective",
        "where teacher and student agree",
    ),
    "a finished run's folder": (finished, "error: output", "holds the student of a finished run"),
    "responses that are cached before they are generated": (
        arguments(
            "--config", str(runs.CONFIGS / "seqkd.yaml"), "--model.ce_weight", "0", "--model.teacher_cache", "true"
        ),
        "error: words",
        "teacher_cache must be false with Regeneration",
    ),
    "a token without an embedding": (
        added_token,
        "error: places",
        "token 2048 ('<|system|>') of the data is outside of the student's 2048 embeddings",
    ),
    "rows longer than the positions": (few_places, "error: places", "the student max_position_embeddings of 24"),
    "another end, and a long row in the batch": (
        other_end_and_a_long_row,
        "error: labels",
        "do not end with an end-of-sequence token",
    ),
    "responses longer than the positions": (
        arguments("--generation.every_n_validations", "1", "--generation.max_new_tokens", "600"),
        "error: callbacks",
        "generation.max_new_tokens must be at most",
    ),
    "best by a metric that is not logged": (
        arguments("--export.which", "best", "--export.monitor", "val/bleu"),
        "error: callbacks",
        "export.monitor must be one of val/kd,",
    ),
    "a share below one batch": (
        arguments("--trainer.limit_test_batches", "0.01"),
        "error: callbacks",
        "must leave a batch of 3, got 0.01",
    ),
    "a folder under a file": (taken, "error: output", "is not a writable folder"),
    "a full disk": (full, "error: output", "GB free"),
    "skewed from a random start": (
        arguments("--model.objective", "SkewKL", "--model.student_init", "random"),
        "warning: objective",
        "of the gradient halfway to the teacher",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_setup_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    break_it, begins, says = BROKEN[name]
    healthy = words(tmp_path)
    code = main([*healthy, *break_it(tmp_path, monkeypatch)])
    found = capsys.readouterr().out.splitlines()
    assert any(line.startswith(begins) and says in line for line in found), found
    assert code == (1 if begins.startswith("error") else 0)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_has_no_finding(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "findings.json"
    assert main([*words(tmp_path, name), "--json", str(report)]) == 0
    findings = json.loads(report.read_text())
    notes = {"self_distillation": 2, "cross_tokenizer": 5}.get(name, 1)  # prompts, and both tokenizers
    assert [finding["level"] for finding in findings] == ["note"] * notes, findings
    assert len(capsys.readouterr().out.splitlines()) == notes
    assert not (tmp_path / "root").exists()


def recurrent(folder: Path) -> str:
    torch.manual_seed(0)
    tiny("mamba2", vocab_size=2048).save_pretrained(folder / "recurrent")
    AutoTokenizer.from_pretrained(resolve("asset:student")).save_pretrained(folder / "recurrent")
    return str(folder / "recurrent")


def test_packing_is_recommended_where_it_saves_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed = [
        json.dumps({"instruction": f"Count {n}.", "output": "one two " * (1 + 40 * (n % 8 == 0))}) for n in range(64)
    ]
    rows = ["--data.train", write(tmp_path / "mixed.jsonl", mixed), "--data.shuffle", "false", "--data.batch_size", "8"]
    main([*words(tmp_path), *rows])
    (found,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: padding: ")]
    assert re.search(r"\d\d% of the tokens that the student reads are padding: set data.packing", found)
    main([*words(tmp_path), *rows, "--data.packing", "true"])
    assert ": padding: " not in capsys.readouterr().out
    main([*words(tmp_path), *rows, "--model.student", recurrent(tmp_path)])
    assert ": padding: " not in capsys.readouterr().out


def test_packing_of_a_model_that_cannot_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words(tmp_path), "--data.packing", "true", "--model.student", recurrent(tmp_path)]) == 1
    text = "error: padding: packing must be false for the student Mamba2ForCausalLM: packed rows change each other's"
    assert text in capsys.readouterr().out


def test_two_tokenizers_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.dumps({"instruction": f"Say {n}.", "output": "a building for pigs"}) for n in range(16)]
    train = ["--data.train", write(tmp_path / "own.jsonl", rows)]
    main([*words(tmp_path, "cross_tokenizer"), *train, "--data.test", "null"])
    found = capsys.readouterr().out.splitlines()
    (reached,) = [line for line in found if "of the student's labels (val) are compared with the teacher" in line]
    assert re.search(r"note: tokenizers: two tokenizers: \d\d% of .*; \d\d% of them have a partner", reached)
    (mass,) = [line for line in found if line.startswith("note: shared_tokens: ")]
    assert re.search(r"the teacher gives \d\d% of its probability to tokens of both .*, the student \d\d% ", mass)
    (shown,) = [line for line in found if "an answer in both tokenizers" in line]
    student, teacher = re.search(r"same text: student(.*); teacher(.*)$", shown).groups()  # type: ignore[union-attr]
    chunks = [[text.replace(" · ", "") for text in side.split(" | ")] for side in (student, teacher)]
    assert chunks[0][:-1] == chunks[1][:-1]  # between two boundaries both have the same text; then the ends of turns
    assert "".join(chunks[0][:-1]).strip() == "a building for pigs"
    assert " · " in student  # the student reads a word in several tokens
    assert len(chunks[0]) >= 4


def comment(folder: Path) -> list[str]:
    path = Path(teacher(folder)) / "chat_template.jinja"
    path.write_text("{# version 2 #}" + path.read_text())
    return ["--model.teacher", str(folder / "teacher")]


def several_templates(folder: Path) -> list[str]:
    path = Path(teacher(folder))
    text = (path / "chat_template.jinja").read_text()
    (path / "chat_template.jinja").unlink()
    config = json.loads((path / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": text}, {"name": "tool_use", "template": "{{ tools }}"}]
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    return ["--model.teacher", str(path)]


def plain_rows(folder: Path) -> list[str]:
    (Path(teacher(folder)) / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    found = ["--model.teacher", str(folder / "teacher"), "--data.test", "null"]
    for name, argument in (("train", "train"), ("validation", "val")):
        rows = [json.loads(line) for line in lines(name, 0, 64)]
        plain = [json.dumps({"prompt": row["instruction"], "completion": row["output"]}) for row in rows]
        found += [f"--data.{argument}", write(folder / f"plain_{name}.jsonl", plain)]
    return found


@pytest.mark.parametrize("change", [comment, several_templates, plain_rows])
def test_no_false_alarm(
    change: Callable[[Path], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*words(tmp_path), *change(tmp_path)])
    assert "tokenizers" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["hidden", "top_k"])
def test_a_cached_teacher_has_no_finding(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only labeled positions of a cache hold anything, and of a top k the whole distribution is not known."""
    cache = str(tmp_path / "cache")
    assert cache_command([*words(tmp_path), "--output", cache, "--kind", kind, "--k", "16"]) == 0
    assert main([*words(tmp_path), "--model.teacher", "CachedTeacher", "--model.teacher.path", cache]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["note"]


def test_a_file_without_findings_is_not_overwritten(tmp_path: Path) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text('{"a": 1}')
    for path in (mine, tmp_path, tmp_path / "nowhere" / "findings.json"):
        with pytest.raises(ValueError, match="--json"):
            main([*words(tmp_path), "--json", str(path)])
    assert mine.read_text() == '{"a": 1}'
