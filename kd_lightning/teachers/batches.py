"""A batch as teachers read it, which of its tokens each of several teachers teaches, and the models of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kd_lightning.constants import IGNORE_INDEX, TEACHER_POSITIONS, teacher_view
from kd_lightning.engine.label_mask import next_token_mask
from kd_lightning.teachers.base import Teacher


def teacher_batch(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The batch as a teacher reads it, with a label wherever its distribution is read.

    Args:
        batch: of the data; with two tokenizers the column `TEACHER_POSITIONS` says where the teacher is read.
    """
    view = teacher_view(batch)
    if TEACHER_POSITIONS not in batch:
        return view
    positions, labels = batch[TEACHER_POSITIONS], view["labels"]
    paired = (positions >= 0) & (batch["labels"] != IGNORE_INDEX)
    read = torch.zeros_like(labels).scatter_add_(1, positions.clamp_min(0), paired.to(labels.dtype)) > 0
    return {**view, "labels": torch.where(read, view["input_ids"], labels)}


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


class ModelOfRun(NamedTuple):
    """A model in this process.

    Args:
        role: what messages call it.
        model: a Hugging Face causal LM.
        member: name of the teacher if there are several, else "".
    """

    role: str
    model: nn.Module
    member: str = ""


def models_of_run(student: nn.Module, teacher: Teacher | None) -> list[ModelOfRun]:
    """The student, and the teachers' models in this process."""
    members = {} if teacher is None else teacher.members
    return [
        ModelOfRun("student", student),
        *(
            ModelOfRun(f"teacher {name!r}" if name else "teacher", member.model, name)
            for name, member in members.items()
            if member.model is not None
        ),
    ]
