"""The program `kd-lightning`: commands, and errors as one line. Importing it stays cheap."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kd_lightning.cli.command_parser import OTHER_COMMANDS, TRAINER_COMMANDS
from kd_lightning.cli.configs import expand_configs
from kd_lightning.cli.error_messages import did_you_mean, expected, explain
from kd_lightning.console import (
    quiet_writer_threads,
    silence_known_warnings,
    use_any_console_encoding,
    use_plain_progress_bars,
)
from kd_lightning.distributed.signals import Terminated, end_on_sigterm, exit_status
from kd_lightning.reporting.redaction import print_message, redact_messages

if TYPE_CHECKING:  # both take seconds to import
    from jsonargparse import Namespace

    from kd_lightning.cli.trainer_cli import TrainerCLI


def run(args: Sequence[str], start: bool = True, change: Callable[[Namespace], None] | None = None) -> TrainerCLI:
    """Parse one of the Trainer's commands and run it.

    Args:
        args: arguments of the command line.
        start: False: only build `model`, `datamodule` and `trainer`, for a command that accepts all `fit` options.
        change: is called with the parsed configuration, and may change it, before objects are built from it.

    Returns:
        The LightningCLI with these three.

    Raises:
        ValueError: an argument is unknown or invalid.
    """
    silence_known_warnings()
    from kd_lightning.cli.trainer_cli import TrainerCLI

    redact_messages()  # again: Lightning sets the format of warnings when it is imported
    return TrainerCLI(expand_configs(args), start=start, change=change)


def main(args: Sequence[str] | None = None) -> int:
    """Entry point: 0 on success; 1, and one line on stderr, on an error that the user can fix.

    SIGTERM ends the program with status 143, Ctrl-C with 130 (`fit`: 1).

    Args:
        args: arguments of the command line; None: those of the process. `--debug` (or KD_LIGHTNING_DEBUG=1) shows
            tracebacks.
    """
    args = list(sys.argv[1:] if args is None else args)
    use_any_console_encoding()
    redact_messages()
    try:
        here = os.getcwd()
    except OSError as error:
        reason = f"the current folder cannot be read ({error.strerror}): it may have been deleted"
        print_message(f"kd-lightning: error: {reason}; change to another folder", sys.stderr)
        return 1
    if here not in sys.path:
        sys.path.append(here)  # for custom classes in the current folder; last, so that it shadows nothing
    use_plain_progress_bars()
    _let_waiting_threads_sleep()
    debug = "--debug" in args or os.environ.get("KD_LIGHTNING_DEBUG", "0") not in ("", "0")
    try:
        with end_on_sigterm("terminated by SIGTERM"), quiet_writer_threads():
            return _dispatch([_as_utf8(word) for word in args if word != "--debug"])
    except Terminated as end:
        if end.message:
            print_message(f"kd-lightning: {end.message}", sys.stderr)
        raise
    except KeyboardInterrupt as end:
        print_message("kd-lightning: interrupted", sys.stderr)
        return exit_status(end)
    except Exception as error:
        if debug or not expected(error):
            raise
        text = _not_a_file_name(error) if isinstance(error, UnicodeEncodeError) else explain(error)
        print_message(f"kd-lightning: error: {text}", sys.stderr)
        return 1


def _as_utf8(word: str) -> str:
    """An argument as text; in a locale that is not UTF-8, Python reads its bytes otherwise.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        word.encode()
        return word
    except UnicodeEncodeError:
        pass
    try:
        return os.fsencode(word).decode()
    except UnicodeError:
        raise ValueError(f"argument {word!r} is not UTF-8: rename the file, or write the value in UTF-8") from None


def _not_a_file_name(error: UnicodeEncodeError) -> str:
    shown = error.object[max(error.start - 40, 0) : error.start + 40]
    if sys.getfilesystemencoding() == "utf-8":
        return f"{shown!r} holds half of a character, which UTF-8 cannot write: correct it"
    return f"{shown!r} cannot be a file name in this locale: set the environment variable PYTHONUTF8=1"


def _let_waiting_threads_sleep() -> None:
    """Make OpenMP threads wait asleep, unless the user has said how they wait. Before the first import of torch.

    By default they spin, which on cores shared with other work keeps the thread that they wait for from running. GNU's
    runtime keeps a short spin (its default is 300,000 turns): a thread that sleeps at once costs more than half of a
    step of a small model on an idle machine, 10,000 turns cost nothing there.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
        os.environ.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="10000")


def _dispatch(args: list[str]) -> int:
    """Run the command that the first argument names.

    Raises:
        ValueError: there is no such command, or it refuses its arguments.
    """
    names = [*TRAINER_COMMANDS, *OTHER_COMMANDS]
    if not args:
        raise ValueError(f"missing command: pass one of {', '.join(names)} (`kd-lightning --help` describes them)")
    command = args[0]
    if command in OTHER_COMMANDS:
        module = importlib.import_module(f"kd_lightning.cli.{command}")
        redact_messages()  # as in `run`
        return module.main(args[1:]) or 0
    if not command.startswith("-") and command not in TRAINER_COMMANDS:
        hint = did_you_mean(command, names)
        raise ValueError(f"unknown command {command!r}{hint}: the commands are {', '.join(names)}")
    run(args)
    return 0
