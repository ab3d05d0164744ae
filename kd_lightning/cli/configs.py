"""Shipped configs and checkpoint paths by name."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_lightning.cli.error_messages import did_you_mean
from kd_lightning.paths import expand_path
from kd_lightning.reporting.moved_classes import named_schedule, update_class_paths

if TYPE_CHECKING:  # takes a second to import
    from jsonargparse import Namespace

CONFIGS = {"--config": "", "-c": "", "--trainer": "trainer"}  # folders of the shipped configs that an option names
SCHEDULER = "--model.lr_scheduler"
PATHS = ("default_root_dir", "ckpt_path", "baseline", "dirpath", "save_dir")  # arguments that our classes do not read
_FOLDER_ARGUMENTS = "--trainer.default_root_dir (or --checkpoint.dirpath)"
PARSER_MODE = "kd_lightning"  # jsonargparse's name of the loader registered below
LOGGERS_WITH_FOLDER = ("CSVLogger", "TensorBoardLogger")  # their `save_dir` is required
FILES_READ: set[str] = set()  # by the parser
WORD = re.compile(r"[^\s'\"{}()\[\],:=]{3,}")
KEY = re.compile(r'Parser key "([\w.]+)"')


def config_folder() -> Path:
    """Folder of the shipped configs: in the package if it is installed, next to it in the source tree."""
    installed = Path(__file__).parents[1] / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "configs"


def shipped_config(name: str, option: str = "--config") -> str:
    """The path of the shipped config `name`; a path, or values in braces, is returned unchanged.

    Raises:
        ValueError: there is no file and no shipped config of this name.
    """
    if name.startswith("{"):
        return name
    if Path(expanded := expand_path(name)).is_file():
        return expanded
    folder = config_folder() / CONFIGS[option]
    path = folder / f"{name}.yaml"
    if path.is_file():
        return str(path)
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    hint = did_you_mean(name, names)
    raise ValueError(f"{option} {name}: no such file{hint}: pass a path or one of {', '.join(names)}")


def expand_configs(args: Sequence[str]) -> list[str]:
    """Replace names after `--config` and `--trainer` by paths of shipped configs, and paths of classes that moved."""
    out: list[str] = []
    for word in args:
        flag, equals, value = word.partition("=")
        before = out[-1] if out else ""
        if equals and flag in CONFIGS:
            word = f"{flag}={_checked(shipped_config(value, flag), flag)}"
        elif before in CONFIGS:
            word = _checked(shipped_config(word, before), before)
        elif before == SCHEDULER or (flag == SCHEDULER and equals):
            schedule = named_schedule(value if equals else word)
            word = _updated(SCHEDULER, schedule) if isinstance(schedule, str) else json.dumps(schedule)
            word = f"{flag}={word}" if equals else word
        elif equals:
            word = f"{flag}={_updated(flag, value)}"
        else:
            word = _updated(before, word)
        out.append(word)
    return out


def _updated(flag: str, value: str) -> str:
    """A value of the command line, with the present path of its class, and a folder for a logger without one."""
    value = update_class_paths(value)
    if flag != "--trainer.logger" or value.rpartition(".")[2] not in LOGGERS_WITH_FOLDER:
        return value
    return json.dumps({"class_path": value, "init_args": {"save_dir": ""}})


def _checked(source: str, option: str) -> str:
    """The same file or text of a config, if it is a mapping with sections of the right kind.

    Raises:
        ValueError: it is not; the message names the line but shows nothing of a file that is no config.
    """
    from kd_lightning.cli.checks.arguments import check_sections

    inline = source.startswith("{")
    try:
        text = source if inline else Path(source).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{option} {source} is not a text in UTF-8: pass a YAML file") from None
    config = _read_yaml(text, option if inline else f"{option} {source}")
    if config is None and not inline:
        raise ValueError(f"{option} {source} is empty: pass a YAML file with arguments")
    if not isinstance(config, dict):
        raise ValueError(f"{option} {source} holds no mapping of arguments to values: pass a YAML file that does")
    if option != "--trainer":
        check_sections(config, "" if inline else source)
    return source


def _read_yaml(text: str, place: str) -> object:
    """A text as YAML.

    Raises:
        ValueError: it is not YAML; the message has the line and not the text.
    """
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)  # not every error of PyYAML has a place
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "a value cannot be read"
        raise ValueError(f"{place}{line}: not readable as YAML: {problem}") from None


def register_config_loader() -> str:
    """Register the loader of config files, and of values on the command line, with jsonargparse.

    It reads YAML as jsonargparse does, and then replaces the paths of classes that moved. `FILES_READ` collects the
    files that it reads.

    Returns:
        The parser mode that uses the loader.
    """
    from jsonargparse import set_loader
    from jsonargparse._util import config_load_stack  # the files being read; there is no public way to know them
    from yaml import YAMLError

    def load(text: str) -> object:
        FILES_READ.update(path for path, _ in config_load_stack.get())
        return _with_folder(read_config(text))

    set_loader(PARSER_MODE, load, exceptions=(YAMLError,))
    return PARSER_MODE


def read_config(text: str) -> Any:
    """The values of a configuration in YAML."""
    from jsonargparse import get_loader

    return update_class_paths(get_loader("yaml")(text))


def _with_folder(config: object) -> object:
    """A configuration in which loggers that need a folder have one: none, for `fill_save_dir`."""
    if not isinstance(config, dict):
        return config
    found = {name: _with_folder(value) for name, value in config.items()}
    if "logger" in found:
        given: Any = found["logger"]
        loggers = [_logger_with_folder(one) for one in (given if isinstance(given, list) else [given])]
        found["logger"] = loggers if isinstance(given, list) else loggers[0]
    return found


def _logger_with_folder(logger: object) -> object:
    logger = {"class_path": logger} if isinstance(logger, str) else logger
    if not isinstance(logger, dict) or str(logger.get("class_path")).rpartition(".")[2] not in LOGGERS_WITH_FOLDER:
        return logger if not isinstance(logger, dict) or len(logger) > 1 else logger.get("class_path", logger)
    given = logger.get("init_args") or {}
    return {**logger, "init_args": {"save_dir": "", **given}} if isinstance(given, dict) else logger


def fill_save_dir(trainer: Namespace, root: str) -> None:
    """Set the folder of loggers that were given none: the run's.

    Args:
        trainer: the parsed arguments of the Trainer.
        root: the run's folder.
    """
    for logger in trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]:
        if isinstance(logger, type(trainer)) and logger.get("init_args.save_dir") == "":
            logger["init_args.save_dir"] = root


def hide_contents(text: str, args: Sequence[str]) -> str:
    """An error of the parser, without the contents of files that were read as the value of an argument.

    jsonargparse reads a file where a value is the path of one, and shows the value that it cannot use.

    Args:
        text: the error.
        args: the arguments of the command line; files that `--config` and `--trainer` name are configs.
    """
    configs = {os.path.realpath(one.rpartition("=")[2]) for one in args if os.path.isfile(one.rpartition("=")[2])}
    configs &= {os.path.realpath(value.rpartition("=")[2]) for flag, value in _options(args) if flag in CONFIGS}
    shown = set(WORD.findall(text)) - set(WORD.findall(" ".join(args)))
    key = KEY.search(text)
    for path in sorted(FILES_READ):
        if os.path.realpath(path) in configs:
            continue
        hidden = shown & set(WORD.findall(Path(path).read_text(encoding="utf-8", errors="replace")))
        if hidden or "Config file loop" in text:
            return f"{key[1] if key else 'an argument'}: the file {path} holds no valid value for this argument"
    return text


def _options(args: Sequence[str]) -> list[tuple[str, str]]:
    """Each option of the command line with its value."""
    flags = [(word, after) for word, after in zip(args, [*args[1:], ""], strict=True) if word.startswith("-")]
    return [(*word.split("=", 1),) if "=" in word else (word, after) for word, after in flags]  # type: ignore[misc]


def expand_paths(config: Namespace) -> None:
    """Expand `~` and `$VAR` in the paths of a parsed configuration that Lightning's classes take.

    Raises:
        ValueError: an environment variable is not set.
    """
    for key, value in list(config.items()):
        if isinstance(value, str) and key.rpartition(".")[2] in PATHS:
            config[key] = _expanded(key, value)
        for part in value if isinstance(value, list) else ():  # such as several loggers
            if isinstance(part, type(config)):
                expand_paths(part)


def _expanded(key: str, path: str) -> str:
    try:
        return expand_path(path)
    except ValueError as error:
        raise ValueError(f"--{key} {error}") from None


def checkpoint_path(name: str, folder: Path, resume: bool = True) -> str:
    """The file of `--ckpt_path`: a path, or for `last` the newest complete checkpoint of the run.

    Args:
        name: a path or `last`.
        folder: of the run's checkpoints.
        resume: training is resumed from it, which needs more than weights.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged.
    """
    from kd_lightning.distributed.checkpoint_io import check_resumable, newest_checkpoint

    if name != "last":
        if not Path(name).exists():
            raise ValueError(
                f"--ckpt_path {name}: no such checkpoint: pass an existing one, or 'last' to resume from ROOT"
            )
        if resume:
            check_resumable(Path(name))
        return name
    found = newest_checkpoint(folder, resume)
    if found is None:
        raise ValueError(f"--ckpt_path last: {folder} has no *.ckpt to resume from: check {_FOLDER_ARGUMENTS}")
    return str(found)
