"""The teacher of a run: its tokenizers, its part of the checkpoint, its members, and the cache that may replace it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from kd_lightning.console import progress_bar_enabled
from kd_lightning.data.alignment.two_tokenizers import TeacherTokenizers, TwoTokenizers
from kd_lightning.data.base import DistillationDataModule, datamodule_of, tokenizer_of
from kd_lightning.distributed.collectives import sum_over_ranks
from kd_lightning.distributed.trainer import forward_context
from kd_lightning.losses.arguments import check_aligned
from kd_lightning.models.compatibility import check_models_fit_data
from kd_lightning.models.loading import check_tokenizers
from kd_lightning.teachers.base import RunContext, Teacher
from kd_lightning.teachers.batches import models_of_run
from kd_lightning.teachers.cache_writer import Ranks, cache_teacher
from kd_lightning.training.reporter import EvaluationReporter
from kd_lightning.training.student import StudentWithLoss


def tokenizers_of(teacher: Teacher | None) -> str | TeacherTokenizers | None:
    """Folder or hub name of the teacher's tokenizer, or those of several teachers; None if it has none of its own."""
    if teacher is None or teacher.column is None:
        return None if teacher is None else teacher.name
    names = {name: member.name for name, member in teacher.members.items()}
    return TeacherTokenizers(names, teacher.column, teacher.default)


def check_teacher_tokenizers(teacher: Teacher | None, data: TwoTokenizers) -> None:
    """Check that every teacher with a tokenizer of its own has the tokens that the data has for it.

    Args:
        teacher: None: there is none.
        data: the rows, as the teachers read them.

    Raises:
        ValueError: a token differs; the teacher is the student itself, and has the student's tokenizer.
    """
    for name, member in ({} if teacher is None else teacher.members).items():
        own = data.for_member(name)
        if own.has_two_tokenizers and (member.shares_student or member.starts_as_student):
            raise ValueError(
                f"teacher_tokenizer must not be given {'for' if name else 'with'} a {type(member).__name__}: the "
                "teacher is the student itself"
            )
        if member.name is not None:
            check_tokenizers(member.name, own.teacher_tokenizer)


def load_teacher(teacher: Teacher | None, run: RunContext, data: DistillationDataModule | None) -> nn.Module | None:
    """Attach the teacher to a run, load it, and check that all models of the run can read every loaded row.

    Args:
        teacher: None: there is none.
        run: the run, with its student loaded.
        data: None: a custom data module, of which nothing is checked.

    Returns:
        The teacher's tensors that belong into the checkpoint; None if there are none.

    Raises:
        ValueError: a model cannot read a row.
    """
    if teacher is not None:
        teacher.attach(run)
        teacher.load()
    for text in check_models_fit_data(models_of_run(run.student.student, teacher), data):
        rank_zero_warn(text)
    return None if teacher is None else teacher.state


def cached_teacher(trainer: L.Trainer, teacher: Teacher, student_vocabulary: int, device: torch.device) -> Teacher:
    """The teacher, read from `ROOT/teacher_cache`, which is written first.

    Args:
        trainer: of a run that has started.
        teacher: on its device.
        student_vocabulary: number of logits of the student.
        device: of the run.

    Raises:
        ValueError: the data module is not one of this package, or the folder is another teacher's cache.
    """
    datamodule = datamodule_of(trainer)
    if datamodule is None:
        raise ValueError("teacher_cache needs a data module of this package, got a custom one or none")
    if datamodule.sources["test"] and trainer.limit_test_batches != 0:
        datamodule.setup("test")
    folder = Path(trainer.default_root_dir) / "teacher_cache"
    ranks, bar = Ranks(trainer.global_rank, sum_over_ranks(trainer)), progress_bar_enabled(trainer)
    with forward_context(trainer):
        return cache_teacher(folder, teacher, datamodule, student_vocabulary, device, ranks, bar)


FEW_LABELS = 0.3
"""Share of the labels that are compared with the teacher below which a run is warned."""


def compare_tokenizers(
    trainer: L.Trainer, teacher: Teacher | None, model: StudentWithLoss, reporter: EvaluationReporter
) -> None:
    """Compare the tokenizers of teacher and student.

    If they are two, the distributions are compared on the tokens that both vocabularies share, where both models have
    read the same text; one line says how much is reached, as a warning if it is little.

    Args:
        trainer: of the run, with its rows loaded.
        teacher: None: there is none.
        model: the student with the training loss.
        reporter: of the run.

    Raises:
        ValueError: the teacher has another tokenizer than the data has for it, or the loss or a monitor cannot be
            computed between two vocabularies.
    """
    data = datamodule_of(trainer)
    if data is None:  # a custom data module
        tokenizer, members = tokenizer_of(trainer), {} if teacher is None else teacher.members
        for member in members.values():
            if tokenizer is not None and member.name is not None:
                check_tokenizers(member.name, tokenizer)
        return
    if not data.has_two_tokenizers:
        check_teacher_tokenizers(teacher, data)
        return
    use_two_tokenizers(data, teacher, model, reporter)
    for text, few in alignment_notices(data, teacher):
        (rank_zero_warn if few else rank_zero_info)(text)


def use_two_tokenizers(
    data: DistillationDataModule, teacher: Teacher | None, model: StudentWithLoss, reporter: EvaluationReporter
) -> None:
    """Compare the distributions on the tokens that both vocabularies share, where both have read the same text.

    Args:
        data: with two tokenizers, and with its rows loaded.
        teacher: None: there is none, and nothing to compare.
        model: the student with the training loss.
        reporter: of the run.

    Raises:
        ValueError: as in `compare_tokenizers`.
    """
    check_teacher_tokenizers(teacher, data)
    if teacher is None:
        return
    maps = {name: data.for_member(name).vocabulary_map for name in teacher.members}
    for name, known in maps.items():
        model.use_vocabulary_map(known, name)
    reporter.use_two_tokenizers()
    for loss in (model.loss, reporter.loss):
        check_aligned(loss.token_loss, {}, any(known is not None and known.has_rest for known in maps.values()))


def alignment_notices(data: DistillationDataModule, teacher: Teacher | None) -> Iterator[tuple[str, bool]]:
    """What the student and each teacher with another tokenizer share, as one line, and whether little is reached.

    Args:
        data: with two tokenizers, and with its rows loaded.
        teacher: None: there is none.
    """
    for name in {} if teacher is None else teacher.members:
        own = data.for_member(name)
        known = ((split, own.tokenizer_shares(split)) for split in ("val", "train", "test") if split in own.splits)
        split, shares = next(((split, found) for split, found in known if found is not None), ("", None))
        subject = f"two tokenizers, teacher {name!r}" if own is not data else "two tokenizers"
        if shares is None and own.has_two_tokenizers:
            yield f"{subject}: how many labels are compared with it depends on the responses of the run", False
        if shares is not None:
            text = (
                f"{subject}: {shares.aligned_labels:.0%} of the student's labels ({split}) are compared with the "
                f"teacher, where both have read the same text; {shares.student_labels:.0%} of them have a partner in "
                "the teacher's vocabulary, all other tokens are compared as one"
            )
            yield text, shares.aligned_labels < FEW_LABELS
        if own is data:
            return
