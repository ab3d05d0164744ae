"""Errors of the command line as one line each, in terms of the user's arguments."""

from __future__ import annotations

import difflib
import inspect
import os
import pkgutil
import re
from collections.abc import Iterable, Sequence

from kd_lightning.atomic_io import LIMITS
from kd_lightning.cli.checks.aliases import ALIASES, CLASS_ALIASES

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
EXPECTED_TYPE = re.compile(r"Expected an? (?:<class '([\w.]+)'>|typing\.Literal\[([^\]]*)\])")
GIVEN_VALUE = re.compile(r"(?:Given value|Got value): (.*)$")
BARE_VALUE = re.compile(r'^Parser key "([\w.]+)": (?:Does not validate|Expected an? (?:<class|typing\.Literal))')
MISSING = re.compile(r"the following arguments are required: ([\w, ]+)(?: - .*)?$")
NO_SECTION = re.compile(r'^Parser key "(\w+)": Unable to load config (.*?)(?: - .*)?$')
NO_DATA = re.compile(r'^Parser key "data": .*Not a valid subclass of')
WRONG_CLASS = re.compile(
    r"Expected '([\w.]+)' to be a subclass of|Import path ([\w.]+) does not correspond to a subclass of"
    r"|([\w.]+) is not a subclass of|Expected a dot import path string: (.*?)$|Expected an import path or a subclass "
    r"spec, but got (.*?)\. Got value"
)
TYPES = {"collections.abc.Iterable": "a list", "list": "a list", "dict": "a mapping", "str": "a text"}
NEAR = 0.72  # similarity of two names, from 0 to 1, above which one is taken for the other misspelt
ROLES = {  # arguments whose classes are those of another package
    "model.optimizer": "an optimizer, such as AdamW, SGD or the dotted path of another class",
    "model.lr_scheduler": "a learning rate scheduler, such as cosine, linear, PolynomialLR, LinearLR or the dotted "
    "path of another class",
}


def explain(error: BaseException) -> str:
    """The error as one line; for an unknown class, with the names of the classes."""
    text = _wrong_section(_wrong_value(" ".join(str(error).split())))
    text = NONE_ALTERNATIVE.sub("", UNION_HEADER.sub("", text))
    text = _missing(_wrong_class(_wrong_type(_unknown_option(text))))
    if found := CLASS_PROBLEM.search(text):
        return _not_built(*found.groups())
    if found := UNKNOWN_CLASS.search(text):
        return _unknown_class(text, *found.groups())
    if isinstance(error, OSError) and error.filename is None and error.errno in LIMITS:
        return f"{text}: free some space or raise the limit (`ulimit -f`) where the run is written and rows are cached"
    return text


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A hint if `name` is close to one of the names; otherwise empty."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=NEAR)
    return f" (did you mean {close[0]}?)" if close else ""


def unknown_argument(text: str, names: Sequence[str]) -> str:
    """For an unknown argument, on the command line or in a file: the error with the argument that was meant.

    Args:
        text: the error.
        names: the known arguments, such as `trainer.max_steps`.
    """
    found = UNKNOWN_ARGUMENT.search(text)
    if found is None:
        return text
    dashes, name = found[1] or "", found[2] or found[4]
    if meant := _meant(name, names):
        return f"{text} (did you mean {dashes}{meant}?)"
    return f"{text}: --help lists the arguments"


def _meant(name: str, names: Sequence[str]) -> str | None:
    """The argument that was probably meant: one with nearly this name, or one that other programs call so."""
    last = name.rpartition(".")[2]
    if last in ALIASES and ALIASES[last] != name:
        return ALIASES[last]
    parts = name.split(".")
    for n in range(len(parts), 0, -1):  # the first two parts of `model.optimiser.lr` are the name of an argument
        rest = "".join(f".{part}" for part in parts[n:])
        group, word = ".".join(parts[: n - 1]), parts[n - 1]
        split = [one.split(".") for one in names if one.count(".") >= n - 1]
        known = {words[n - 1] for words in split if ".".join(words[: n - 1]) == group}
        if word not in known and (close := difflib.get_close_matches(word, known - {""}, n=1, cutoff=NEAR)):
            return f"{group}.{close[0]}{rest}" if group else f"{close[0]}{rest}"
    same = {one for one in names if one.rpartition(".")[2] == last and one.count(".") == 1}
    return same.pop() if len(same) == 1 else None


