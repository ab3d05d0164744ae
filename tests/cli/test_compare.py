"""Runs side by side: what is averaged, what is marked, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

import runs
from kd_lightning.cli.program import main
from kd_lightning.reporting.run_dir import RunFolder

TEACHER = {"nll": 1.9, "forward_kl": 0.0, "exact_match": 0.66}


def folder(root: Path, nll: float | None, seed: int = 0, aligned: bool = False, **changes: Any) -> str:
    """A run's folder without a run; `aligned`: as with two tokenizers."""
    config: dict[str, Any] = {
        "seed_everything": seed,
        "model": {"objective": {"class_path": "ForwardKL"}, "temperature": 1.0},
        "data": {"train": "asset:train", "val": "asset:validation", "test": "asset:test", "seed": None},
        "trainer": {"default_root_dir": str(root), "max_steps": 10},
    }
    for name, value in changes.items():
        group, argument = name.split("__")
        config[group][argument] = value
    root.mkdir(parents=True)
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    with SummaryWriter(root / "tensorboard") as writer:
        for step in range(3):
            writer.add_scalar("val/ce", 3.0 - step / 10 - seed / 100, step)
            if aligned:
                writer.add_scalar("val/aligned_share", 0.84, step)
    if nll is not None:
        after = {"nll": nll, "forward_kl": nll - 1.9, "exact_match": 0.5}
        table = {"teacher": TEACHER, "student_before": {**TEACHER, "nll": 4.0}, "student_after": after}
        (root / "results.json").write_text(json.dumps(table))
    return str(root)


