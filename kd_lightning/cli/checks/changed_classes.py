"""What a class named on the command line keeps of the arguments that a config gives to the class it replaces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

CLASSES = ("model.optimizer", "model.lr_scheduler")  # of which a config gives most arguments


def changed_class_notices(args: Sequence[str], parsed: Namespace) -> list[str]:
    """A line for each optimizer or scheduler of a config that the command line replaces by another class.

    Args:
        args: the arguments of the command line, with the paths of the configs.
        parsed: the parsed configuration.
    """
    options = _options(args)
    lines = []
    for key in CLASSES:
        before = _configured(options, key)
        now = parsed.get(key)
        named = [value for option, value in options if option == f"--{key}" and not value.startswith("{")]
        if not named or not isinstance(now, Namespace) or not before:
            continue
        old, new = str(before.get("class_path")), str(now.get("class_path"))
        if old.rpartition(".")[2] == new.rpartition(".")[2]:
            continue
        given = {option.removeprefix(f"--{key}.").removeprefix("init_args.") for option, _ in options}
        accepted = now.get("init_args") or {}
        arguments = [name for name in before.get("init_args") or {} if name not in given]
        kept = [f"{name} {accepted.get(name)}" for name in arguments if name in accepted]
        dropped = [name for name in arguments if name not in accepted]
        texts = [f"keeps {', '.join(kept)} of the config"] if kept else []
        texts += [f"has no {', '.join(dropped)}" if len(dropped) else ""] if dropped else []
        if texts:
            lines.append(f"--{key} {new.rpartition('.')[2]} instead of {old.rpartition('.')[2]}: {' and '.join(texts)}")
    return lines


def _options(args: Sequence[str]) -> list[tuple[str, str]]:
    """Each option with its value, in order."""
    found = []
    for word, after in zip(args, [*args[1:], ""], strict=True):
        if word.startswith("-"):
            option, equals, value = word.partition("=")
            found.append((option, value if equals else after))
    return found


def _configured(options: Sequence[tuple[str, str]], key: str) -> dict[str, Any]:
    """The class and the arguments that the configs give to `key`; the last one wins."""
    import yaml

    section, _, name = key.partition(".")
    found: dict[str, Any] = {}
    for option, value in options:
        if option in ("--config", "-c"):
            config = yaml.safe_load(value if value.startswith("{") else Path(value).read_text(encoding="utf-8"))
            given = (config.get(section) or {}).get(name) if isinstance(config, dict) else None
            if isinstance(given, dict):
                found = given
    return found
