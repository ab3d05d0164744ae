"""What the program does beside the trainer's verbs: a file a command, each with `main(words)`."""

from __future__ import annotations

import argparse
from typing import NoReturn


class CommandParser(argparse.ArgumentParser):
    """A parser that raises a ValueError in the place of leaving the program."""

    def error(self, message: str) -> NoReturn:
        """Raise it."""
        raise ValueError(message)
