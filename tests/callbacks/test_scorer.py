"""Responses scored by a user's function: in the results table, over samples, in `compare`, and errors in one line."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import runs
from kd_lightning.callbacks import GenerationQuality, ResultsTable
from kd_lightning.cli.program import main
from kd_lightning.generation.scorer import ResponseScorer
from kd_lightning.reporting.run_dir import RunFolder

SOURCE = """
def share(response, row):
    assert "output" in row  # a field of the file
    return len(set(response)) / (len(response) + 1)

def equal(response, row):
    return response.strip() == row["output"].strip()

def fails(response, row):
    raise KeyError("level")

def large(response, row):
    return 1.5

def not_a_number(response, row):
    return float("nan")

number = 3
"""


@pytest.fixture(autouse=True)
def my_scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_scorer.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def share(response: str, row: Mapping[str, Any]) -> float:
    return len(set(response)) / (len(response) + 1)


def fit(folder: Path, name: str, *more: str) -> int:
    data = str(runs.little_data(folder, rows=12))
    words = ["--data.train", data, "--data.val", data, "--data.test", data, "--results.max_new_tokens", "6", *more]
    return main([*runs.little(folder / name, test=True), *words])


def row(output: str = "dog") -> Any:
    return {"prompt_ids": [1], "prompt": "p", "answer": output, "row": {"output": output}, "index": 4}


def test_the_table_has_a_column_of_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(tmp_path, "one", "--results.scorer", "my_scorer.share") == 0
    assert "score" in capsys.readouterr().out
    found = runs.results(tmp_path / "one")
    assert all(0 < found[name]["score"] < 1 for name in ("teacher", "student_before", "student_after"))
    report = (tmp_path / "one" / "report.md").read_text(encoding="utf-8")
    assert f"| student after | {found['student_after']['nll']:.3f} |" in report
    assert f"{100 * found['student_after']['score']:.1f} % |" in report
    assert "scorer: my_scorer.share" in (tmp_path / "one" / "config.yaml").read_text(encoding="utf-8")

    assert fit(tmp_path, "two") == 0  # without a scorer: no column
    assert "score" not in runs.results(tmp_path / "two")["student_after"]
    assert "score" not in (tmp_path / "two" / "report.md").read_text(encoding="utf-8").split("## Responses")[0]
    capsys.readouterr()
    assert main(["compare", "one", "two", "--output", "page.md"]) == 0
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "| exact match | score |" in page and "| – |" in page


def test_a_score_of_equality_is_exact_match(tmp_path: Path) -> None:
    assert fit(tmp_path, "run", "--results.scorer", "my_scorer.equal", "--results.max_new_tokens", "40") == 0
    for values in runs.results(tmp_path / "run").values():
        assert values["score"] == pytest.approx(values["exact_match"])


def test_avg_at_k_is_the_mean_over_samples(tmp_path: Path) -> None:
    words = [
        "--generation.scorer",
        "my_scorer.share",
        "--generation.every_n_validations",
        "1",
        "--generation.rows",
        "5",
    ]
    words += ["--generation.seeds", "3", "--generation.max_new_tokens", "6", "--trainer.val_check_interval", "4"]
    assert fit(tmp_path, "run", *words) == 0
    run = RunFolder.read(tmp_path / "run")
    for who in ("test/", "test/teacher_"):
        assert run.last(f"{who}avg@3") == run.last(f"{who}score") is not None
        assert (run.last(f"{who}score_std") or 0) > 0
    assert 0 < (run.last("val/score") or 0) < 1


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("share", "results.scorer must be the path of a function such as my_file.my_function, got 'share'"),
        ("no_file.share", "results.scorer no_file.share: No module named 'no_file'; it is looked for in the current"),
        ("my_scorer.other", "results.scorer my_scorer.other: my_scorer has no 'other'"),
        ("my_scorer.number", "results.scorer must be a function (response, row), got 'my_scorer.number'"),
        ("my_scorer.fails", "results.scorer my_scorer.fails, row 0 (from 0): KeyError: 'level'"),
        ("my_scorer.large", "row 0 (from 0): the score must be in [0, 1], got 1.5"),
        ("my_scorer.not_a_number", "row 0 (from 0): the score must be in [0, 1], got nan"),
    ],
)
def test_what_does_not_score_is_refused_before_anything_is_trained(
    path: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(tmp_path, "run", "--results.scorer", path) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert expected in error
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_preflight_calls_the_scorers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(runs.little_data(tmp_path, rows=12))
    words = ["preflight", *runs.little(tmp_path / "run", test=True)[1:], "--data.train", data, "--data.test", data]
    assert main([*words, "--results.scorer", "my_scorer.fails"]) == 1
    assert "KeyError" in "".join(capsys.readouterr())


def test_functions_in_python_and_what_fails_later() -> None:
    table = ResultsTable(scorer=share)
    assert table.scorer is not None
    assert table.scorer.score("aab", row()) == 2 / 4
    assert GenerationQuality(scorer=share).scorer is not None
    late = ResponseScorer(lambda response, row: 1 / (len(response) - 3), "results.scorer")
    late.check(row("four"))
    with pytest.raises(ValueError, match=r"row 4 \(from 0\): ZeroDivisionError"):
        late.score("dog", row())


@pytest.mark.slow
def test_reasoning_gym_verifies() -> None:
    gym = pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
    data = gym.create_dataset("leg_counting", size=4, seed=1)
    entry = data[0]
    scorer = ResponseScorer(
        lambda response, row: data.score_answer(answer=response, entry=json.loads(row["entry"])), "results.scorer"
    )
    known = {**row(entry["answer"]), "row": {"entry": json.dumps(entry)}}
    assert scorer.score(entry["answer"], known) == 1
    assert statistics.mean(scorer.score(text, known) for text in ("", "a sheep")) < 1
