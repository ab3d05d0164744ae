"""A user's function that says how good a response is."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from kd_lightning.data.base import GenerationRow

ScoreFunction = Callable[[str, Mapping[str, Any]], float]
"""Takes a response and its row with all fields; returns a number in [0, 1]."""


class ResponseScorer:
    """Scores responses by a function `(response, row) -> number in [0, 1]`, such as a verifier of answers.

    Args:
        function: the function, or its dotted path such as `my_file.my_function`, relative to the current folder.
        argument: the argument that names it, for messages.

    Raises:
        ValueError: there is no such function, or it cannot be called.
    """

    def __init__(self, function: str | ScoreFunction, argument: str) -> None:
        self._argument = argument
        self.function: ScoreFunction = _imported(function, argument) if isinstance(function, str) else function
        if not callable(self.function):
            raise ValueError(f"{argument} must be a function (response, row), got {function!r}")
        self.name = function if isinstance(function, str) else str(getattr(function, "__name__", function))

    def check(self, row: GenerationRow) -> None:
        """Call it once, on the reference answer of a row.

        Raises:
            ValueError: see `score`.
        """
        self.score(row["answer"], row)

    def score(self, response: str, row: GenerationRow) -> float:
        """The score of a response.

        Raises:
            ValueError: the function fails, or returns something else than a number in [0, 1].
        """
        where = f"{self._argument} {self.name}, row {row['index']} (from 0)"
        try:
            found = float(self.function(response, row["row"]))
        except Exception as error:  # of a user's function
            reason = " ".join(str(error).split())
            raise ValueError(f"{where}: {type(error).__name__}{f': {reason}' if reason else ''}") from error
        if not 0 <= found <= 1:
            raise ValueError(f"{where}: the score must be in [0, 1], got {found}")
        return found


def _imported(path: str, argument: str) -> Any:
    """The object at a dotted path."""
    module, _, name = path.rpartition(".")
    if not module:
        raise ValueError(f"{argument} must be the path of a function such as my_file.my_function, got {path!r}")
    try:
        return vars(importlib.import_module(module))[name]
    except ModuleNotFoundError as error:
        raise ValueError(f"{argument} {path}: {error}; it is looked for in the current folder too") from None
    except KeyError:
        raise ValueError(f"{argument} {path}: {module} has no {name!r}") from None
    except Exception as error:  # while a user's file is read
        raise ValueError(f"{argument} {path}: {type(error).__name__}: {' '.join(str(error).split())}") from error
