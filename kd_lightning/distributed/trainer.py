"""What this package reads from a Lightning Trainer."""

from __future__ import annotations

from lightning.pytorch import Trainer


def data_parallel_rank(trainer: Trainer) -> tuple[int, int]:
    """This process among those that read different rows: its number, and how many there are."""
    kwargs = trainer.distributed_sampler_kwargs or {}
    return kwargs.get("rank", 0), kwargs.get("num_replicas", 1)