def output(args: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    assert main(["compare", *args]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_repetitions_are_averaged_and_what_stands_apart_is_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    roots = [folder(tmp_path / f"plain_{seed}", 2.5 + seed / 100, seed) for seed in (1, 2, 3)]
    roots += [folder(tmp_path / f"warm_{seed}", 2.9 + seed / 100, seed, model__temperature=2.0) for seed in (1, 2)]
    roots += [folder(tmp_path / f"like_{seed}", 2.51 + seed / 100, seed, model__temperature=1.1) for seed in (1, 2)]
    page = tmp_path / "report.md"
    output([*roots, "--output", str(page)], capsys)
    text = page.read_text()
    assert "| plain (3 runs) | 2.520 ± 0.010 |" in text
    assert "| warm (2 runs) | 2.915 ± 0.007 * |" in text
    assert "| like (2 runs) | 2.525 ± 0.007 |" in text
    assert "| teacher | 1.900 | 0.000 | 66.0 % |" in text
    assert "| `model.temperature` | `1.0` | `2.0` | `1.1` |" in text
    assert "seed_everything" not in text
    assert text.count("data:image/png;base64,") == 1  # val/ce is all these runs logged


def test_a_running_folder_stands_beside_finished_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = output([folder(tmp_path / "done", 2.5), folder(tmp_path / "going", None, model__temperature=2.0)], capsys)
    assert "going, 1 at step 2" in " ".join(text.replace("│", " ").split())


def test_other_rows_are_refused_unless_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    roots = [folder(tmp_path / "a", 2.5), folder(tmp_path / "b", 2.6, data__test="mine.jsonl")]
    error = output(roots, capsys, code=1)
    assert "not on the same data (data.test differs: asset:test, mine.jsonl)" in error
    assert "Not the same data: data.test differs" in " ".join(output([*roots, "--different_data"], capsys).split())


def test_a_file_that_has_changed_shows_in_the_teachers_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    roots = [folder(tmp_path / "a", 2.5), folder(tmp_path / "b", 2.6, seed=1)]
    path = tmp_path / "b" / "results.json"
    path.write_text(path.read_text().replace("1.9", "2.1"))
    assert "the results of one teacher differ between the runs: its files, or the test rows, have changed" in output(
        roots, capsys, code=1
    )


def test_no_run_and_an_existing_page_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert "is not the folder of a run: it has no config.yaml" in output([str(tmp_path / "empty")], capsys, code=1)
    root, page = folder(tmp_path / "a", 2.5), tmp_path / "page.md"
    page.write_text("mine")
    assert "exists: choose another name" in output([root, "--output", str(page)], capsys, code=1)
    assert page.read_text() == "mine"


def test_what_a_real_run_leaves_is_read(tmp_path: Path) -> None:
    data = runs.little_data(tmp_path, rows=24)
    given = ["--data.train", str(data), "--data.test", str(data), "--results.max_new_tokens", "2"]
    assert main([*runs.little(tmp_path / "run", steps=3, test=True), *given, "--trainer.log_every_n_steps", "1"]) == 0
    run = RunFolder.read(tmp_path / "run")
    assert run.config["model.temperature"] == 1.0 and run.config["trainer.max_steps"] == 3
    assert run.results is not None and run.results["teacher"] is not None
    assert [step for step, _ in run.scalars["train/loss"]] == [0, 1, 2] and run.step == 2
    assert run.last("train/kd") is not None and run.last("no/such") is None


def test_forward_kl_of_other_tokenizers_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other, plain = (
        folder(tmp_path / "one", 2.5, aligned=True, model__student="a"),
        folder(tmp_path / "other", 2.6, aligned=True, model__student="b"),
        folder(tmp_path / "plain", 2.7),
    )
    again = folder(tmp_path / "again", 2.55, seed=1, aligned=True, model__student="a")
    warm = folder(tmp_path / "warm", 2.7, model__temperature=2.0)
    note = "compare it only between runs with the same two tokenizers"
    for roots, noted in (((one, other), True), ((one, plain), True), ((one, again), False), ((plain, warm), False)):
        assert (note in " ".join(output(list(roots), capsys).split())) == noted


def test_a_run_with_two_tokenizers_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = runs.little_data(tmp_path, rows=24)
    given = ["--data.train", str(data), "--data.test", str(data), "--results.max_new_tokens", "2"]
    given += ["--data.val", str(data), "--trainer.val_check_interval", "2"]
    for name, config in (("two", "cross_tokenizer"), ("one", "quickstart")):
        assert main([*runs.little(tmp_path / name, steps=2, test=True, config=config), *given]) == 0
    two = RunFolder.read(tmp_path / "two")
    for name in ("aligned_share", "shared_mass_teacher", "shared_mass_student", "forward_kl"):
        assert 0 < (two.last(f"val/{name}") or 0) and (name == "forward_kl" or (two.last(f"val/{name}") or 2) < 1)
    assert two.results is not None and two.results["student_after"] is not None
    capsys.readouterr()
    roots = [str(tmp_path / name) for name in ("two", "one")]
    assert "not on the same data" in output(roots, capsys, code=1)  # other tokens of the same rows
    text = " ".join(output([*roots, "--different_data"], capsys).split())
    assert "compare it only between runs with the same two tokenizers" in text
    assert f"{two.results['student_after']['forward_kl']:.3f}" in text


def test_the_same_run_twice_and_one_seed_twice_are_no_repetitions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, again = folder(tmp_path / "first", 2.5, 1), folder(tmp_path / "again", 2.6, 1)
    other = folder(tmp_path / "other", 2.7, model__temperature=2.0)
    text = " ".join(output([first, first, again, other], capsys).replace("│", " ").split())
    assert "first 2.500 0.600" in text and "±" not in text.split("Left out")[0]
    assert f"Left out: {again} has the seed of {first}, 1" in text


def test_a_run_called_like_a_shared_row_has_a_row_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    roots = [folder(tmp_path / "teacher", 2.5), folder(tmp_path / "b", 2.6, model__temperature=2.0)]
    text = " ".join(output(roots, capsys).replace("│", " ").split())
    assert "teacher 1.900 0.000" in text and "teacher (run) 2.500 0.600" in text


def test_rows_are_told_by_what_they_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    roots = [folder(tmp_path / name, 2.5, seed) for seed, name in enumerate("ab")]
    for root, text in zip(roots, ("20 rows with digest x", "96 rows with digest y"), strict=True):
        (Path(root) / "rows.json").write_text(json.dumps({"train rows": text}))
    assert "data.train differs: asset:train (20 rows with digest x), asset:train (96" in output(roots, capsys, code=1)
    (Path(roots[1]) / "rows.json").write_text(json.dumps({"train rows": "20 rows with digest x"}))
    output(roots, capsys)


def test_one_file_by_two_names_and_another_teacher_are_the_same_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("test.jsonl").write_text("")
    folder(tmp_path / "a", 2.5, data__test="test.jsonl", model__teacher="one")
    folder(tmp_path / "b", 2.6, data__test=str(tmp_path / "test.jsonl"), model__teacher="two")
    table = json.loads(Path("b/results.json").read_text())
    Path("b/results.json").write_text(json.dumps({**table, "teacher": {**TEACHER, "nll": 3.0}}))
    folder(tmp_path / "c", 2.6, data__test="test.jsonl", model__teacher="one")
    Path("c/results.json").write_text(json.dumps({**table, "teacher": {**TEACHER, "nll": 1.90001}}))
    output(["a", "b", "c"], capsys)


@pytest.mark.parametrize("content", ["{}", "[1]", '{"teacher": 1}', "3"])
def test_a_broken_table_is_named(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "a", 2.5)
    (tmp_path / "a" / "results.json").write_text(content)
    assert "results.json is not a results table" in output([root], capsys, code=1)


@pytest.mark.parametrize("content", ["", "a: 1", "- b"])
def test_another_config_is_no_run(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(content)
    assert "is not the folder of a run" in output([str(tmp_path)], capsys, code=1)


def test_only_what_is_under_way_has_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    roots = [folder(tmp_path / "run_1", 2.5, 1), folder(tmp_path / "run_2", None, 2)]
    roots.append(folder(tmp_path / "none", None, model__temperature=2.0))
    (tmp_path / "none" / "student").mkdir()
    for file in (tmp_path / "run_2" / "tensorboard").iterdir():
        file.unlink()
    text = " ".join(output(roots, capsys).replace("│", " ").split())
    assert "run, 1 at step 0" in text and "none, no test rows" in text
