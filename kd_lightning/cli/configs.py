"""Shipped configs and checkpoint paths by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_lightning.cli.error_messages import did_you_mean
from kd_lightning.paths import expand_path
from kd_lightning.reporting.moved_classes import update_class_paths

if TYPE_CHECKING:  # takes a second to import
    from jsonargparse import Namespace

CONFIGS = {"--config": "", "-c": "", "--trainer": "trainer"}  # folders of the shipped configs that an option names
PATHS = ("default_root_dir", "ckpt_path", "baseline", "dirpath", "save_dir")  # arguments that our classes do not read
_FOLDER_ARGUMENTS = "--trainer.default_root_dir (or --checkpoint.dirpath)"
PARSER_MODE = "kd_lightning"  # jsonargparse's name of the loader registered below


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
            word = f"{flag}={shipped_config(value, flag)}"
        elif before in CONFIGS:
            word = shipped_config(word, before)
        elif equals:
            word = f"{flag}={update_class_paths(value)}"
        out.append(update_class_paths(word))
    return out


def register_config_loader() -> str:
    """Register the loader of config files, and of values on the command line, with jsonargparse.

    It reads YAML as jsonargparse does, and then replaces the paths of classes that moved.

    Returns:
        The parser mode that uses the loader.
    """
    from jsonargparse import set_loader
    from yaml import YAMLError

    set_loader(PARSER_MODE, read_config, exceptions=(YAMLError,))
    return PARSER_MODE


def read_config(text: str) -> Any:
    """The values of a configuration in YAML."""
    from jsonargparse import get_loader

    return update_class_paths(get_loader("yaml")(text))


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
