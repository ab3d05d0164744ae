"""The closing table: teacher, student before, student after, on the same test rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from rich.table import Table

from kd_lightning.atomic_io import atomic_file
from kd_lightning.callbacks.base import on_training_device
from kd_lightning.console import progress_bar, progress_bar_enabled
from kd_lightning.data.base import DistillationDataModule, GenerationRow, datamodule_of
from kd_lightning.data.collate import left_pad
from kd_lightning.distributed.trainer import data_parallel_rank, is_fast_dev_run
from kd_lightning.models.generate import generate
from kd_lightning.reporting.run_dir import HEADINGS
from kd_lightning.teachers.base import generating_model
from kd_lightning.training.evaluation import limited_batches, token_means

SAMPLES = 6


class ResultsTable(L.Callback):
    """Measure the test rows before and after training; print a small table and write `ROOT/results.json`.

    Keys `teacher`, `student_before`, `student_after`, each with `nll` (test NLL per answer token), `forward_kl` (to the
    teacher) and `exact_match` (share of greedy responses equal to the answer). Skipped by
    `--trainer.limit_test_batches 0` and where there are no test rows.

    Args:
        task: exact match is taken on rows whose `task` field says this; None, or no row with the field: on every row.
        max_new_tokens: longest response, > 0.
        batch_size: prompts generated together, > 0.

    Raises:
        ValueError: a number is not positive.
    """

    def __init__(self, task: str | None = None, max_new_tokens: int = 32, batch_size: int = 100) -> None:
        for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"results.{name} must be at least 1, got {value}")
        self.task = task
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.rows: dict[str, dict[str, float | None] | None] = {}
        self._samples: dict[int, dict[str, str]] = {}

    @property
    def samples(self) -> list[dict[str, str]]:
        """A few test rows with every response to them that this process has seen: `prompt`, `answer`, who answered."""
        names = list(dict.fromkeys(name for sample in self._samples.values() for name in sample))
        return [{name: sample.get(name, "–") for name in names} for sample in self._samples.values()]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Read the test rows before a bar of progress stands in the way."""
        if stage == "fit" and (datamodule := self._test_data(trainer)) is not None:
            datamodule.setup("test")

    def state_dict(self) -> dict[str, Any]:
        """What was measured before the first step, for a run that goes on later."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what was measured before the first step."""
        self.rows = state_dict["rows"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure teacher and untrained student."""
        datamodule = self._test_data(trainer)
        if "student_before" in self.rows or datamodule is None:
            return
        before = self._measure(trainer, pl_module, datamodule, "student before")
        self.rows = {"teacher": before.pop("teacher"), "student_before": before["student"]}

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the student as it was exported, also if a resumed run had no step left to train."""
        datamodule = self._test_data(trainer)
        if "student_after" in self.rows or "student_before" not in self.rows or datamodule is None:
            return
        with on_training_device(trainer, pl_module):
            after = self._measure(trainer, pl_module, datamodule, "student after", teacher=False)
        self.rows["student_after"] = after["student"]
        if trainer.is_global_zero:
            with atomic_file(Path(trainer.default_root_dir) / "results.json") as part:
                part.write_text(json.dumps(self.rows, indent=2) + "\n", encoding="utf-8")
            self._print()

    @staticmethod
    def _test_data(trainer: L.Trainer) -> DistillationDataModule | None:
        """The data module where its test rows are to be measured, else None."""
        datamodule = datamodule_of(trainer)
        if datamodule is None or is_fast_dev_run(trainer) or trainer.limit_test_batches == 0:
            return None
        return datamodule if datamodule.sources["test"] else None

    def _measure(
        self, trainer: L.Trainer, module: Any, datamodule: DistillationDataModule, student: str, teacher: bool = True
    ) -> dict[str, dict[str, float | None] | None]:
        """NLL, forward KL and exact match of the student, and of the teacher where asked."""
        datamodule.setup("test")
        loader = datamodule.test_dataloader()
        batches = limited_batches(loader, trainer.limit_test_batches)
        means = token_means(trainer, module, loader, batches)
        rows = self._answerable(datamodule.generation_rows("test")[: batches * datamodule.batch_size])
        out: dict[str, dict[str, float | None] | None] = {
            "student": {
                "nll": means["student_nll"],
                "forward_kl": means.get("forward_kl"),
                "exact_match": self._exact_match(trainer, datamodule, module.student, rows, student),
            }
        }
        if teacher:
            out["teacher"] = None
            if module.teacher is not None:
                model = generating_model(module.teacher)
                out["teacher"] = {
                    "nll": means["teacher_nll"],
                    "forward_kl": 0.0,
                    "exact_match": self._exact_match(trainer, datamodule, model, rows, "teacher"),
                }
        return out

    def _answerable(self, rows: list[GenerationRow]) -> list[GenerationRow]:
        """Rows on which exact match is taken."""
        tasks = {row["row"].get("task") for row in rows}
        if self.task is None or tasks <= {None}:
            return rows
        found = [row for row in rows if row["row"].get("task") == self.task]
        if not found:
            known = ", ".join(sorted(map(str, tasks)))
            rank_zero_warn(f"results.task {self.task!r} is on none of the test rows ({known}): no exact match is taken")
        return found

    def _exact_match(
        self, trainer: L.Trainer, datamodule: DistillationDataModule, model: Any, rows: list[GenerationRow], who: str
    ) -> float | None:
        """Share of rows answered word for word, over all ranks; a few of the responses are kept."""
        if model is None or not rows:
            return None
        kept = {row["index"] for row in rows[:: max(1, len(rows) // SAMPLES)][:SAMPLES]}
        rank, ranks = data_parallel_rank(trainer)
        mine = sorted(rows[rank::ranks], key=lambda row: len(row["prompt_ids"]))
        tokenizer, pad_id = datamodule.tokenizer, datamodule.pad_id
        right = 0
        starts = range(0, -(-len(rows) // ranks), self.batch_size)
        for start in progress_bar(starts, f"{who} answers", shown=progress_bar_enabled(trainer)):
            own = mine[start : start + self.batch_size]
            part = own or rows[:1]  # ranks ask a sharded model equally often
            inputs = left_pad([row["prompt_ids"] for row in part], pad_id)
            inputs = {name: value.to(model.device) for name, value in inputs.items()}
            # a response longer than every answer and its end of turn equals none of them
            longest = max(len(ids) for ids in tokenizer([row["answer"] for row in part])["input_ids"]) + 1
            new = min(self.max_new_tokens, longest)
            responses = generate(model, inputs["input_ids"], inputs["attention_mask"], new)
            texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
            for text, row in zip(texts, own, strict=False):
                if row["index"] in kept:
                    sample = {"prompt": row["prompt"], "answer": row["answer"]}
                    self._samples.setdefault(row["index"], sample)[who] = text.strip()
            right += sum(text.strip() == row["answer"].strip() for text, row in zip(texts, own, strict=False))
        total = torch.tensor(float(right), device=trainer.strategy.root_device)
        if trainer.world_size > 1:
            total = trainer.strategy.reduce(total, reduce_op="sum") * ranks / trainer.world_size
        return float(total) / len(rows)

    def _print(self) -> None:
        """The table as a person reads it."""
        table = Table(title="test rows" if self.task is None else f"test rows (exact match: {self.task})")
        table.add_column("")
        for heading in HEADINGS.values():
            table.add_column(heading, justify="right")
        for name, values in self.rows.items():
            cells = [None if values is None else values[key] for key in HEADINGS]
            shown = ["–" if cell is None else f"{cell:.3f}" for cell in cells[:2]]
            shown.append("–" if cells[2] is None else f"{100 * cells[2]:.1f} %")
            table.add_row(name.replace("_", " "), *shown)
        Console().print(table)