def _unknown_class(text: str, key: str, name: str) -> str:
    """For a class name that is not known: the classes that the argument accepts."""
    last = key.split(".")[-1]
    if last in ("optimizer", "lr_scheduler"):  # torch's own classes
        return text
    base = _base_class(key)
    names = _class_names(base)
    meant = CLASS_ALIASES.get(re.sub(r"[\W_]", "", name.lower())) if base.__name__ == "Divergence" else None
    same = [known for known in names if known.lower() == name.lower()]
    hint = f" (did you mean {meant or same[0]}?)" if meant or same else did_you_mean(name, names)
    return f"{key}: unknown class {name}{hint}: pass one of {', '.join(names)}, or the dotted path of a custom class"


def _base_class(key: str) -> type:
    """The class whose subclasses an argument accepts."""
    from lightning.pytorch import LightningDataModule

    from kd_lightning.assistants import Assistant
    from kd_lightning.divergences import Divergence
    from kd_lightning.label_losses import LabelLoss
    from kd_lightning.rollout.base import ResponseSource
    from kd_lightning.schedules import Schedule
    from kd_lightning.token_weights import TokenWeight

    bases: dict[str, type] = {"assistant": Assistant, "label_loss": LabelLoss, "responses": ResponseSource}
    bases |= {"data": LightningDataModule, "weight": TokenWeight}
    last = key.split(".")[-1]
    number = last.endswith(("weight", "alpha", "share", "threshold"))
    return bases.get(last, Schedule if number else Divergence)


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
    if (wrong := _wrong_value(reason)) != reason:
        return f"{key}.{wrong}"
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
    types = {} if found is None else dict.fromkeys(name for name, _ in EXPECTED_TYPE.findall(found[3]))
    if found is None or not types:
        return text
    return f"{found[1]}.{found[2]} must be {' or '.join(types)}, got {found[4]!r}"


def _wrong_value(text: str) -> str:
    """For a value of a wrong type: the argument, the allowed types and words, and the value."""
    key, given = BARE_VALUE.search(text), GIVEN_VALUE.search(text)
    if key is None or given is None or "class_path" in text or "import path" in text:
        return text
    found = EXPECTED_TYPE.findall(text)
    literals = dict.fromkeys(word.strip() for _, words in found if words for word in words.split(","))
    types = dict.fromkeys(TYPES.get(name, name) for name, _ in found if name and name != "NoneType")
    if literals:
        types.pop("int", None)  # of words that are numbers
    allowed = [*types, *([f"one of {', '.join(literals)}"] if literals else [])]
    return f"{key[1]} must be {' or '.join(allowed)}, got {given[1]!r}" if allowed else text


def _missing(text: str) -> str:
    """For a class without an argument that it needs."""
    key, found = KEY.search(text), MISSING.search(text)
    if key is None or found is None:
        return text
    names = [name.strip() for name in found[1].split(",")]
    options = " and ".join(f"--{key[1]}.{name} VALUE" for name in names)
    return f"{key[1]}: its class needs {', '.join(names)}: pass {options}"


def _wrong_section(text: str) -> str:
    """For a section of arguments that is something else."""
    if found := NO_SECTION.search(text):
        return f"{found[1]} must be a mapping of arguments to values, or a file that holds one, got {found[2]}"
    if NO_DATA.search(text):
        return "data must be a mapping of arguments to values, or the name of a class such as InstructionDataModule"
    return text


def _wrong_class(text: str) -> str:
    """For an optimizer or scheduler that is no such class."""
    key, found = KEY.search(text), WRONG_CLASS.search(text)
    if key is None or found is None:
        return text
    name = next(group for group in found.groups() if group is not None)
    if key[1] not in ROLES:
        if not (found[1] or found[2] or found[3]) or not key[1].startswith("model."):
            return text
        known = ", ".join(_class_names(_base_class(key[1])))
        return f"{key[1]} must be one of {known}, or the dotted path of a custom class of this kind, got {name}"
    import torch

    module = torch.optim if key[1] == "model.optimizer" else torch.optim.lr_scheduler
    base = torch.optim.Optimizer if key[1] == "model.optimizer" else torch.optim.lr_scheduler.LRScheduler
    names = [one for one in vars(module) if inspect.isclass(vars(module)[one]) and issubclass(vars(module)[one], base)]
    near = [one for one in names if name and one.lower().startswith(name.lower())]
    hint = f" (did you mean {near[0]}?)" if near else did_you_mean(name, names)
    return f"{key[1]} must be {ROLES[key[1]]}, got {name}{hint}"


def expected(error: BaseException) -> bool:
    """Whether the user can fix the error: it is about the input or the machine, and not a bug of this package."""
    import jsonargparse
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    return isinstance(error, (ValueError, OSError, MisconfigurationException, jsonargparse.ArgumentError))
