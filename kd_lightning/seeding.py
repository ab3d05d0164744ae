"""Seeds that depend only on the seed of the run and on the position in it."""

from __future__ import annotations

import hashlib
import os


def run_seed() -> int:
    """The seed of the run, set by `seed_everything`; 0 if none is set."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def derive_seed(*parts: object) -> int:
    """An integer in [0, 2⁵⁶) that depends on all of `parts`, in their order."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big")
