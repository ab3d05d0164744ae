"""Collectives over Python objects and tensors, and a check that all ranks agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import zip_longest
from typing import TypeVar, cast

import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor

T = TypeVar("T")


def all_gather_objects(value: T, ranks: int) -> list[T]:
    """The values of all ranks, in their order, on every rank. A collective: all ranks must call it.

    Args:
        value: of this rank; can be pickled.
        ranks: number of ranks; 1: nothing is sent.
    """
    if ranks == 1:
        return [value]
    gathered = [value] * ranks
    dist.all_gather_object(gathered, value)
    return gathered


def on_first_rank(action: Callable[[], T]) -> T:
    """The result of an action that rank 0 alone performs, on every rank. A collective: all ranks must call it.

    Args:
        action: its result can be pickled.

    Raises:
        ValueError: on every rank: the action raised a ValueError or an OSError on rank 0.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return action()
    outcome: tuple[T | None, str | None] = (None, None)
    if dist.get_rank() == 0:
        try:
            outcome = (action(), None)
        except (ValueError, OSError) as error:
            outcome = (None, str(error))
    result, message = all_gather_objects(outcome, dist.get_world_size())[0]
    if message is not None:
        raise ValueError(message)
    return cast(T, result)


def check_ranks_agree(values: Mapping[str, str]) -> None:
    """Check that all ranks have the same values. A collective: all ranks must call it.

    Args:
        values: texts by what they describe.

    Raises:
        ValueError: on every rank, with the rank, the name of the value and the first line that differs.
    """
    everyone = all_gather_objects(dict(values), dist.get_world_size() if dist.is_initialized() else 1)
    for rank, other in enumerate(everyone):
        for name in sorted(other.keys() | everyone[0].keys()):
            theirs, first = other.get(name, ""), everyone[0].get(name, "")
            if theirs != first:
                pairs = zip_longest(theirs.splitlines(), first.splitlines(), fillvalue="nothing")
                line, wanted = next((a.strip(), b.strip()) for a, b in pairs if a != b)
                raise ValueError(
                    f"all ranks must have the same {name}: rank {rank} has {line!r} where rank 0 has {wanted!r}"
                )


def sum_over_ranks(trainer: Trainer | None) -> Callable[[Tensor], Tensor]:
    """A function that sums a tensor over all ranks, with the result on the CPU. All ranks must call that function.

    Args:
        trainer: of the run; None, or a run of one process: tensors are returned as they are.
    """
    if trainer is None or trainer.world_size == 1 or not dist.is_initialized():
        return lambda x: x
    strategy = trainer.strategy

    def total(x: Tensor) -> Tensor:
        summed: Tensor = strategy.reduce(x.to(strategy.root_device), reduce_op="sum")
        return summed.cpu()

    return total
