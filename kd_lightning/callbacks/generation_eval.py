"""How good a model's responses are: ROUGE-L, exact match, length, ends, distinct n-grams; samples side by side."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as L

from kd_lightning.callbacks.tensorboard import summary_writers
from kd_lightning.console import progress_bar, progress_bar_enabled
from kd_lightning.data.base import DistillationDataModule, datamodule_of
from kd_lightning.distributed.collectives import all_gather_objects
from kd_lightning.distributed.trainer import data_parallel_rank
from kd_lightning.generation.batch_generator import BatchGenerator, batches_of_rank, length_batches
from kd_lightning.generation.response_file import Response
from kd_lightning.models.generate import Sampling
from kd_lightning.models.hf_adapter import max_positions
from kd_lightning.reporting.figures import markdown_table
from kd_lightning.teachers.base import generating_model

SHOWN = 8


class GenerationQuality(L.Callback):
    """Let student and teacher answer validation rows, every so many validations, and log what the answers are worth.

    Logged under `val/`: `rouge_l` (F-measure, stemmed), `exact_match`, `response_length` (tokens), `ends` (share that
    the model ends itself), `distinct_2` (share of different word pairs among all); the teacher's, measured once, under
    `baseline/teacher_…`. At the end mean and standard deviation (`…_std`) over `seeds` samples of the test rows, the
    student's under `test/`, the teacher's under `test/teacher_…`. Greedy where `temperature` is 0, then one sample says
    all.

    Args:
        every_n_validations: 0: never.
        rows: how many rows are answered, from the first on.
        max_new_tokens: longest response.
        temperature: of the samples at the end; during the run answers are greedy.
        top_p: of the samples at the end.
        seeds: samples of each row at the end.
        batch_size: prompts answered together.

    Raises:
        ValueError: a number is out of its range; (before step 0) the student's generation config names no end.
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
        self.seeds = seeds
        self.batch_size = batch_size
        self._validations = 0
        self._teacher: tuple[dict[str, float], list[str]] | None = None

    def state_dict(self) -> dict[str, Any]:
        """How many validations there were."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._validations = state_dict["validations"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that responses can end and fit the model, before anything is measured."""
        self.check(pl_module.student, _data(trainer))

    def check(self, student: Any, datamodule: DistillationDataModule) -> None:
        """See that a response can end, and that student has places for the longest.

        Args:
            student: the model.
            datamodule: with its validation rows loaded.
        """
        if not self.every_n_validations or not datamodule.sources["val"]:
            return
        BatchGenerator(student, datamodule.tokenizer, self.sampling)
        splits = [split for split in ("val", "test") if split in datamodule.splits]
        rows = [row for split in splits for row in datamodule.generation_rows(split)[: self.rows]]
        longest = max(len(row["prompt_ids"]) for row in rows)
        places = max_positions(student)
        if places is not None and longest + self.sampling.max_new_tokens > places:
            raise ValueError(
                f"generation.max_new_tokens must be at most {places - longest}, what the longest prompt leaves of the "
                f"student's max_position_embeddings of {places}, got {self.sampling.max_new_tokens}"
            )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Answer, measure, log."""
        if not self.every_n_validations or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._validations += 1
        if self._validations % self.every_n_validations:
            return
        greedy = replace(self.sampling, temperature=0.0)
        ours, texts = self._quality(trainer, pl_module, pl_module.student, "val", greedy, 0)
        scalars = {f"val/{name}": value for name, value in ours.items()}
        module: Any = pl_module
        teacher = generating_model(module.teacher)
        if self._teacher is None and teacher is not None:
            self._teacher = self._quality(trainer, pl_module, teacher, "val", greedy, 0)
        if self._teacher is not None:
            scalars |= {f"baseline/teacher_{name}": value for name, value in self._teacher[0].items()}
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step)
        self._show(trainer, texts)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let both answer the test rows with every seed, and log means and standard deviations."""
        if not self.every_n_validations or not _data(trainer).sources["test"] or trainer.limit_test_batches == 0:
            return
        _data(trainer).setup("test")
        module: Any = pl_module
        models = {"": module.student, "teacher_": generating_model(module.teacher)}
        scalars: dict[str, float] = {}
        for who, model in models.items():
            if model is None:
                continue
            if who:
                pl_module.teacher.to(pl_module.device)
            seeds = range(self.seeds if self.sampling.temperature else 1)
            found = [self._quality(trainer, pl_module, model, "test", self.sampling, seed)[0] for seed in seeds]
            scalars |= {f"test/{who}{name}": statistics.mean(one[name] for one in found) for name in found[0]}
            if len(found) > 1:
                scalars |= {f"test/{who}{name}_std": statistics.stdev(one[name] for one in found) for name in found[0]}
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step)

    def _quality(
        self, trainer: L.Trainer, module: Any, model: Any, split: str, sampling: Sampling, seed: int
    ) -> tuple[dict[str, float], list[str]]:
        """Figures over all ranks, and the responses to the first rows (on the first rank)."""
        rows = _data(trainer).generation_rows(split)[: self.rows]
        prompts = [row["prompt_ids"] for row in rows]
        plan = length_batches([len(prompt) for prompt in prompts], self.batch_size)
        writer = BatchGenerator(model, _data(trainer).tokenizer, sampling, seed, module.device)
        rank, ranks = data_parallel_rank(trainer)
        mine = list(batches_of_rank(plan, rank=rank, ranks=ranks))
        mine += [(0, plan[0])] * (-(-len(plan) // ranks) - len(mine))  # ranks ask a sharded model equally often
        asked = progress_bar(mine, f"Answers, {split}, seed {seed}", shown=progress_bar_enabled(trainer))
        parts = all_gather_objects(dict(writer.answers(prompts, asked)), trainer.world_size)
        found = {number: response for part in parts for number, response in part.items()}
        responses = [found[number] for number in range(len(rows))]
        figures = quality(responses, [row["answer"] for row in rows])
        return figures, [response.text for response in responses[:SHOWN]]

    def _show(self, trainer: L.Trainer, texts: Sequence[str]) -> None:
        """A table of samples in TensorBoard's text."""
        rows = _data(trainer).generation_rows("val")[: len(texts)]
        theirs = self._teacher[1] if self._teacher is not None else ["–"] * len(rows)
        cells = [
            [" ".join(text.split()) for text in (row["prompt"], row["answer"], teacher, student)]
            for row, teacher, student in zip(rows, theirs, texts, strict=True)
        ]
        table = markdown_table(["prompt", "answer", "teacher", "student"], cells)
        for writer in summary_writers(trainer):
            writer.add_text("samples", table, trainer.global_step)


def quality(responses: Sequence[Response], answers: Sequence[str]) -> dict[str, float]:
    """ROUGE-L, exact match, length, share that ends itself, and distinct word pairs, of responses to known answers.

    Args:
        responses: what was said.
        answers: what was to be said, one each.

    Raises:
        ValueError: there is nothing to judge, or not one answer a response.
    """
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

    if not responses or len(responses) != len(answers):
        raise ValueError(f"answers must be one a response, got {len(answers)} for {len(responses)} responses")
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


def _data(trainer: L.Trainer) -> DistillationDataModule:
    datamodule = datamodule_of(trainer)
    if datamodule is None:
        raise ValueError("GenerationQuality needs a data module of this package, such as InstructionDataModule")
    return datamodule
