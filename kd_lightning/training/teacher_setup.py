"""The teacher of a run: its tokenizers, its part of the checkpoint, its members, and the cache that may replace it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from kd_lightning.console import progress_bar_enabled
from kd_lightning.data.base import datamodule_of
from kd_lightning.distributed.collectives import sum_over_ranks
from kd_lightning.distributed.trainer import forward_context
from kd_lightning.engine.label_mask import next_token_mask
from kd_lightning.models.loading import check_tokenizers
from kd_lightning.teachers.base import RunContext, Teacher
from kd_lightning.teachers.cache_writer import Ranks, cache_teacher


def check_teacher_tokenizers(teacher: Teacher | None, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Check that every teacher with a tokenizer of its own has the tokens of the data.

    Raises:
        ValueError: a token differs.
    """
    if teacher is None or tokenizer is None:
        return
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


def member_names(teacher: Teacher | None) -> tuple[str, ...]:
    """Names of the teachers that a teacher is made of; empty if it is not made of others."""
    return () if teacher is None else tuple(name for name in teacher.members if name)


def tokens_by_member(teacher: Teacher | None, batch: Mapping[str, Tensor]) -> Sequence[Tensor]:
    """For each of `member_names`, which labeled tokens of a batch it teaches, [N] each."""
    index = None if teacher is None else teacher.member_indices(batch)
    if index is None or teacher is None:
        return ()
    labeled = next_token_mask(batch["labels"])
    own = index.unsqueeze(1).expand_as(labeled)[labeled]
    return [own == number for number in range(len(teacher.members))]


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
