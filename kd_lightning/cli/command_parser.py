"""The commands of the program, and the parser of those that are not LightningCLI's."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from kd_lightning.paths import expand_path

TRAINER_COMMANDS = {
    "fit": "Distill a student, evaluate it on the test rows, and export it under --trainer.default_root_dir.",
    "validate": "Evaluate a student on the validation rows.",
    "test": "Evaluate a student on the test rows.",
    "predict": "Generate a student's responses for the test rows.",
}


# Each is a module of `kd_lightning.cli` with `main(args) -> exit status or None`.
OTHER_COMMANDS = {
    "generate": "generate responses to a file of prompts, with a model or a server",
    "preflight": "check a run for common misconfigurations before it starts",
    "compare": "compare finished or running runs",
    "cache": "cache the teacher's outputs for the data",
    "prune": "cut a smaller model out of a larger one: fewer layers, narrower MLPs",
    "plan": "estimate the memory of a run on each of many ranks, without the hardware",
}


class CommandParser(argparse.ArgumentParser):
    """A parser that raises a ValueError instead of exiting."""

    def error(self, message: str) -> NoReturn:
        """Raise it."""
        raise ValueError(message)


def path_argument(text: str) -> Path:
    """The type of arguments that are paths: `~` and `$VAR` are expanded."""
    try:
        return Path(expand_path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
