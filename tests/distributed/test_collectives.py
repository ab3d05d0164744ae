"""Ranks with different settings raise before the first step, on every rank, with the difference."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

import processes
import runs
from kd_lightning.data.rows.tokenized_splits import describe_rows
from kd_lightning.distributed.collectives import check_ranks_agree
from locations import ROOT


def rows(*texts: str) -> datasets.Dataset:
    return datasets.Dataset.from_list([{"row": text, "length": len(text)} for text in texts])


def test_a_description_changes_with_any_length_number_and_text() -> None:
    one = describe_rows(rows("a", "bb"))
    assert one == describe_rows(rows("a", "bb"))
    assert one.startswith("2 rows with digest ")
    assert len({one, *(describe_rows(rows(*texts)) for texts in (("b", "bb"), ("a", "b"), ("a", "bb", "c")))}) == 4


def test_one_process_always_agrees() -> None:
    check_ranks_agree({"configuration": "a"})


def said(rank: int) -> list[str]:
    """What each rank raises if all is the same, and if a line or a complete description differs."""
    check_ranks_agree({"configuration": "lr: 1\nsteps: 2", "rows": "3"})
    heard = []
    for mine in ({"configuration": f"lr: 1\nsteps: {2 + rank}"}, {"rows": "3"} if rank == 0 else {}):
        try:
            check_ranks_agree(mine)
        except ValueError as error:
            heard.append(str(error))
    return heard


def test_every_rank_raises_the_same_error() -> None:
    first, second = processes.run(said)
    assert first == second
    assert first == [
        "all ranks must have the same configuration: rank 1 has 'steps: 3' where rank 0 has 'steps: 2'",
        "all ranks must have the same rows: rank 1 has 'nothing' where rank 0 has '3'",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["configuration", "train rows"])
def test_the_program_on_ranks_that_differ(what: str, tmp_path: Path) -> None:
    """As started by torchrun, one process per rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = tmp_path / "run"
    jobs = []
    for rank in range(2):
        folder = tmp_path / str(rank)
        folder.mkdir()
        runs.little_data(folder, rows=47 if rank and what == "train rows" else 48)
        arguments = [*runs.little(root), "--trainer.devices", "2", "--trainer.strategy", "ddp"]
        arguments += ["--data.train", "train.jsonl"]
        arguments += ["--model.optimizer.lr", "1e-3" if rank and what == "configuration" else "2e-3"]
        env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
        command = [sys.executable, "-m", "kd_lightning", *arguments]
        path = {"PYTHONPATH": str(ROOT)}
        jobs.append(
            subprocess.Popen(command, cwd=folder, env={**os.environ, **env, **path}, stderr=subprocess.PIPE, text=True)
        )
    for job in jobs:
        _, err = job.communicate(timeout=300)
        assert job.returncode == 1
        (line,) = [line for line in err.splitlines() if "all ranks must have the same" in line]
        assert f"all ranks must have the same {what}: rank 1 has " in line
    assert not (root / "config.yaml").exists()
    assert not list(root.glob("checkpoints/*"))
