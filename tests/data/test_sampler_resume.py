"""Rows after a resume are those of the run that nobody touched; ranks share the rows under Lightning."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from chat_templates import FAMILIES
from kd_lightning.data import InstructionDataModule
from locations import ROOT, SUPPORT
from tiny_tokenizers import tiny

ROWS, BATCH = 42, 4
PASS = -(-ROWS // BATCH)
SAVED: dict[str, dict[str, Any]] = {
    "after an epoch": {"save_on_train_epoch_end": True},
    "after validation": {"save_on_train_epoch_end": False},
}


class Recorder(L.LightningModule):
    """Learns nothing; writes down the rows of every batch."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.fail_at = fail_at
        self.seen: list[list[int]] = []
        self.validated: list[list[int]] = []

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        if self.global_step == self.fail_at:
            raise KeyboardInterrupt
        self.seen.append(batch["row_ids"].tolist())
        return self.weight * 0.0

    def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        self.validated.append(batch["row_ids"].tolist())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def write(path: Path, count: int = ROWS) -> str:
    rows = [{"instruction": "say " * (n % 7 + 1), "output": f"the answer {n}"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def data_of(path: str, workers: int = 0, **kwargs: Any) -> InstructionDataModule:
    family = FAMILIES["chatml"]
    tokenizer = tiny(family.specials, None, family.eos, template=family.template)
    return InstructionDataModule(
        path, val=path, tokenizer=tokenizer, batch_size=BATCH, num_workers=workers, seed=3, **kwargs
    )


def fit(
    folder: Path,
    workers: int = 0,
    fail_at: int | None = None,
    ckpt: str | None = None,
    every: int | str = 1,
    **kwargs: Any,
) -> Recorder:
    module = Recorder(fail_at)
    path = str((folder if folder.name != "again" else folder.parent) / "rows.jsonl")
    when = {"every_n_train_steps": every} if isinstance(every, int) else SAVED[every]
    saving = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **when)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice about loggers and workers
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=2 * PASS + 5,
            callbacks=[saving],
            logger=False,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            **kwargs,
        )
        try:
            trainer.fit(module, datamodule=data_of(path, workers), ckpt_path=ckpt, weights_only=True)
        except SystemExit:
            assert fail_at is not None  # how Lightning ends a run that was interrupted
    return module


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    folder = tmp_path_factory.mktemp("untouched")
    write(folder / "rows.jsonl")
    return folder, fit(folder, val_check_interval=4).seen


def test_every_pass_has_its_own_order(untouched: tuple[Path, list[list[int]]]) -> None:
    _, seen = untouched
    passes = [seen[:PASS], seen[PASS : 2 * PASS]]
    assert passes[0] != passes[1]
    for batches in passes:
        assert sorted(row for batch in batches for row in batch) == list(range(ROWS))


@pytest.mark.parametrize(
    ("step", "workers"),
    [
        *((step, 0) for step in (1, 4, PASS - 1, PASS, PASS + 1, 2 * PASS - 3, 2 * PASS)),
        (3, 2),
        (PASS, 2),
        (PASS + 2, 2),
    ],
)
def test_a_resumed_run_reads_the_remaining_batches(
    untouched: tuple[Path, list[list[int]]], step: int, workers: int, tmp_path: Path
) -> None:
    _, seen = untouched
    write(tmp_path / "rows.jsonl")
    killed = fit(tmp_path, workers, fail_at=step + 1, every=step, val_check_interval=4)
    assert killed.seen == seen[: step + 1]
    resumed = fit(tmp_path, workers, ckpt=str(tmp_path / f"step={step}.ckpt"), val_check_interval=4)
    assert resumed.seen == seen[step:]


@pytest.mark.parametrize("when", SAVED)
@pytest.mark.parametrize(("limit", "workers"), [(1.0, 0), (1.0, 2), (0.5, 0), (4, 0)])
def test_a_run_resumed_after_an_epoch_reads_the_next_one(when: str, limit: float, workers: int, tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl")
    seen = fit(tmp_path, workers, every=when, limit_train_batches=limit).seen
    length = {1.0: PASS, 0.5: PASS // 2, 4: 4}[limit]
    for step in (length, 2 * length):
        ckpt = str(tmp_path / f"step={step}.ckpt")
        assert fit(tmp_path / "again", workers, every=when, limit_train_batches=limit, ckpt=ckpt).seen == seen[step:]


def test_the_number_of_workers_may_change_at_a_resume(untouched: tuple[Path, list[list[int]]], tmp_path: Path) -> None:
    folder, seen = untouched
    step = PASS + 3
    write(tmp_path / "rows.jsonl")
    resumed = fit(tmp_path, 2, ckpt=str(folder / f"step={step}.ckpt"), val_check_interval=4)
    assert resumed.seen == seen[step:]


def test_validation_reads_every_row_in_each_pass(untouched: tuple[Path, list[list[int]]], tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl")
    validated = fit(tmp_path).validated
    assert sorted(row for batch in validated[:PASS] for row in batch) == list(range(ROWS))
    few = fit(tmp_path, limit_val_batches=2).validated
    assert few[:2] == [[0, 1, 2, 3], [4, 5, 6, 7]]  # the longest rows would be no fair sample


def test_overfitting_reads_the_same_batches_again(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl")
    module = fit(tmp_path, overfit_batches=2)
    assert module.seen[:4] == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2


class Writer(Recorder):
    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = Path(folder)

    def on_train_end(self) -> None:
        seen = {"train": self.seen, "val": self.validated}
        (self.folder / f"rank{self.global_rank}.json").write_text(json.dumps(seen))


def _fit_on_two_ranks(folder: str) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_spawn",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Writer(folder), datamodule=data_of(str(Path(folder) / "rows.jsonl")))


@pytest.mark.slow
def test_two_ranks_share_the_rows_whatever_lightning_does_to_samplers(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", 41)
    code = f"import test_sampler_resume as t; t._fit_on_two_ranks({str(tmp_path)!r})"
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parent, SUPPORT, SUPPORT.parent, ROOT))),
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    for name, missing in (("train", 1), ("val", 0)):
        assert len(first[name]) == len(second[name])
        rows = [row for batch in first[name] + second[name] for row in batch if row >= 0]
        assert len(rows) == len(set(rows)) == 41 - missing
