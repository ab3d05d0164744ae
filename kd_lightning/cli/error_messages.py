"""Errors of the command line as one line each, in terms of the user's arguments."""

from __future__ import annotations

import difflib
import inspect
import os
import pkgutil
import re
from argparse import ArgumentParser
from collections.abc import Iterable

from kd_lightning.atomic_io import LIMITS

# jsonargparse's exceptions carry one text and no attributes: which argument, which class path and why are only in the
# text. These patterns match the texts of version 4.53; a text that none of them matches is shown unchanged. Each
# error that a pattern serves is a case of tests/cli/test_bad_input.py, so a change of a text fails there.
UNION_HEADER = re.compile(r"Does not validate against any of the Union subtypes Subtypes: \[.*?\] Errors: - ")
NONE_ALTERNATIVE = re.compile(r" - Expected a <class 'NoneType'> Given value type: .*$")
KEY = re.compile(r'Parser key "([\w.]+)"')
UNKNOWN_CLASS = re.compile(r'Parser key "([\w.]+)".*Expected a dot import path string: (\w+)$')
CLASS_PROBLEM = re.compile(r'Parser key "([\w.]+)".*Problem with given class_path \'([\w.]+)\': (.*)$')
ABSTRACT_CLASS = re.compile(r'Parser key "([\w.]+)".*but ([\w.]+) is abstract')
IMPORT_PROBLEM = re.compile(r"No module|no attribute|[Ii]mport")
UNKNOWN_ARGUMENT = re.compile(r"^unrecognized arguments: (--)([\w.]+)|does not accept option '()([\w.]+)'$")
CLASS_ARGUMENT = re.compile(r"class_path '([\w.]+)\.(\w+)': Option '([\w.]+)' is not accepted$")
OPTIMIZER_ARGUMENT = re.compile(
    r"Option '([\w.]+)' is not accepted\. Got value: Namespace\(class_path='([\w.]+)\.(\w+)'"
)
OPTIMIZER_TYPE = re.compile(
    r'Parser key "([\w.]+)": Type typing\.(?:Callable|Optional).*?Parser key "(\w+)": (.*?)'
    r"(?:Given value type: <class '\w+'> Given value|Got value): (.+?)\. Got value"
)
EXPECTED_TYPE = re.compile(r"Expected an? <class '(\w+)'>")


def explain(error: BaseException) -> str:
    """The error as one line; for an unknown class, with the names of the classes."""
    text = " ".join(str(error).split())
    text = NONE_ALTERNATIVE.sub("", UNION_HEADER.sub("", text))
    text = _wrong_type(_unknown_option(text))
    if found := CLASS_PROBLEM.search(text):
        return _not_built(*found.groups())
    if found := UNKNOWN_CLASS.search(text):
        return _unknown_class(text, *found.groups())
    if isinstance(error, OSError) and error.filename is None and error.errno in LIMITS:
        return f"{text}: free some space or raise the limit (`ulimit -f`) where the run is written and rows are cached"
    return text


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A hint if `name` is close to one of the names; otherwise empty."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def unknown_argument(text: str, parser: ArgumentParser) -> str:
    """For an unknown argument, on the command line or in a file: the error with the nearest known argument.

    Args:
        text: the error.
        parser: the parser that knows the arguments, such as `trainer.max_steps`.
    """
    found = UNKNOWN_ARGUMENT.search(text)
    if found is None:
        return text
    options = parser._option_string_actions  # argparse has no public list of a parser's options
    names = [option.lstrip("-") for option in options if not option.endswith(".help")]
    dashes, name = found[1] or "", found[2] or found[4]
    parts = name.split(".")
    for n in range(len(parts), 0, -1):  # the first two parts of `model.optimiser.lr` are the name of an argument
        begin, rest = ".".join(parts[:n]), "".join(f".{part}" for part in parts[n:])
        known = {".".join(words[:n]) for words in (name.split(".") for name in names) if len(words) >= n}
        if begin not in known and (close := difflib.get_close_matches(begin, known, n=1)):
            return f"{text} (did you mean {dashes}{close[0]}{rest}?)"
    return f"{text}: --help lists the arguments"


def _unknown_class(text: str, key: str, name: str) -> str:
    """For a class name that is not known: the classes that the argument accepts."""
    last = key.split(".")[-1]
    if last in ("optimizer", "lr_scheduler"):  # torch's own classes
        return text
    from lightning.pytorch import LightningDataModule

    from kd_lightning.assistants import Assistant
    from kd_lightning.divergences import Divergence
    from kd_lightning.label_losses import LabelLoss
    from kd_lightning.rollout.base import ResponseSource
    from kd_lightning.schedules import Schedule
    from kd_lightning.token_weights import TokenWeight

    bases: dict[str, type] = {"assistant": Assistant, "label_loss": LabelLoss, "responses": ResponseSource}
    bases |= {"data": LightningDataModule, "weight": TokenWeight}
    number = last.endswith(("weight", "alpha", "share", "threshold"))
    base = bases.get(last, Schedule if number else Divergence)
    names = _class_names(base)
    hint = did_you_mean(name, names)
    return f"{key}: unknown class {name}{hint}: pass one of {', '.join(names)}, or the dotted path of a custom class"


def _class_names(base: type) -> list[str]:
    """Names of the public classes of this package, and of the user's, that can be built for a base class."""
    import kd_lightning
    from kd_lightning.subclasses import concrete_subclasses

    public = set(kd_lightning.__all__)  # leaves out internal subclasses of this package and of Lightning
    packages = {leaf.__name__: leaf.__module__.partition(".")[0] for leaf in concrete_subclasses(base)}
    return sorted(
        name for name, package in packages.items() if name in public or package not in ("kd_lightning", "lightning")
    )


def _not_built(key: str, path: str, reason: str) -> str:
    """Why no object of a class was built: it cannot be imported, or one of its arguments lacks its class."""
    if inner := ABSTRACT_CLASS.search(reason):
        argument, base = f"{key}.{inner[1]}", pkgutil.resolve_name(inner[2])
        return f"missing class for --{argument}: pass --{argument} CLASS (one of {', '.join(_class_names(base))})"
    if IMPORT_PROBLEM.search(reason):
        return f"{key}: {path} cannot be imported from {os.getcwd()}: {reason}"
    return f"{key}: {path.split('.')[-1]}: {reason}"


def _unknown_option(text: str) -> str:
    """For an argument that a class does not have: the arguments that it has."""
    if found := CLASS_ARGUMENT.search(text):
        module, name, option = found.groups()
    elif found := OPTIMIZER_ARGUMENT.search(text):
        option, module, name = found.groups()
    else:
        return text
    parameters = inspect.signature(pkgutil.resolve_name(f"{module}:{name}")).parameters.values()
    names = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    hint = did_you_mean(option, names) or f": pass one of {', '.join(names) or 'none'}"
    key = KEY.search(text)
    return f"{key[1] + ': ' if key else ''}{name} has no argument {option!r}{hint}"


def _wrong_type(text: str) -> str:
    """For an argument of an optimizer or scheduler with a wrong type: its name, the allowed types, and the value."""
    found = OPTIMIZER_TYPE.search(text)
    types = {} if found is None else dict.fromkeys(EXPECTED_TYPE.findall(found[3]))
    if found is None or not types:
        return text
    return f"{found[1]}.{found[2]} must be {' or '.join(types)}, got {found[4]!r}"


def expected(error: BaseException) -> bool:
    """Whether the user can fix the error: it is about the input or the machine, and not a bug of this package."""
    import jsonargparse
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    return isinstance(error, (ValueError, OSError, MisconfigurationException, jsonargparse.ArgumentError))
