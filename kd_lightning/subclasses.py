"""Concrete subclasses of a base class, found by Python itself: there is no registry."""

from __future__ import annotations


def concrete_subclasses(base: type) -> set[type]:
    """Every class below `base` that can be built."""
    below: set[type] = set()
    child: type
    for child in type.__subclasses__(base):
        below |= {child, *concrete_subclasses(child)}
    return {leaf for leaf in below if not getattr(leaf, "__abstractmethods__", None)}
