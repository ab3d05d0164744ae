"""Ranks that were started with another configuration, or that read other rows, than rank 0: refused before step 0."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any, TypeVar

import torch.distributed as dist

SAMPLE = 1000  # rows of a split whose text is compared; of all others only the lengths


T = TypeVar("T")


def gathered(mine: T, ranks: int) -> list[T]:
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


def check_same(mine: Mapping[str, str]) -> None:
    """Compare what every rank says of itself with what rank 0 says; called by all ranks, or by the only one.

    Args:
        mine: texts by what they describe.

    Raises:
        ValueError: on every rank alike, with the rank, what it describes and the first line that differs.
    """
    everyone = gathered(dict(mine), dist.get_world_size() if dist.is_initialized() else 1)
    for rank, other in enumerate(everyone):
        for name in sorted(other.keys() | everyone[0].keys()):
            theirs, first = other.get(name, ""), everyone[0].get(name, "")
            if theirs != first:
                pairs = zip_longest(theirs.splitlines(), first.splitlines(), fillvalue="nothing")
                line, wanted = next((a.strip(), b.strip()) for a, b in pairs if a != b)
                raise ValueError(
                    f"all ranks must have the same {name}: rank {rank} has {line!r} where rank 0 has {wanted!r}"
                )


def describe_rows(rows: Any) -> str:
    """A split in one line that changes with its rows: their number and a digest of their lengths and of some texts.

    Args:
        rows: a `datasets.Dataset` with the column `row`, and `length` where it is known yet.
    """
    lengths = rows["length"][:] if "length" in rows.column_names else []
    found = hashlib.sha256(str(lengths).encode())
    some = rows.select(range(0, len(rows), -(-len(rows) // SAMPLE) or 1))
    for text in some["row"][:]:
        found.update(text.encode())
    return f"{len(rows)} rows with digest {found.hexdigest()[:12]}"
