"""The program with a new shard for every batch, for a test that kills it between two."""

from __future__ import annotations

import sys
import time
from typing import Any

from kd_lightning.cli.program import main
from kd_lightning.teachers import cache_format as teacher_cache

add = teacher_cache.CacheWriter.add


def add_and_write(self: Any, *args: Any) -> None:
    add(self, *args)
    self.flush()
    time.sleep(0.2)


if __name__ == "__main__":
    teacher_cache.CacheWriter.add = add_and_write  # type: ignore[method-assign]
    sys.exit(main(sys.argv[1:]))
