"""The teacher of a run, replaced by a cache of its outputs before the first step."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as L
import torch

from kd_lightning.console import progress_bar_enabled
from kd_lightning.data.base import datamodule_of
from kd_lightning.distributed.collectives import sum_over_ranks
from kd_lightning.distributed.trainer import forward_context
from kd_lightning.teachers.base import Teacher
from kd_lightning.teachers.cache_writer import Ranks, cache_teacher


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
