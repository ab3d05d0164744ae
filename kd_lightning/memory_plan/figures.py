"""The figures of a plan."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Holding:
    """Bytes of one model on one rank."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    buffers: int = 0


@dataclass
class Plan:
    """Memory and communication of one rank, the first, in one step; in bytes.

    Args:
        ranks: number of ranks.
        strategy: `fsdp2`, `ddp` or `one device`.
        batch: rows of a micro-batch on a rank, and tokens of each row, all of them labeled.
        student: memory held from step to step.
        teacher: the same; it has no gradients and no optimizer state.
        host: the part of all memory that is in host memory.
        activations: peak of tensors kept for backward, and of temporaries.
        gathered: peak of parameters gathered from other ranks, and of communication buffers.
        tiles: peak of the engine's logits.
        buckets: DDP's copy of the gradients.
        peak: peak of the total; less than the sum of the single peaks, which occur at different times.
        collectives: by name, the count per step, and bytes (of the gathered or the scattered tensor).
        notes: what the figures do not include.
    """

    ranks: int
    strategy: str
    batch: tuple[int, int]
    student: Holding = field(default_factory=Holding)
    teacher: Holding = field(default_factory=Holding)
    host: int = 0
    activations: int = 0
    gathered: int = 0
    tiles: int = 0
    buckets: int = 0
    peak: int = 0
    collectives: dict[str, dict[str, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain dicts and lists."""
        return asdict(self)
