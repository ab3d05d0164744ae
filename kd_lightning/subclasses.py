"""Concrete subclasses of a base class, from Python's own record: no registry is needed."""

from __future__ import annotations

import inspect


def concrete_subclasses(base: type) -> set[type]:
    """Every subclass of `base`, at any depth, that can be instantiated."""
    below: set[type] = set()
    child: type
    for child in type.__subclasses__(base):
        below |= {child, *concrete_subclasses(child)}
    return {leaf for leaf in below if not inspect.isabstract(leaf)}
