"""The report of a run."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

import runs
from kd_lightning.cli.program import main
from kd_lightning.reporting.run_dir import RunFolder
from kd_lightning.reporting.run_report import warnings


def test_the_page_holds_table_figures_samples_and_a_command_that_repeats_the_run(tmp_path: Path) -> None:
    data = str(runs.little_data(tmp_path, rows=24))
    words = ["--data.train", data, "--data.test", data, "--results.max_new_tokens", "4"]
    words += ["--trainer.val_check_interval", "2", "--trainer.log_every_n_steps", "1"]
    assert main([*runs.little(tmp_path / "run", "taid", test=True), *words]) == 0
    text = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    after = runs.results(tmp_path / "run")["student_after"]
    assert f"| student after | {after['nll']:.3f} | {after['forward_kl']:.3f} |" in text
    assert text.count("data:image/png;base64,") == 5  # three validation curves, terms of the loss, schedules
    assert "| prompt | answer | student before | teacher | student after |" in text
    assert "| train | 24 | 24 | 0 |" in text and "| `model.temperature` | `1.0` |" in text

    command = text.split("```sh\n")[1].split("\n```")[0].replace("ANOTHER_FOLDER", str(tmp_path / "again"))
    assert main(shlex.split(command)[1:]) == 0
    one, other = runs.student(tmp_path / "run"), runs.student(tmp_path / "again")
    assert all(one[name].equal(other[name]) for name in one)


def run(results: dict[str, dict[str, float | None] | None] | None = None, **curves: list[float]) -> RunFolder:
    scalars = {f"val/{name}": list(enumerate(values)) for name, values in curves.items()}
    return RunFolder(Path("run"), {}, results, scalars)


def row(nll: float) -> dict[str, float | None]:
    return {"nll": nll, "forward_kl": 0.0, "exact_match": None}


@pytest.mark.parametrize(
    ("found", "rows", "says"),
    [
        (run(kd=[3.0, 1.0, 1.5]), {}, "validation loss was lowest at step 1 (1.000) and ends at 1.500"),
        (run({"teacher": row(1), "student_before": row(2), "student_after": row(3)}), {}, "is worse than before"),
        (
            run({"teacher": row(3), "student_before": row(2), "student_after": row(1)}),
            {},
            "the teacher's NLL on the test",
        ),
        (run(), {"train": {"rows": 9, "kept": 7, "empty": 2, "truncated": 0}}, "train: 2 rows empty"),
    ],
)
def test_warnings(found: RunFolder, rows: dict[str, dict[str, int]], says: str) -> None:
    (text,) = warnings(found, rows)
    assert says in text


def test_a_healthy_run_warns_of_nothing() -> None:
    table = {"teacher": row(1), "student_before": row(3), "student_after": row(2)}
    assert not list(warnings(run(table, kd=[3.0, 2.0, 1.0]), {"train": {"rows": 9, "kept": 9, "empty": 0}}))


def test_what_another_run_left_is_set_aside_and_not_read(tmp_path: Path) -> None:
    data, root = str(runs.little_data(tmp_path)), tmp_path / "run"
    given = ["--data.train", data, "--trainer.log_every_n_steps", "1", "--trainer.val_check_interval", "1"]
    given += ["--results.max_new_tokens", "2"]
    first = [*runs.little(root, steps=4, test=True), *given, "--data.test", data]
    assert main(first) == 0
    left = {path.relative_to(root): path.read_bytes() for path in root.glob("[rt]*/*") if path.is_file()}
    left[Path("results.json")] = (root / "results.json").read_bytes()
    again = [*runs.little(root, steps=2, test=True), *given, "--data.test", "null", "--export.overwrite", "true"]
    assert main(again) == 0
    run = RunFolder.read(root)
    assert run.step == 2 and run.results is None
    assert "Test rows" not in (root / "report.md").read_text()
    assert left and all((root / "earlier-1" / path).read_bytes() == content for path, content in left.items())
    assert main([*runs.little(root, steps=3, test=True), *given, "--data.test", "null", "--ckpt_path", "last"]) == 0
    assert [step for step, _ in RunFolder.read(root).scalars["val/ce"]] == [0, 1, 2]  # its own curve, resumed
    assert not (root / "earlier-2").exists()
