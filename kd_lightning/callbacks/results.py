"""The results table: teacher, student before and student after, on the same test rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from kd_lightning.atomic_io import atomic_file
from kd_lightning.callbacks.base import PreparedRun, on_training_device, student_and_teacher, student_of, teacher_model
from kd_lightning.console import printable
from kd_lightning.data.base import DistillationDataModule, GenerationRow, datamodule_of
from kd_lightning.distributed.trainer import is_fast_dev_run
from kd_lightning.generation.exact_match import exact_match, greedy_responses, mean_score
from kd_lightning.generation.scorer import ResponseScorer, ScoreFunction
from kd_lightning.reporting.run_dir import SCORE, ResultRow, Results, formatted_results, headings
from kd_lightning.training.evaluation import limited_batches, token_means

SAMPLES = 6


class ResultsTable(L.Callback):
    """Measure the test rows before and after training; print a table and save it as `ROOT/results.json`.

    Keys `teacher`, `student_before`, `student_after`, each with `nll` (test NLL in nats per answer token), `forward_kl`
    (from the teacher, in nats per token) and `exact_match` (share of greedy responses that equal the answer; null for
    documents, which have no prompts). Skipped
    with `--trainer.limit_test_batches 0` and without test rows. The last measurement is in `on_fit_end`, of the student
    as `HFExport` exports it if that callback comes first.

    Args:
        task: exact match is taken over rows whose field `task` has this value; None, or no row with the field: over
            all rows.
        max_new_tokens: longest response, at least 1.
        batch_size: prompts per batch of generation, at least 1.
        scorer: a function (response, row) -> number in [0, 1], or its path such as `my_file.my_function`; its mean over
            the greedy responses is a further column, `score`.

    Raises:
        ValueError: a number is below 1, or there is no such function; before step 0: it fails on the first row's
            answer.

    Examples:
        >>> from kd_lightning.callbacks import ResultsTable
        >>> def starts_as_the_answer(response, row):
        ...     return float(response.startswith(row["output"]))
        >>> table = ResultsTable(max_new_tokens=16, scorer=starts_as_the_answer)  # for Trainer(callbacks=[...])
        >>> table.max_new_tokens
        16
    """

    def __init__(
        self,
        task: str | None = None,
        max_new_tokens: int = 32,
        batch_size: int = 100,
        scorer: str | ScoreFunction | None = None,
    ) -> None:
        for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"results.{name} must be at least 1, got {value}")
        self.task = task
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.scorer = None if scorer is None else ResponseScorer(scorer, "results.scorer")
        self.rows: Results = {}
        self._samples: dict[int, dict[str, str]] = {}

    @property
    def samples(self) -> list[dict[str, str]]:
        """A few test rows: `prompt`, `answer`, and the responses of this process by name of the model."""
        names = list(dict.fromkeys(name for sample in self._samples.values() for name in sample))
        return [{name: sample.get(name, "–") for name in names} for sample in self._samples.values()]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Load the test rows, and check `task`, before the progress bar starts."""
        if stage == "fit" and (datamodule := self._test_data(trainer)) is not None:
            datamodule.setup("test")
            self.check_rows(datamodule)
            if "test" in datamodule.document_splits:
                rank_zero_info("results: no exact match, as the test rows are documents without prompts")

    def check_rows(self, datamodule: DistillationDataModule) -> None:
        """Check that a test row has the task, if any row has the field, and call the scorer on the first row's answer.

        Raises:
            ValueError: no row has the task; the scorer fails.
        """
        if self.scorer is not None and (first := datamodule.generation_rows("test", 1)):
            self.scorer.check(first[0])
        if self.task is None:
            return
        tasks = {row["row"].get("task") for row in datamodule.generation_rows("test")} - {None}
        if tasks and self.task not in tasks:
            known = ", ".join(sorted(map(str, tasks)))
            raise ValueError(f"results.task must be the `task` of a test row (one of {known}), got {self.task!r}")

    def check_before_start(self, run: PreparedRun) -> None:
        """Check the task and the scorer.

        Raises:
            ValueError: no test row has the task; the scorer fails.
        """
        if self._test_data(run.trainer, run.datamodule) is not None:
            self.check_rows(run.datamodule)

    def state_dict(self) -> dict[str, Results]:
        """The measurements before the first step, for a resumed run."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Results]) -> None:
        """Restore the measurements before the first step."""
        self.rows = state_dict["rows"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the teacher and the untrained student."""
        datamodule = self._test_data(trainer)
        if "student_before" in self.rows or datamodule is None:
            return
        module = student_and_teacher(pl_module)
        means, rows = self._evaluate(trainer, pl_module, datamodule)
        student = self._student_row(trainer, datamodule, pl_module, means, rows, "student before")
        teacher: ResultRow | None = None
        if module.teacher is not None:
            asked = self._for_teacher(datamodule, rows)
            answered = self._answers(trainer, datamodule, teacher_model(module), asked, "teacher")
            teacher = {"nll": means["teacher_nll"], "forward_kl": 0.0, **answered}
        self.rows = {"teacher": teacher, "student_before": student}

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the trained student, also if a resumed run had no step left to train; print and save the table."""
        datamodule = self._test_data(trainer)
        if "student_after" in self.rows or "student_before" not in self.rows or datamodule is None:
            return
        with on_training_device(trainer, pl_module):
            means, rows = self._evaluate(trainer, pl_module, datamodule)
            student = self._student_row(trainer, datamodule, pl_module, means, rows, "student after")
        self.rows["student_after"] = student
        if trainer.is_global_zero:
            with atomic_file(Path(trainer.default_root_dir) / "results.json") as part:
                part.write_text(json.dumps(self.rows, indent=2) + "\n", encoding="utf-8")
            self._print()

    @staticmethod
    def _test_data(
        trainer: L.Trainer, datamodule: DistillationDataModule | None = None
    ) -> DistillationDataModule | None:
        """The data module, by default the Trainer's, if its test rows are to be measured, else None."""
        datamodule = datamodule or datamodule_of(trainer)
        if datamodule is None or is_fast_dev_run(trainer) or trainer.limit_test_batches == 0:
            return None
        return datamodule if datamodule.sources["test"] else None

    def _evaluate(
        self, trainer: L.Trainer, module: L.LightningModule, datamodule: DistillationDataModule
    ) -> tuple[dict[str, float], list[GenerationRow]]:
        """Token means of the test batches, and the rows over which exact match is taken."""
        datamodule.setup("test")
        loader = datamodule.test_dataloader()
        batches = limited_batches(loader, trainer.limit_test_batches)
        means = token_means(trainer, student_and_teacher(module), loader, batches)
        return means, self._rows_of_task(datamodule.generation_rows("test", batches * datamodule.batch_size))

    @staticmethod
    def _for_teacher(datamodule: DistillationDataModule, rows: list[GenerationRow]) -> list[GenerationRow]:
        """The same rows with the teacher's own prompts, if it has any."""
        if not datamodule.teacher_has_own_input:
            return rows
        indices = {row["index"] for row in rows}
        return [row for row in datamodule.generation_rows("test", role="teacher") if row["index"] in indices]

    def _rows_of_task(self, rows: list[GenerationRow]) -> list[GenerationRow]:
        tasks = {row["row"].get("task") for row in rows}
        if self.task is None or tasks <= {None}:
            return rows
        chosen = [row for row in rows if row["row"].get("task") == self.task]
        if not chosen:
            known = ", ".join(sorted(map(str, tasks)))
            rank_zero_warn(f"results.task {self.task!r} matches none of the test rows ({known}): no exact match")
        return chosen

    def _student_row(
        self,
        trainer: L.Trainer,
        datamodule: DistillationDataModule,
        module: L.LightningModule,
        means: Mapping[str, float],
        rows: list[GenerationRow],
        name: str,
    ) -> ResultRow:
        answered = self._answers(trainer, datamodule, student_of(module), rows, name)
        return {"nll": means["student_nll"], "forward_kl": means.get("forward_kl"), **answered}

    def _answers(
        self,
        trainer: L.Trainer,
        datamodule: DistillationDataModule,
        model: PreTrainedModel | None,
        rows: list[GenerationRow],
        name: str,
    ) -> ResultRow:
        """Exact match and score of the responses; keeps a few of them as samples."""
        if model is None or not rows:
            return {"exact_match": None, **({} if self.scorer is None else {SCORE: None})}
        role = "teacher" if name == "teacher" else "student"
        limits = (self.max_new_tokens, self.batch_size)
        whole = self.scorer is not None
        responses = greedy_responses(trainer, datamodule, model, rows, *limits, name, role, whole)
        kept = {row["index"]: row for row in rows[:: max(1, len(rows) // SAMPLES)][:SAMPLES]}
        for index, text in responses.items():
            if index in kept:
                sample = {"prompt": kept[index]["prompt"], "answer": kept[index]["answer"]}
                self._samples.setdefault(index, sample)[name] = text
        found: ResultRow = {"exact_match": exact_match(trainer, rows, responses)}
        if self.scorer is not None:
            found[SCORE] = mean_score(trainer, rows, responses, self.scorer.score)
        return found

    def _print(self) -> None:
        task = "" if self.task is None else f" (exact match: {self.task})"
        table = Table(title=Text(printable(f"test rows{task}"), "table.title"))
        table.add_column("")
        for heading in headings(self.rows.values()).values():
            table.add_column(heading, justify="right")
        for cells in formatted_results(self.rows):
            table.add_row(*cells)
        Console().print(table)
