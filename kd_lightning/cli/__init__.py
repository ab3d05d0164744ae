"""The `kd-lightning` program."""

from kd_lightning.cli.program import main

__all__ = ["main"]
