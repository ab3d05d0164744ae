"""The teacher as a part of the mixture that responses are sampled from."""

from __future__ import annotations

from typing import Any

from kd_lightning.distributed.dtensor import is_sharded
from kd_lightning.teachers.base import Teacher, generating_model


def unsharded_model(teacher: Teacher | None) -> Any:
    """The teacher's model, unsharded, for sampling from a mixture with it.

    Raises:
        ValueError: the teacher cannot generate, or is sharded.
    """
    model = generating_model(teacher)
    if model is None:
        kind = "no teacher" if teacher is None else type(teacher).__name__
        raise ValueError(f"teacher_share must be 0 unless the teacher can generate: it must be a model, got {kind}")
    if any(is_sharded(parameter) for parameter in model.parameters()):
        # generation keeps running the sharded student on ranks that are done, but not the teacher
        raise ValueError("teacher_share must be 0 if the strategy shards the teacher (fsdp2): use ddp")
    return model
