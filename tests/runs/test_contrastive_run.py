"""Contrastive runs from the command line: they resume to the last bit; what is wrong is said before step 0."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import runs
from kd_lightning.assets import resolve
from kd_lightning.cli.program import main
from refusals import refused


def rows(count: int) -> list[dict[str, Any]]:
    """Bundled prompts with their answers, beside which the student's are those to other prompts."""
    lines = Path(resolve("asset:train")).read_text(encoding="utf-8").splitlines()[: count + 1]
    known = [json.loads(line) for line in lines]
    return [
        {
            "instruction": row["instruction"],
            "input": row["input"],
            "teacher_response": row["output"],
            "student_response": other["output"],
        }
        for row, other in itertools.pairwise(known)
    ]


def write(path: Path, content: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)


def words(root: Path, train: str, steps: int = 8, *extra: str) -> list[str]:
    """Words of a short fit on pairs."""
    data = ["--data", "ContrastiveDataModule", "--data.train", train, "--data.batch_size", "4"]
    loss = ["--model.objective", json.dumps(runs.GAPS), "--model.reduction", "sequence_mean"]
    return [*runs.little(root, "skew_kl", steps), *data, *loss, *extra]


def last(root: Path) -> dict[str, Any]:
    """The last checkpoint."""
    return torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)  # type: ignore[no-any-return]


def test_a_resumed_run_is_the_untouched_one_with_the_gaps_it_follows(tmp_path: Path) -> None:
    train = write(tmp_path / "pairs.jsonl", rows(14))  # four batches a pass, the last one short
    every = ["--checkpoint.every_n_train_steps", "1", "--model.lr_scheduler.init_args.total_iters", "2000"]
    for root, steps in (("whole", 10), ("cut", 6)):
        assert main([*words(tmp_path / root, train, steps, *every)]) == 0
    again = [*words(tmp_path / "cut", train, 10, *every), "--ckpt_path", "last", "--export.overwrite", "true"]
    assert main(again) == 0
    whole, cut = (last(tmp_path / root)["state_dict"] for root in ("whole", "cut"))
    gaps = [name for name in whole if name.endswith("mean_gap")]
    assert len(gaps) == 2 and all(whole[name].isfinite() for name in gaps)
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)


BAD = {
    "no second side": (
        [{"instruction": "a", "teacher_response": "b"}] * 4,
        [],
        ["pairs.jsonl", "no pair can be used", "4 dropped with one response missing"],
    ),
    "no pair": ([{"instruction": "a", "output": "b"}], [], ["pairs.jsonl:1", "chosen", "student_response", "'output'"]),
    "share above 1": (
        rows(4),
        ["--model.objective", "Contrastive", "--model.objective.teacher_share", "1.2"],
        ["teacher_share", "[0, 1]", "1.2"],
    ),
    "share below 0": (
        rows(4),
        ["--model.objective", "Contrastive", "--model.objective.teacher_share=-0.2"],
        ["teacher_share", "[0, 1]", "-0.2"],
    ),
    "responses": (rows(4), ["--data.responses", "later"], ["responses", "later", "generate"]),
    "class": (rows(4), ["--data", "ContrastivDataModule"], ["data", "ContrastivDataModule", "ContrastiveDataModule"]),
    "argument": (rows(4), ["--data.students", "a"], ["data", "students"]),
    "nobody to respond": (
        [{"instruction": "a", "output": "b"}],
        ["--data.responses", "generate"],
        ["no pair can be used", "1 dropped with an empty response"],
    ),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_before_the_first_step(
    case: tuple[list[dict[str, Any]], list[str], list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content, extra, said = case
    train = write(tmp_path / "pairs.jsonl", content)
    refused(words(tmp_path / "root", train, 4, *extra), said, capfd)
    assert not (tmp_path / "root" / "student").exists() and not (tmp_path / "root" / "checkpoints").exists()


def test_prompts_that_differ_between_two_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = [
        write(tmp_path / f"{name}.jsonl", [{"instruction": f"{name} {n}", "response": "a"} for n in range(3)])
        for name in ("good", "bad")
    ]
    said = ["no pair can be used", "6 dropped without a partner", "good.jsonl:1", "and 3 more"]
    refused([*words(tmp_path / "root", files[0]), "--data.student_responses", files[1]], said, capfd)
