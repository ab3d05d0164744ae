"""Paths as users write them."""

from __future__ import annotations

import os
import re

VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def expand_path(path: str) -> str:
    """A path with `~` and environment variables (`$VAR`, `${VAR}`) expanded; every path argument passes through here.

    A path that exists as it is written, and any other text without `~` and `$`, is returned unchanged.

    Raises:
        ValueError: an environment variable is not set.
    """
    if ("~" not in path and "$" not in path) or os.path.exists(path):
        return path
    for plain, braces in VARIABLE.findall(path):
        if (name := plain or braces) not in os.environ:
            raise ValueError(f"{path}: the environment variable {name} is not set: set it, or write the path in full")
    return os.path.expanduser(os.path.expandvars(path))
