"""The teacher of a run before the first step: its tokenizers, its part of the checkpoint, its members."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from kd_lightning.engine.label_mask import next_token_mask
from kd_lightning.models.loading import check_tokenizers
from kd_lightning.teachers.base import RunContext, Teacher


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
