"""Generation metrics: by hand, and in a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import runs
from kd_lightning.callbacks.generation_eval import GenerationQuality, quality
from kd_lightning.cli.program import main
from kd_lightning.generation.response_file import Response
from kd_lightning.reporting.run_dir import RunFolder


def test_figures_by_hand() -> None:
    said = [Response("a large dog", "eos", 4), Response(" a cat ", "length", 2)]
    figures = quality(said, ["a small dog", "a cat"])
    # the first shares "a … dog": precision 2/3, recall 2/3
    assert figures["rouge_l"] == pytest.approx((2 / 3 + 1) / 2)
    assert figures["exact_match"] == 0.5
    assert figures["response_length"] == 3
    assert figures["ends"] == 0.5
    assert figures["distinct_2"] == 1  # "a large", "large dog", "a cat"
    same = quality([Response("a b", "eos", 3)] * 4, ["a b"] * 4)
    assert same["distinct_2"] == 0.25 and same["rouge_l"] == 1


def test_rouge_stems_words() -> None:
    assert quality([Response("running dogs", "eos", 3)], ["run dog"])["rouge_l"] == 1


def test_an_empty_response_scores_zero() -> None:
    figures = quality([Response("", "eos", 1)], ["a cat"])
    assert figures["rouge_l"] == figures["exact_match"] == figures["distinct_2"] == 0


def test_a_run_logs_student_and_teacher_and_samples(tmp_path: Path) -> None:
    data = ["--data.train", str(runs.little_data(tmp_path, rows=16)), "--data.test", "asset:validation"]
    words = [*runs.little(tmp_path / "run", steps=4), *data, "--trainer.limit_test_batches", "1"]
    words += ["--results.max_new_tokens", "2", "--trainer.val_check_interval", "2"]
    words += ["--generation.every_n_validations", "2", "--generation.rows", "6", "--generation.max_new_tokens", "4"]
    assert main([*words, "--generation.seeds", "2"]) == 0
    run = RunFolder.read(tmp_path / "run")
    for name in ("rouge_l", "exact_match", "response_length", "ends", "distinct_2"):
        assert [step for step, _ in run.scalars[f"val/{name}"]] == [4], name  # the second of two validations
        assert run.last(f"baseline/teacher_{name}") is not None
        for who in ("", "teacher_"):
            assert run.last(f"test/{who}{name}") is not None and run.last(f"test/{who}{name}_std") is not None
    text = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    row = f"| rouge l | {run.last('test/rouge_l'):.3f} ± {run.last('test/rouge_l_std'):.3f} |"
    assert f"{row} {run.last('test/teacher_rouge_l'):.3f} ±" in text
    events: Any = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    text = events.Tensors("samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.startswith("| prompt | answer | teacher | student |") and len(text.splitlines()) == 2 + 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_validations": -1}, r"generation\.every_n_validations must be at least 0, got -1"),
        ({"rows": 0}, r"generation\.rows must be at least 1, got 0"),
        ({"seeds": 0}, r"generation\.seeds must be at least 1"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationQuality(**settings)


def test_a_student_without_an_end_of_sequence_is_refused_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import json
    import shutil

    from kd_lightning.assets import resolve

    student = shutil.copytree(resolve("asset:student"), tmp_path / "student")
    (student / "generation_config.json").write_text(json.dumps({}))
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    words = [*runs.little(tmp_path / "run"), "--data.train", str(runs.little_data(tmp_path))]
    assert main([*words, "--model.student", str(student), "--generation.every_n_validations", "1"]) == 1
    assert "has no eos_token_id" in capsys.readouterr().err
