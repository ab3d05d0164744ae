"""The teacher's own input on the command line: preflight shows it, `generate` asks with it, fit measures with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import runs
from kd_lightning.cli.program import main

PROMPT = "Which category does this definition belong to?\n{definition}"


def small(folder: Path) -> list[str]:
    """Arguments of a small run on rows with a context."""
    found = ["--config", "quickstart", "--trainer.default_root_dir", str(folder / "root"), *runs.CPU]
    for name, argument in (("train", "train"), ("validation", "val"), ("test", "test")):
        lines = (runs.CONFIGS.parent / f"kd_lightning/assets/context_{name}.jsonl").read_text().splitlines()[:48]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        found += [f"--data.{argument}", str(folder / f"{name}.jsonl")]
    return found


def test_preflight_shows_both_prompts_and_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["preflight", *small(tmp_path), "--data.teacher_prompt", PROMPT, "--json", str(tmp_path / "found.json")])
    notes = [one for one in json.loads((tmp_path / "found.json").read_text()) if one["check"] == "teacher_input"]
    assert len(notes) == 1
    row = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])
    assert f"<user>{row['instruction']}\\n{row['input']}<assistant>" in notes[0]["text"]
    assert f"{row['definition']}<assistant>" in notes[0]["text"]
    assert notes[0]["level"] == "note"


def test_preflight_refuses_an_input_without_a_teacher(tmp_path: Path) -> None:
    nobody = ["--model.teacher", "null", "--model.ce_weight", "1", "--data.teacher_prompt", PROMPT]
    assert main(["preflight", *small(tmp_path), *nobody, "--json", str(tmp_path / "found.json")]) != 0
    found = {one["check"]: one["level"] for one in json.loads((tmp_path / "found.json").read_text())}
    assert found["teacher_input"] == "error"


def test_a_model_is_asked_with_the_prompt_and_the_row_stays(tmp_path: Path) -> None:
    small(tmp_path)
    args = ["generate", "--model", "asset:teacher", "--data", str(tmp_path / "test.jsonl"), "--max_new_tokens", "6"]
    assert main([*args, "--output", str(tmp_path / "with.jsonl"), "--teacher_prompt", PROMPT]) == 0
    assert main([*args, "--output", str(tmp_path / "without.jsonl")]) == 0
    given, known, blind = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("test", "with", "without")
    )
    assert [{name: row[name] for name in given[0]} for row in known] == given
    right = [sum(row["response"] == row["output"] for row in rows) for rows in (known, blind)]
    assert right[0] > right[1]
    assert main([*args, "--output", str(tmp_path / "with.jsonl")]) == 1  # another prompt is another file


def test_the_closing_table_asks_the_teacher_with_its_own_prompt(tmp_path: Path) -> None:
    root = tmp_path / "root"
    short = ["--trainer.max_steps", "1", "--generation.every_n_validations", "0", "--trainer.limit_val_batches", "0"]
    table = {}
    for name, extra in {"own": ["--data.teacher_prompt", PROMPT], "none": []}.items():
        where = ["--trainer.default_root_dir", str(root / name)]
        assert main(["fit", *small(tmp_path), *short, *where, *extra]) == 0
        table[name] = json.loads((root / name / "results.json").read_text())
    assert table["own"]["teacher"]["exact_match"] > table["none"]["teacher"]["exact_match"]
    assert table["own"]["teacher"]["nll"] < table["none"]["teacher"]["nll"]
    assert table["own"]["student_before"]["nll"] == table["none"]["student_before"]["nll"]
