"""Responses to the training prompts, generated during a run: before the first step, or before each pass."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from transformers import PreTrainedModel

from kd_lightning.callbacks.base import PreparedRun, student_and_teacher, student_of, teacher_model
from kd_lightning.data.base import DistillationDataModule, GenerationRow, datamodule_of
from kd_lightning.data.collate import SIDES
from kd_lightning.distributed.trainer import forward_context, is_fast_dev_run
from kd_lightning.generation.batch_generator import BatchGenerator, summary
from kd_lightning.generation.pass_generator import PassGenerator, ResponsePass
from kd_lightning.generation.response_file import Response
from kd_lightning.generation.served_pass import ServedPass, connect
from kd_lightning.models.compatibility import check_models_fit_data
from kd_lightning.models.generate import Sampling, stop_strings
from kd_lightning.serving.server import Server
from kd_lightning.teachers.batches import models_of_run
from kd_lightning.teachers.cached import CachedTeacher
from kd_lightning.training.base import StudentTeacherModule


class Regeneration(L.Callback):
    """Generate responses to the training prompts with teacher or student, and pass them to the data module.

    The data module is a `PromptDataModule` (SeqKD) or a `ContrastiveDataModule` (DistiLLM-2). The ranks share the work.
    Responses are saved in `ROOT/responses` as they are generated, so generation is resumable; they depend on the
    weights and the run's seed alone.

    With `server`, a server generates: before each pass, the student's weights are published to it, and responses are
    requested by token ids. A served teacher keeps its weights, and must have the student's tokens.

    Args:
        side: the model that generates, "teacher" or "student".
        when: "once": missing responses, before the first step; "every_pass": all responses, before each pass over the
            training data, including the first.
        max_new_tokens: longest response, at least 1.
        temperature: sampling temperature, ≥ 0; 0: greedy.
        top_p: mass of nucleus sampling, in (0, 1].
        batch_size: prompts per batch on each rank, at least 1.
        keep_unfinished: also train on responses that were cut at `max_new_tokens`, with an end of sequence appended;
            False: such a row keeps its previous response, or is dropped if it has none.
        server: that generates; None: the model in this process. `batch_size` is not used then.
        min_new_tokens: the end of sequence cannot be one of the first `min_new_tokens` tokens.
        stop: texts that end a response; it is trained on without the text, and with an end of sequence appended.

    Logged: `train/regenerate_share`, the share of the run's time so far that was spent on generation; for each pass,
    under `train/SIDE_…`: `response_length` (tokens), `finished` (share of responses that end before `max_new_tokens`),
    `empty`. With a server and the student: `train/staleness`, the number of steps between the weights that generated
    and those that train on it.

    Raises:
        ValueError: an argument is out of range; before the first step: the data module accepts no responses, the model
            cannot generate, there is no room for a prompt, the teacher is cached, or the server fails its test.

    Examples:
        >>> from kd_lightning import Regeneration
        >>> callback = Regeneration(side="teacher", when="once", temperature=0.0)  # SeqKD, with a PromptDataModule
        >>> callback.side, callback.sampling.max_new_tokens
        ('teacher', 128)
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
        server: Server | None = None,
        min_new_tokens: int = 0,
        stop: list[str] | None = None,
    ) -> None:
        if side not in SIDES:
            raise ValueError(f"side must be 'teacher' or 'student', got {side!r}")
        if when not in ("once", "every_pass"):
            raise ValueError(f"when must be 'once' or 'every_pass', got {when!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.side = side
        self.when = when
        self.sampling = Sampling(max_new_tokens, temperature, top_p, min_new_tokens, stop_strings(stop))
        self.batch_size = batch_size
        self.keep_unfinished = keep_unfinished
        self.server = server
        self.written_at: int | None = None  # number of steps of the weights that a server has written with
        self.seconds = 0.0  # spent on generation in this run
        self._start = 0.0
        self._before_pass: Callable[[int], None] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check the teacher before any model is loaded."""
        if stage == "fit":
            self.written_at = None
            self.check(pl_module)

    def check(self, module: L.LightningModule) -> None:
        """ValueError if the teacher is cached: a cache has no outputs for responses that do not exist yet."""
        if not isinstance(module, StudentTeacherModule):
            return
        if module.teacher_cache:
            raise ValueError(
                "teacher_cache must be false with Regeneration: its responses are not known before the run"
            )
        if self.server is not None and self.side == "teacher":
            return
        members = () if module.teacher is None else module.teacher.members.values()
        if any(isinstance(member, CachedTeacher) for member in members):
            raise ValueError(
                "a CachedTeacher has no outputs for the responses of Regeneration: use another teacher, or remove "
                "Regeneration from trainer.callbacks"
            )

    def check_before_start(self, run: PreparedRun) -> None:
        """ValueError if the teacher is cached, or the server has no model or no way to be given weights."""
        self.check(run.module)
        self._check_lengths(run.datamodule)
        if self.server is not None:
            student = run.student if self.side == "student" else None
            connect(self.server, student, run.datamodule, self.sampling)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check data module and model, and register the generation before each pass."""
        self.seconds, self._start = 0.0, time.perf_counter()
        datamodule = self._datamodule(trainer)
        if self.when == "every_pass" and not datamodule.responses_can_change:
            kind = type(datamodule).__name__
            raise ValueError(f"Regeneration.when must be 'once' for a {kind}, got 'every_pass'")
        self._check_lengths(datamodule)
        if self.server is not None:
            connect(self.server, self._served_student(pl_module), datamodule, self.sampling)
        else:
            model = self._model(pl_module)
            BatchGenerator(model, datamodule.tokenizer_of(self.side), self.sampling)
            self.sampling.max_prompt_tokens(model, datamodule.max_length)
        self._remove(trainer)
        self._before_pass = functools.partial(self.generate_pass, trainer, pl_module)
        datamodule.add_before_pass(self._before_pass)

    def _check_lengths(self, datamodule: DistillationDataModule) -> None:
        if self.when == "every_pass" and datamodule.batch_tokens is not None:
            raise ValueError(
                "data.batch_tokens must be None with Regeneration.when='every_pass': the number of batches would change"
            )

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the data module as it was, for another run."""
        self._remove(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the data module as it was, for another run."""
        self._remove(trainer)

    def _remove(self, trainer: L.Trainer) -> None:
        datamodule = datamodule_of(trainer)
        if self._before_pass is not None and datamodule is not None:
            datamodule.remove_before_pass(self._before_pass)
        self._before_pass = None

    @property
    def state_key(self) -> str:
        """The key of the state in a checkpoint: a run can have one callback for each side."""
        return f"Regeneration[side={self.side}]"

    def state_dict(self) -> dict[str, int | None]:
        """The number of steps of the weights that a server has written with."""
        return {} if self.server is None else {"written_at": self.written_at}

    def load_state_dict(self, state_dict: dict[str, int | None]) -> None:
        """Restore that number: a run that is resumed within a pass continues with its responses."""
        self.written_at = state_dict.get("written_at")

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object) -> None:
        """Log the age of the responses that a server has written with the student's weights."""
        if self.written_at is not None:
            age = float(trainer.global_step - self.written_at)
            pl_module.log("train/staleness", torch.full((), age, device=pl_module.device))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object) -> None:
        """Log the share of the run's time that was spent on generation, by all these callbacks together."""
        every = [part for part in trainer.callbacks if isinstance(part, Regeneration)]  # type: ignore[attr-defined]
        if every[0] is self:
            share = sum(part.seconds for part in every) / (time.perf_counter() - self._start)
            pl_module.log("train/regenerate_share", torch.full((), share, device=pl_module.device))

    def generate_pass(self, trainer: L.Trainer, module: L.LightningModule, number: int) -> None:
        """Generate the responses of a pass and give them to the data module.

        Args:
            trainer: the Trainer of the run.
            module: the module, with student and teacher loaded.
            number: number of the pass, from 0.

        Raises:
            ValueError: no row has a response to train on.
        """
        datamodule = self._datamodule(trainer)
        if self.when == "once" and number > 0:
            return
        every_row = datamodule.generation_rows("train", role=self.side)
        missing = set(datamodule.missing_responses(self.side))
        rows = [row for row in every_row if row["index"] in missing] if self.when == "once" else every_row
        if not rows:
            return
        responses = self._generate(trainer, module, rows, number)
        texts = {
            index: response.text for index, response in responses.items() if self.keep_unfinished or response.finished
        }
        if len(missing) == len(every_row) and not any(text.strip() for text in texts.values()):
            raise ValueError(
                f"the {self.side} generated no response to train on with max_new_tokens "
                f"{self.sampling.max_new_tokens}: {summary(list(responses.values()))}"
            )
        datamodule.replace_responses(texts, self.side)
        teacher = student_and_teacher(module).teacher
        for text in check_models_fit_data(models_of_run(student_of(module), teacher), datamodule):
            rank_zero_warn(text)
        if not is_fast_dev_run(trainer):
            folder = Path(trainer.default_root_dir) / "responses"
            self._generator(trainer, module).file_path(trainer, folder, number - 1).unlink(missing_ok=True)

    def _generate(
        self, trainer: L.Trainer, module: L.LightningModule, rows: list[GenerationRow], number: int
    ) -> dict[int, Response]:
        """Generate with the time measured, and log what was generated."""
        start = time.perf_counter()
        in_process = self.side == "teacher" and self.server is None
        if in_process and (teacher := student_and_teacher(module).teacher) is not None:
            teacher.to(module.device)
        with _folder(trainer) as folder, forward_context(trainer):
            if self.server is not None and self.side == "student":
                step = trainer.global_step
                root = folder if is_fast_dev_run(trainer) else folder.parent
                self.server.publish(student_of(module), step, root, rows[0]["prompt_ids"])
                self.written_at = step
            responses = self._generator(trainer, module).responses(trainer, rows, folder, number)
        seconds = time.perf_counter() - start
        self.seconds += seconds
        rank_zero_info(f"{self.side}, pass {number}: {summary(list(responses.values()))}, {seconds:.0f} s")
        scalars = {f"train/{self.side}_{name}": value for name, value in _figures(responses.values()).items()}
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step)
        return responses

    def _generator(self, trainer: L.Trainer, module: L.LightningModule) -> ResponsePass:
        datamodule = self._datamodule(trainer)
        if self.server is not None:
            return ServedPass(self.side, self.server, self.sampling, datamodule, self._served_student(module))
        model = self._model(module)
        return PassGenerator(self.side, model, datamodule, self.sampling, self.batch_size, module.device)

    def _served_student(self, module: L.LightningModule) -> PreTrainedModel | None:
        """The student if a server generates with its weights, else None."""
        return student_of(module) if self.side == "student" else None

    @staticmethod
    def _datamodule(trainer: L.Trainer) -> DistillationDataModule:
        """The data module that takes the responses.

        Raises:
            ValueError: it accepts none.
        """
        datamodule = datamodule_of(trainer)
        if datamodule is None or not datamodule.accepts_responses:
            given = trainer.datamodule  # type: ignore[attr-defined]
            kind = "none" if given is None else type(given).__name__
            raise ValueError(f"Regeneration needs a PromptDataModule or a ContrastiveDataModule, got {kind}")
        return datamodule

    def _model(self, module: L.LightningModule) -> PreTrainedModel:
        """The model that generates.

        Raises:
            ValueError: it is not in this process.
        """
        if self.side == "student":
            return student_of(module)
        pair = student_and_teacher(module)
        model = teacher_model(pair)
        if model is None:
            kind = "none" if pair.teacher is None else type(pair.teacher).__name__
            raise ValueError(
                f"Regeneration with side='teacher' needs a teacher that can generate (a model in this process), "
                f"got {kind}"
            )
        return model


def _figures(responses: Collection[Response]) -> dict[str, float]:
    lengths = [response.tokens for response in responses if response.tokens] or [0]  # a resumed file has no lengths
    return {
        "response_length": sum(lengths) / len(lengths),
        "finished": sum(response.finished for response in responses) / len(responses),
        "empty": sum(not response.text.strip() for response in responses) / len(responses),
    }


@contextmanager
def _folder(trainer: L.Trainer) -> Iterator[Path]:
    """The folder of the responses; a temporary one in a `fast_dev_run`."""
    if is_fast_dev_run(trainer):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    yield Path(trainer.default_root_dir) / "responses"
