"""Collectives over Python objects and tensors, and checks that all ranks agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def all_gather_objects(mine: T, ranks: int) -> list[T]:
    """What every rank gives, in the order of ranks, on every rank; all of them must ask, or the only one.

    Args:
        mine: this rank's; can be pickled.
        ranks: how many there are.
    """
    if ranks == 1:
        return [mine]
    found: list[Any] = [None] * ranks
    dist.all_gather_object(found, mine)
    return found


def check_ranks_agree(mine: Mapping[str, str]) -> None:
    """Compare what every rank says of itself with what rank 0 says; called by all ranks, or by the only one.

    Args:
        mine: texts by what they describe.

    Raises:
        ValueError: on every rank alike, with the rank, what it describes and the first line that differs.
    """
    everyone = all_gather_objects(dict(mine), dist.get_world_size() if dist.is_initialized() else 1)
    for rank, other in enumerate(everyone):
        for name in sorted(other.keys() | everyone[0].keys()):
            theirs, first = other.get(name, ""), everyone[0].get(name, "")
            if theirs != first:
                pairs = zip_longest(theirs.splitlines(), first.splitlines(), fillvalue="nothing")
                line, wanted = next((a.strip(), b.strip()) for a, b in pairs if a != b)
                raise ValueError(
                    f"all ranks must have the same {name}: rank {rank} has {line!r} where rank 0 has {wanted!r}"
                )


def sum_over_ranks(trainer: Any) -> Callable[[Tensor], Tensor]:
    """Sums a tensor over the ranks; every rank must ask."""
    if trainer is None or trainer.world_size == 1 or not torch.distributed.is_initialized():
        return lambda x: x

    def total(x: Tensor) -> Tensor:
        summed: Tensor = trainer.strategy.reduce(x.to(trainer.strategy.root_device), reduce_op="sum")
        return summed.cpu()

    return total
