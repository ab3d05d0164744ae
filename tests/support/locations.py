"""Where things are: the project, the golden numbers, the helper programs of the tests."""

from __future__ import annotations

from pathlib import Path

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]
GOLDEN = SUPPORT.parent / "golden"
