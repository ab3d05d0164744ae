"""Responses written in the run: before the first step, or anew before each pass over the data."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from kd_lightning.console import progress_bar_enabled
from kd_lightning.data.base import DistillationDataModule, GenerationRow, datamodule_of
from kd_lightning.data.collate import SIDES
from kd_lightning.distributed.collectives import all_gather_objects
from kd_lightning.distributed.dtensor import tensor_digest
from kd_lightning.distributed.trainer import data_parallel_rank, is_fast_dev_run
from kd_lightning.generation.batch_generator import (
    Answers,
    BatchGenerator,
    length_batches,
    max_prompt_tokens,
    summary,
    write_responses,
)
from kd_lightning.generation.response_file import Response, ResponseFile
from kd_lightning.models.compatibility import check_model_fits_data
from kd_lightning.models.generate import Sampling
from kd_lightning.seeding import derive_seed, run_seed
from kd_lightning.teachers.base import generating_model
from kd_lightning.teachers.cached import CachedTeacher


class Regeneration(L.Callback):
    """Lets teacher or student respond to the training prompts, and hands the words to the data module.

    The data module is a `PromptDataModule` (SeqKD) or a `ContrastiveDataModule` (DistiLLM-2). All ranks share the work.
    Responses are written to ROOT/responses as they come, so that a run killed in the middle goes on there; they follow
    from the weights and the run's seed alone.

    Args:
        side: who writes, "teacher" or "student".
        when: "once": before the first step, what is missing; "every_pass": all of them anew before each pass over the
            training data, the first included.
        max_new_tokens: longest response, at least 1.
        temperature: of sampling, ≥ 0; 0: the likeliest token each time.
        top_p: of sampling, in (0, 1].
        batch_size: prompts answered together on each rank, at least 1.
        keep_unfinished: take responses that were cut at `max_new_tokens` too, with an end that the writer did not
            write; False: such a row keeps its old response, or is dropped where it has none.

    Logged: `train/regenerate_share`, the share of the run's time so far that all of them together have been writing;
    and of each pass under `train/SIDE_…`: `response_length` (tokens), `finished` (share that the writer ended itself),
    `empty`.

    Raises:
        ValueError: an argument is out of its range; before the first step: the data module takes no responses, there is
            no such writer in this process, no room for a prompt, or the teacher's words are to be cached.
    """

    def __init__(
        self,
        side: Literal["teacher", "student"] = "student",
        when: Literal["once", "every_pass"] = "every_pass",
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
        batch_size: int = 64,
        keep_unfinished: bool = False,
    ) -> None:
        if side not in SIDES:
            raise ValueError(f"side must be 'teacher' or 'student', got {side!r}")
        if when not in ("once", "every_pass"):
            raise ValueError(f"when must be 'once' or 'every_pass', got {when!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.side = side
        self.when = when
        self.sampling = Sampling(max_new_tokens, temperature, top_p)
        self.batch_size = batch_size
        self.keep_unfinished = keep_unfinished
        self.seconds = 0.0  # spent writing in this run
        self._began = 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Look at the teacher before any model is loaded."""
        if stage == "fit":
            self.check(pl_module)

    def check(self, module: Any) -> None:
        """Refuse a teacher whose words on the responses are to be known before there are any."""
        if getattr(module, "teacher_cache", False):
            raise ValueError(
                "teacher_cache must be false where no responses can be known beforehand: Regeneration writes new ones"
            )
        if isinstance(getattr(module, "teacher", None), CachedTeacher):
            raise ValueError("a teacher cache holds no responses that Regeneration writes: leave one of them out")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look whether it can work here, and let the data module call before each pass."""
        self.seconds, self._began = 0.0, time.perf_counter()
        datamodule = self._datamodule(trainer)
        if self.when == "every_pass" and not datamodule.responses_can_change:
            kind = type(datamodule).__name__
            raise ValueError(f"Regeneration.when must be 'once' for a {kind}, got 'every_pass'")
        model = self._model(pl_module)
        BatchGenerator(model, datamodule.tokenizer, self.sampling)
        max_prompt_tokens(model, self.sampling.max_new_tokens, datamodule.max_length)
        datamodule.add_before_pass(lambda number: self.respond(trainer, pl_module, number))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Log how much of the run's time went into writing."""
        writers = [part for part in trainer.callbacks if isinstance(part, Regeneration)]  # type: ignore[attr-defined]
        if writers[0] is self:
            share = sum(writer.seconds for writer in writers) / (time.perf_counter() - self._began)
            pl_module.log("train/regenerate_share", torch.full((), share, device=pl_module.device))

    def respond(self, trainer: L.Trainer, module: Any, number: int) -> None:
        """Write the responses of a pass and hand them on.

        Args:
            trainer: of the run.
            module: with student and teacher on their device.
            number: of the pass, from 0 on.
        """
        datamodule = self._datamodule(trainer)
        if self.when == "once" and number > 0:
            return
        rows = datamodule.generation_rows("train")
        missing = set(datamodule.missing_responses(self.side))
        nothing_yet = len(missing) == len(rows)
        if self.when == "once":
            rows = [row for row in rows if row["index"] in missing]
        if not rows:
            return
        began = time.perf_counter()
        with self._folder(trainer) as folder, trainer.precision_plugin.forward_context():
            found = self._everyone(trainer, self._write(trainer, module, rows, folder, number))
        told, seconds = summary(list(found.values())), time.perf_counter() - began
        self.seconds += seconds
        rank_zero_info(f"{self.side}, pass {number}: {told}, {seconds:.0f} s")
        self._log(trainer, list(found.values()))
        taken = {
            index: response.text
            for index, response in found.items()
            if self.keep_unfinished or response.finish_reason == "eos"
        }
        if nothing_yet and not any(text.strip() for text in taken.values()):
            raise ValueError(
                f"the {self.side} wrote nothing that can be learned with max_new_tokens "
                f"{self.sampling.max_new_tokens}: {told}"
            )
        datamodule.replace_responses(taken, self.side)
        for text in check_model_fits_data(module.student, module.teacher and module.teacher.model, datamodule):
            rank_zero_warn(text)
        if not is_fast_dev_run(trainer):
            self._path(Path(trainer.default_root_dir) / "responses", trainer, number - 1).unlink(missing_ok=True)

    # ------------------------------------------------------------------------------------------------------- helpers
    def _log(self, trainer: L.Trainer, found: Sequence[Response]) -> None:
        lengths = [response.tokens for response in found if response.tokens] or [0]  # a file does not hold them
        figures = {
            "response_length": sum(lengths) / len(lengths),
            "finished": sum(response.finish_reason == "eos" for response in found) / len(found),
            "empty": sum(not response.text.strip() for response in found) / len(found),
        }
        scalars = {f"train/{self.side}_{name}": value for name, value in figures.items()}
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step)

    @staticmethod
    def _datamodule(trainer: L.Trainer) -> DistillationDataModule:
        """The data module that takes the responses.

        Raises:
            ValueError: it takes none.
        """
        datamodule = datamodule_of(trainer)
        if datamodule is None or not datamodule.accepts_responses:
            given = trainer.datamodule  # type: ignore[attr-defined]
            kind = "none" if given is None else type(given).__name__
            raise ValueError(f"Regeneration needs a PromptDataModule or a ContrastiveDataModule, got {kind}")
        return datamodule

    def _model(self, module: Any) -> Any:
        """What writes.

        Raises:
            ValueError: it is not in this process.
        """
        if self.side == "student":
            return module.student
        model = generating_model(module.teacher)
        if model is None:
            kind = "none" if module.teacher is None else type(module.teacher).__name__
            raise ValueError(
                f"Regeneration with side='teacher' needs a teacher that can generate (a model in this process), "
                f"got {kind}"
            )
        return model

    def _write(
        self, trainer: L.Trainer, module: Any, rows: list[GenerationRow], folder: Path, number: int
    ) -> dict[int, Response]:
        """This rank's share of the responses, by `index`.

        All ranks ask for equally many batches from the same one on, as the model may be spread over them.
        """
        if self.side == "teacher":
            module.teacher.to(module.device)
        model, datamodule = self._model(module), self._datamodule(trainer)
        most = max_prompt_tokens(model, self.sampling.max_new_tokens, datamodule.max_length)
        prompts = [row["prompt_ids"][-most:] for row in rows]
        rank, ranks = data_parallel_rank(trainer)
        plan = list(enumerate(length_batches([len(prompt) for prompt in prompts], self.batch_size)))
        mine = plan[rank::ranks]
        mine += plan[:1] * (-(-len(plan) // ranks) - len(mine))  # a rank with a batch less asks for one once more
        order = list(dict.fromkeys(row for _, numbers in mine for row in numbers))
        seed = derive_seed(run_seed(), SIDES[self.side], number)
        writer = BatchGenerator(model, datamodule.tokenizer, self.sampling, seed, module.device)
        weights = tensor_digest(itertools.chain(model.named_parameters(), model.named_buffers()))
        path = self._path(folder, trainer, number)
        settings = {**vars(self.sampling), "seed": seed, "batch_size": self.batch_size}
        file = ResponseFile(path, [_fields(rows[row]) for row in order], weights[:16], settings, anew=True)
        with file:
            done = min(self._everyone(trainer, {trainer.global_rank: self._batches_done(file, mine)}).values())
            place = {row: local for local, row in enumerate(order)}
            answers: Answers = ((place[row], said) for row, said in writer.answers(prompts, mine[done:]))
            write_responses(file, answers, progress_bar_enabled(trainer), f"{self.side}, pass {number}")
            return {rows[row]["index"]: file.responses[local] for row, local in place.items()}

    def _path(self, folder: Path, trainer: L.Trainer, number: int) -> Path:
        return folder / f"{self.side}-pass-{number:04d}.{trainer.global_rank}-of-{trainer.world_size}.jsonl"

    @staticmethod
    def _batches_done(file: ResponseFile, mine: Sequence[tuple[int, list[int]]]) -> int:
        ends = itertools.accumulate(len(numbers) for _, numbers in mine)
        return sum(end <= file.done for end in ends)

    @contextmanager
    def _folder(self, trainer: L.Trainer) -> Iterator[Path]:
        if is_fast_dev_run(trainer):
            with tempfile.TemporaryDirectory() as folder:
                yield Path(folder)
            return
        yield Path(trainer.default_root_dir) / "responses"

    @staticmethod
    def _everyone(trainer: L.Trainer, mine: dict[int, Any]) -> dict[int, Any]:
        """What all ranks have, by key, on every rank."""
        return {key: value for part in all_gather_objects(mine, trainer.world_size) for key, value in part.items()}


def _fields(row: GenerationRow) -> dict[str, Any]:
    """The row's own fields, without what a file of responses would say itself."""
    return {"row_id": row["index"], "prompt": row["prompt"]}
