"""Generation metrics: ROUGE-L, exact match, length, finished responses, distinct bigrams; samples side by side."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedModel

from kd_lightning.callbacks.base import (
    PreparedRun,
    required_datamodule,
    student_and_teacher,
    student_of,
    teacher_model,
)
from kd_lightning.callbacks.tensorboard import summary_writers
from kd_lightning.console import progress_bar, progress_bar_enabled
from kd_lightning.data.base import DistillationDataModule
from kd_lightning.data.rows.documents import require_prompts
from kd_lightning.distributed.collectives import all_gather_objects
from kd_lightning.distributed.trainer import data_parallel_rank, forward_context
from kd_lightning.generation.batch_generator import BatchGenerator, batches_of_rank, length_batches
from kd_lightning.generation.response_file import Response
from kd_lightning.generation.scorer import ResponseScorer, ScoreFunction
from kd_lightning.models.generate import Sampling
from kd_lightning.models.hf_adapter import max_positions
from kd_lightning.reporting.markdown import markdown_table
from kd_lightning.reporting.run_dir import SCORE

SHOWN = 8


class GenerationQuality(L.Callback):
    """Generate responses to validation rows with student and teacher every N validations, and log generation metrics.

    Logged under `val/`: `rouge_l` (F-measure, stemmed), `exact_match`, `response_length` (tokens), `ends` (share of
    responses that end before `max_new_tokens`), `distinct_2` (distinct word bigrams as a share of all), and `score` if
    there is a scorer; the teacher's, measured once, under `baseline/teacher_…`. At the end, mean and standard deviation
    (`…_std`) over `seeds` samples of the test rows: the student's under `test/`, the teacher's under `test/teacher_…`;
    with `temperature` 0 one greedy pass without a deviation. Over k = `seeds` samples, the mean score is avg@k, and
    logged as `test/avg@k` too.

    Args:
        every_n_validations: validations between two measurements; 0: never.
        rows: number of rows, from the first on.
        max_new_tokens: longest response.
        temperature: sampling temperature at the end; responses during the run are greedy.
        top_p: mass of nucleus sampling at the end, in (0, 1].
        seeds: samples of each row at the end.
        batch_size: prompts per batch.
        scorer: a function (response, row) -> number in [0, 1], or its path such as `my_file.my_function`.

    Raises:
        ValueError: an argument is out of range, or there is no such function; before step 0: the student has no end of
            sequence or too few positions, or the function fails on the first row's answer.

    Examples:
        >>> from kd_lightning.callbacks import GenerationQuality
        >>> quality = GenerationQuality(every_n_validations=2, rows=50, seeds=3)  # for Trainer(callbacks=[...])
        >>> quality.sampling.max_new_tokens, quality.seeds
        (64, 3)
    """

    def __init__(
        self,
        every_n_validations: int = 0,
        rows: int = 200,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seeds: int = 5,
        batch_size: int = 50,
        scorer: str | ScoreFunction | None = None,
    ) -> None:
        if every_n_validations < 0:
            raise ValueError(f"generation.every_n_validations must be at least 0, got {every_n_validations}")
        for name, value in (("rows", rows), ("seeds", seeds), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"generation.{name} must be at least 1, got {value}")
        self.every_n_validations = every_n_validations
        self.rows = rows
        try:
            self.sampling = Sampling(max_new_tokens, temperature, top_p)
        except ValueError as error:
            raise ValueError(f"generation.{error}") from None
        self.scorer = None if scorer is None else ResponseScorer(scorer, "generation.scorer")
        self.seeds = seeds
        self.batch_size = batch_size
        self._validations = 0
        self._teacher: tuple[dict[str, float], list[str]] | None = None

    def state_dict(self) -> dict[str, int]:
        """The number of validations."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore the number of validations."""
        self._validations = state_dict["validations"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that responses can end and fit the model, before anything is measured."""
        if self.every_n_validations:
            self.check(student_of(pl_module), self._datamodule(trainer))

    def check_before_start(self, run: PreparedRun) -> None:
        """Check that responses can end and fit the model.

        Raises:
            ValueError: the student has no end of sequence or too few positions, or the rows have no prompts.
        """
        self.check(run.student, run.datamodule)

    def check(self, student: PreTrainedModel, datamodule: DistillationDataModule) -> None:
        """Check that responses can end and fit the model.

        Args:
            student: the student, loaded.
            datamodule: the data module, with its validation rows loaded.

        Raises:
            ValueError: the student has no end of sequence or too few positions, or the rows have no prompts.
        """
        if not self.every_n_validations or not datamodule.sources["val"]:
            return
        BatchGenerator(student, datamodule.tokenizer, self.sampling)
        splits = [split for split in ("val", "test") if split in datamodule.splits]
        for split in splits:
            require_prompts(datamodule, split, "generation.every_n_validations must be 0")
        rows = [row for split in splits for row in datamodule.generation_rows(split, self.rows)]
        if self.scorer is not None:
            self.scorer.check(rows[0])
        longest = max(len(row["prompt_ids"]) for row in rows)
        positions = max_positions(student)
        if positions is not None and longest + self.sampling.max_new_tokens > positions:
            raise ValueError(
                f"generation.max_new_tokens must be at most {positions - longest}, what the longest prompt leaves of "
                f"the student's max_position_embeddings of {positions}, got {self.sampling.max_new_tokens}"
            )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Generate greedy responses to the validation rows, and log their metrics."""
        if not self.every_n_validations or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._validations += 1
        if self._validations % self.every_n_validations:
            return
        greedy = replace(self.sampling, temperature=0.0)
        metrics, texts = self._measure(trainer, pl_module, student_of(pl_module), "val", greedy, 0)
        scalars = {f"val/{name}": value for name, value in metrics.items()}
        teacher = teacher_model(student_and_teacher(pl_module))
        if self._teacher is None and teacher is not None:
            self._teacher = self._measure(trainer, pl_module, teacher, "val", greedy, 0, "teacher")
        if self._teacher is not None:
            scalars |= {f"baseline/teacher_{name}": value for name, value in self._teacher[0].items()}
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step)
        self._show(trainer, texts)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sample responses to the test rows with every seed, and log means and standard deviations."""
        if not self.every_n_validations or trainer.limit_test_batches == 0:
            return
        datamodule = self._datamodule(trainer)
        if not datamodule.sources["test"]:
            return
        datamodule.setup("test")
        if "test" in datamodule.document_splits:
            rank_zero_info("generation: no responses to the test rows, which are documents without prompts")
            return
        scalars = self._over_seeds(trainer, pl_module, student_of(pl_module), "test/")
        module = student_and_teacher(pl_module)
        if (model := teacher_model(module)) is not None and module.teacher is not None:
            module.teacher.to(pl_module.device)
            scalars |= self._over_seeds(trainer, pl_module, model, "test/teacher_", "teacher")
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step)

    def _over_seeds(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        model: PreTrainedModel,
        prefix: str,
        role: str = "student",
    ) -> dict[str, float]:
        """Mean and standard deviation of the metrics of the test rows, by name with a prefix."""
        seeds = range(self.seeds if self.sampling.temperature else 1)
        measured = [self._measure(trainer, module, model, "test", self.sampling, seed, role)[0] for seed in seeds]
        scalars = {f"{prefix}{name}": statistics.mean(one[name] for one in measured) for name in measured[0]}
        if len(measured) > 1 and SCORE in measured[0]:
            scalars[f"{prefix}avg@{len(measured)}"] = scalars[f"{prefix}{SCORE}"]
        if len(measured) > 1:
            scalars |= {f"{prefix}{name}_std": statistics.stdev(one[name] for one in measured) for name in measured[0]}
        return scalars

    def _measure(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        model: PreTrainedModel,
        split: str,
        sampling: Sampling,
        seed: int,
        role: str = "student",
    ) -> tuple[dict[str, float], list[str]]:
        """Metrics over all ranks, and the responses to the first rows, as the role is asked."""
        datamodule = self._datamodule(trainer)
        rows = datamodule.generation_rows(split, self.rows, role)
        prompts = [row["prompt_ids"] for row in rows]
        batches = length_batches([len(prompt) for prompt in prompts], self.batch_size)
        generator = BatchGenerator(model, datamodule.tokenizer_of(role), sampling, seed, module.device)
        rank, ranks = data_parallel_rank(trainer)
        own = list(batches_of_rank(batches, rank=rank, ranks=ranks))
        own += [(0, batches[0])] * (-(-len(batches) // ranks) - len(own))  # ranks run a sharded model equally often
        shown = progress_bar(own, f"Answers, {split}, seed {seed}", shown=progress_bar_enabled(trainer))
        with forward_context(trainer):
            responses_of_rank = dict(generator.generate(prompts, shown))
        gathered = all_gather_objects(responses_of_rank, trainer.world_size)
        by_number = {number: response for part in gathered for number, response in part.items()}
        responses = [by_number[number] for number in range(len(rows))]
        metrics = quality(responses, [row["answer"] for row in rows])
        if self.scorer is not None:
            scores = (self.scorer.score(found.text, row) for found, row in zip(responses, rows, strict=True))
            metrics[SCORE] = statistics.mean(scores)
        return metrics, [response.text for response in responses[:SHOWN]]

    def _show(self, trainer: L.Trainer, texts: Sequence[str]) -> None:
        """Add a table of samples to TensorBoard's text."""
        rows = self._datamodule(trainer).generation_rows("val", len(texts))
        teacher_texts = self._teacher[1] if self._teacher is not None else ["–"] * len(rows)
        cells = [
            [" ".join(text.split()) for text in (row["prompt"], row["answer"], teacher, student)]
            for row, teacher, student in zip(rows, teacher_texts, texts, strict=True)
        ]
        table = markdown_table(["prompt", "answer", "teacher", "student"], cells)
        for writer in summary_writers(trainer):
            writer.add_text("samples", table, trainer.global_step)

    @staticmethod
    def _datamodule(trainer: L.Trainer) -> DistillationDataModule:
        return required_datamodule(trainer, "GenerationQuality")


def quality(responses: Sequence[Response], answers: Sequence[str]) -> dict[str, float]:
    """ROUGE-L, exact match, length, share of finished responses, and distinct bigrams.

    Args:
        responses: generated responses, at least one.
        answers: the reference answer of each.

    Raises:
        ValueError: there is no response, or not one answer per response.
    """
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

    if not responses or len(responses) != len(answers):
        raise ValueError(f"answers must be one per response, got {len(answers)} for {len(responses)} responses")
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    texts = [response.text.strip() for response in responses]
    pairs = [pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False)]
    return {
        "rouge_l": statistics.mean(
            scorer.score(answer, text)["rougeL"].fmeasure for text, answer in zip(texts, answers, strict=True)
        ),
        "exact_match": statistics.mean(
            float(text == answer.strip()) for text, answer in zip(texts, answers, strict=True)
        ),
        "response_length": statistics.mean(response.tokens for response in responses),
        "ends": statistics.mean(float(response.finish_reason == "eos") for response in responses),
        "distinct_2": len(set(pairs)) / max(1, len(pairs)),
    }
