"""What the program says: errors in one line and in the user's words, and nothing a user can do nothing about."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
from argparse import ArgumentParser
from collections.abc import Iterable


def explain(error: BaseException) -> str:
    """The error in one line; where a class name was misspelt, with the names there are."""
    text = " ".join(str(error).split())
    text = re.sub(r"Does not validate against any of the Union subtypes Subtypes: \[.*?\] Errors: - ", "", text)
    text = re.sub(r" - Expected a <class 'NoneType'> Given value type: .*$", "", text)
    text = _wrong_type(_unknown_option(text))
    found = re.search(r'Parser key "([\w.]+)".*Problem with given class_path \'([\w.]+)\': (.*)$', text)
    if found is not None:
        return _not_built(*found.groups())
    found = re.search(r'Parser key "([\w.]+)".*Expected a dot import path string: (\w+)$', text)
    if found is None or found[1].split(".")[-1] in ("optimizer", "lr_scheduler"):  # torch's own classes
        return text
    from lightning.pytorch import LightningDataModule

    import kd_lightning
    from kd_lightning.assistants import Assistant
    from kd_lightning.divergences import Divergence
    from kd_lightning.label_losses import LabelLoss
    from kd_lightning.rollout.base import ResponseSource
    from kd_lightning.schedules import Schedule
    from kd_lightning.subclasses import concrete_subclasses

    key, name = found.groups()
    last = key.split(".")[-1]
    bases: dict[str, type] = {"assistant": Assistant, "label_loss": LabelLoss, "responses": ResponseSource}
    bases["data"] = LightningDataModule
    base = bases.get(last, Divergence)
    if last.endswith(("weight", "alpha", "share")):
        base = Schedule
    public = set(kd_lightning.__all__)  # what others have imported may hold more, of ours and of Lightning's own
    homes = {leaf.__name__: leaf.__module__.partition(".")[0] for leaf in concrete_subclasses(base)}
    names = sorted(leaf for leaf, home in homes.items() if leaf in public or home not in ("kd_lightning", "lightning"))
    hint = did_you_mean(name, names)
    return f"{key}: there is no class {name}{hint}; the classes are {', '.join(names)} (or the dotted path of your own)"


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A hint where a name is close to one there is; otherwise nothing."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def unknown_argument(text: str, parser: ArgumentParser) -> str:
    """Where a whole argument is not known, on the command line or in a file: the nearest one that is.

    Args:
        text: of the error.
        parser: which knows the arguments, such as `trainer.max_steps`.
    """
    names = [option.lstrip("-") for option in parser._option_string_actions if not option.endswith(".help")]
    found = re.search(r"^unrecognized arguments: (--)([\w.]+)|does not accept option '()([\w.]+)'$", text)
    if found is None:
        return text
    dashes, name = found[1] or "", found[2] or found[4]
    parts = name.split(".")
    for n in range(len(parts), 0, -1):  # of `model.optimiser.lr` the first two are an argument's name
        begin, rest = ".".join(parts[:n]), "".join(f".{part}" for part in parts[n:])
        known = {".".join(words[:n]) for words in (name.split(".") for name in names) if len(words) >= n}
        if begin not in known and (close := difflib.get_close_matches(begin, known, n=1)):
            return f"{text} (did you mean {dashes}{close[0]}{rest}?)"
    return f"{text}; --help lists those there are"


def _not_built(key: str, path: str, reason: str) -> str:
    """Why no object of a class came about: the class is not there, or a part of it was given without its class."""
    inner = re.search(r'Parser key "([\w.]+)".*but ([\w.]+) is abstract', reason)
    if inner is not None:
        argument = f"{key}.{inner[1]}"
        return f"{argument}: it is not said which {inner[2].split('.')[-1]}: give --{argument} CLASS first"
    if re.search(r"No module|no attribute|[Ii]mport", reason):
        return f"{key}: {path} cannot be imported from {os.getcwd()}: {reason}"
    return f"{key}: {path.split('.')[-1]}: {reason}"


def _unknown_option(text: str) -> str:
    """Where a class does not take an argument, what it takes."""
    found = re.search(r"class_path '([\w.]+)\.(\w+)': Option '([\w.]+)' is not accepted$", text)
    inside = re.search(r"Option '([\w.]+)' is not accepted\. Got value: Namespace\(class_path='([\w.]+)\.(\w+)'", text)
    if found is not None:
        module, name, option = found.groups()
    elif inside is not None:  # of an optimizer or scheduler
        option, module, name = inside.groups()
    else:
        return text
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters.values()
    names = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    hint = did_you_mean(option, names) or f": it takes {', '.join(names) or 'none'}"
    key = re.search(r'Parser key "([\w.]+)"', text)
    return f"{key[1] + ': ' if key else ''}{name} has no argument {option!r}{hint}"


def _wrong_type(text: str) -> str:
    """Of an argument inside an optimizer or scheduler: its name, what it takes and what it was given."""
    found = re.search(
        r'Parser key "([\w.]+)": Type typing\.(?:Callable|Optional).*?Parser key "(\w+)": (.*?)'
        r"(?:Given value type: <class '\w+'> Given value|Got value): (.+?)\. Got value",
        text,
    )
    kinds = {} if found is None else dict.fromkeys(re.findall(r"Expected an? <class '(\w+)'>", found[3]))
    if found is None or not kinds:
        return text
    return f"{found[1]}.{found[2]} must be {' or '.join(kinds)}, got {found[4]!r}"


def expected(error: BaseException) -> bool:
    """Whether the error speaks of the user's input or machine rather than of a fault of ours."""
    import jsonargparse
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    return isinstance(error, (ValueError, OSError, MisconfigurationException, jsonargparse.ArgumentError))
