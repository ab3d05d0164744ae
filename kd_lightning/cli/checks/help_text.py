"""The opening of `--help`: the arguments of most runs, and those of the data."""

from __future__ import annotations

import inspect
import re
import textwrap

COMMON = {
    "--config NAME_OR_FILE": "a shipped config, such as quickstart, or a YAML file; later ones override",
    "--model.student MODEL": "folder, hub name or asset: name of the model that is trained",
    "--model.teacher MODEL": "the model that it is distilled from; null: none",
    "--model.objective CLASS": "the divergence, such as ForwardKL, ReverseKL, GeneralizedJSD, SkewKL",
    "--model.optimizer.lr NUMBER": "learning rate",
    "--data.train FILE": "training rows; --data.val and --data.test: those of validation and test, or null",
    "--data.batch_size NUMBER": "rows per batch on each rank",
    "--trainer.max_steps NUMBER": "optimizer steps; --trainer.max_epochs: passes over the data",
    "--trainer.default_root_dir DIR": "folder of the run: checkpoints, curves, report, exported student",
    "--ckpt_path last": "resume the run in that folder",
}
WIDTH = 24  # columns before the text of an argument, as in argparse


def help_opening(data: type) -> str:
    """The arguments of most runs, then every argument of a data module's class.

    Args:
        data: the default class of `--data`.
    """
    lines = ["most used:", *(_entry(name, text) for name, text in COMMON.items())]
    lines += ["", f"data (of {data.__name__}, the default class of --data):"]
    texts = _argument_texts(inspect.getdoc(data) or "")
    for name, parameter in inspect.signature(data).parameters.items():
        needed = parameter.default is parameter.empty
        default = "required" if needed else f"default: {_shown(parameter.default)}"
        lines.append(_entry(f"--data.{name}", f"{texts.get(name, '')} ({default})".strip()))
    return "\n".join(lines) + "\n"


def _entry(name: str, text: str) -> str:
    indent = " " * WIDTH
    return f"  {name}\n{textwrap.fill(text, 100, initial_indent=indent, subsequent_indent=indent)}"


def _argument_texts(doc: str) -> dict[str, str]:
    """The texts of the section `Args` of a docstring by argument."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", doc, re.DOTALL | re.MULTILINE)
    found = re.findall(r"^    (\w+): (.*?)(?=^    \w+:|\Z)", section[1] if section else "", re.DOTALL | re.MULTILINE)
    return {name: " ".join(text.split()).rstrip(".") for name, text in found}


def _shown(value: object) -> str:
    """A default as it is written in YAML."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
