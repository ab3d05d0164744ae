"""The teacher of a run: its tokenizers, its part of the checkpoint, its members, and the cache that may replace it."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from transformers import PreTrainedTokenizerBase

from kd_lightning.console import progress_bar_enabled
from kd_lightning.data.base import DistillationDataModule, datamodule_of, tokenizer_of
from kd_lightning.distributed.collectives import sum_over_ranks
from kd_lightning.distributed.trainer import forward_context
from kd_lightning.losses.arguments import check_aligned
from kd_lightning.models.loading import check_tokenizers
from kd_lightning.teachers.base import RunContext, Teacher
from kd_lightning.teachers.cache_writer import Ranks, cache_teacher
from kd_lightning.training.reporter import EvaluationReporter
from kd_lightning.training.student import StudentWithLoss


def check_teacher_tokenizers(
    teacher: Teacher | None, tokenizer: PreTrainedTokenizerBase | None, two_tokenizers: bool = False
) -> None:
    """Check that every teacher with a tokenizer of its own has the tokens that the data has for it.

    Args:
        teacher: None: there is none.
        tokenizer: of the teacher's input; None: unknown.
        two_tokenizers: whether that is another one than the student's.

    Raises:
        ValueError: a token differs; the teacher is the student itself, and has the student's tokenizer.
    """
    if teacher is None or tokenizer is None:
        return
    if two_tokenizers and (teacher.shares_student or teacher.starts_as_student):
        raise ValueError(
            f"teacher_tokenizer must not be given with a {type(teacher).__name__}: the teacher is the student itself"
        )
    for member in teacher.members.values():
        if member.name is not None:
            check_tokenizers(member.name, tokenizer)


def load_teacher(teacher: Teacher, run: RunContext) -> nn.Module | None:
    """Attach the teacher to a run and load it.

    Returns:
        Its tensors that belong into the checkpoint; None if there are none.
    """
    teacher.attach(run)
    teacher.load()
    return teacher.state


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
    if data is None or not data.has_two_tokenizers:
        check_teacher_tokenizers(teacher, tokenizer_of(trainer))
        return
    use_two_tokenizers(data, teacher, model, reporter)
    if teacher is not None:
        text, few = alignment_notice(data)
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
    check_teacher_tokenizers(teacher, data.teacher_tokenizer, two_tokenizers=True)
    if teacher is None:
        return
    known = data.vocabulary_map
    model.use_vocabulary_map(known)
    reporter.use_two_tokenizers()
    for loss in (model.loss, reporter.loss):
        check_aligned(loss.token_loss, {}, known is not None and known.has_rest)


def alignment_notice(data: DistillationDataModule) -> tuple[str, bool]:
    """What two tokenizers share, as one line, and whether little is reached.

    Args:
        data: with two tokenizers, and with its rows loaded.
    """
    known = ((name, data.tokenizer_shares(name)) for name in ("val", "train", "test") if name in data.splits)
    split, shares = next(((name, found) for name, found in known if found is not None), ("", None))
    if shares is None:
        text = "two tokenizers: how many labels are compared with the teacher depends on the responses of the run"
        return text, False
    text = (
        f"two tokenizers: {shares.aligned_labels:.0%} of the student's labels ({split}) are compared with the teacher, "
        f"where both have read the same text; {shares.student_labels:.0%} of them have a partner in the teacher's "
        "vocabulary, all other tokens are compared as one"
    )
    return text, shares.aligned_labels < FEW_LABELS
