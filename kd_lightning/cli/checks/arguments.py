"""Checks of a parsed configuration: sections, ranges of the Trainer's arguments, finite numbers, one name per role."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

from jsonargparse import Namespace

SECTIONS = ("model", "trainer", "checkpoint", "export", "results", "generation", "samples", "predictions")
LEAST = {  # the smallest allowed value of the Trainer's whole numbers
    "num_nodes": 1,
    "max_epochs": -1,
    "min_epochs": 0,
    "max_steps": -1,
    "min_steps": 0,
    "check_val_every_n_epoch": 1,
    "num_sanity_val_steps": -1,
    "log_every_n_steps": 0,
    "accumulate_grad_batches": 1,
    "gradient_clip_val": 0,
    "reload_dataloaders_every_n_epochs": 0,
    "fast_dev_run": 0,
}
SHARES = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches")
PACKAGES = {"transformer-engine": "transformer_engine", "transformer-engine-float16": "transformer_engine"}
FEWEST_PROCESSES = 4  # CPU processes that are started on any machine: a sharded run can be tried on two cores


def check_sections(config: Mapping[str, Any] | Namespace, source: str = "") -> None:
    """Check that each section holds arguments, and that `data` is a section or the name of a class.

    Args:
        config: a configuration, parsed or as it is in a file.
        source: name of the file, for messages.

    Raises:
        ValueError: it names the section.
    """
    place = f"{source}: " if source else ""
    for name in (*SECTIONS, "data"):
        value = config[name] if name in config else {}
        if isinstance(value, (Mapping, Namespace)) or (name == "data" and isinstance(value, str)):
            continue
        other = " or the name of a class" if name == "data" else ""
        shown = "null" if value is None else repr(value)
        raise ValueError(f"{place}{name} must be a mapping of arguments to values{other}, got {shown}")


def check_arguments(config: Namespace, *, started: bool) -> None:
    """Check the parsed configuration of a command.

    Args:
        config: the configuration.
        started: whether its processes are started; False: they are only planned, and may be more than there are CPUs.

    Raises:
        ValueError: it names the argument, the value and what is allowed.
    """
    check_sections(config)
    for name, value in _numbers(config):
        if not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value}")
    _check_student(config["model"])
    trainer = config["trainer"]
    for name, least in LEAST.items():
        value = trainer.get(name)
        if isinstance(value, (int, float)) and value < least:
            meaning = " (-1: no limit)" if least == -1 and name.startswith("max") else ""
            raise ValueError(f"trainer.{name} must be at least {least}{meaning}, got {value}")
    for name in SHARES:
        _check_share(f"trainer.{name}", trainer.get(name))
    _check_interval(trainer.get("val_check_interval"), trainer.get("check_val_every_n_epoch"))
    _check_devices(trainer.get("devices"), trainer.get("accelerator"), started)
    package = PACKAGES.get(str(trainer.get("precision")))
    if package and importlib.util.find_spec(package) is None:
        raise ValueError(
            f"trainer.precision {trainer.precision} needs the package {package}, which is not installed: install it, "
            "or pass bf16-mixed"
        )


def _numbers(value: object, name: str = "") -> Iterator[tuple[str, float]]:
    """Every floating-point number in a configuration, with its dotted name."""
    if isinstance(value, float):
        yield name, value
    elif isinstance(value, Namespace):
        for key, part in vars(value).items():
            shown = {"init_args": name, "dict_kwargs": name}.get(key)
            yield from _numbers(part, (f"{name}.{key}" if name else key) if shown is None else shown)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _numbers(part, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for number, part in enumerate(value):
            yield from _numbers(part, f"{name}[{number}]")


def _check_student(model: Namespace) -> None:
    student = model.get("student")
    if not isinstance(student, str) or not student.strip():
        shown = student.as_dict() if isinstance(student, Namespace) else student
        raise ValueError(f"model.student must be a folder, a hub name or an asset: name, got {shown!r}")


def _check_share(name: str, value: object) -> None:
    """Check a number of batches (int) or a share of them (float)."""
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if value is None or whole or (isinstance(value, float) and 0 <= value <= 1):
        return
    raise ValueError(f"{name} must be a number of batches of at least 0, or a share from 0.0 to 1.0, got {value}")


def _check_interval(value: object, epochs: object) -> None:
    """Check `val_check_interval`; times are left to Lightning."""
    if value is None or not isinstance(value, (int, float)):
        return
    if isinstance(value, float) and epochs is None:
        raise ValueError(
            "trainer.val_check_interval must be a whole number of training batches where "
            f"trainer.check_val_every_n_epoch is null, got {value}"
        )
    if value <= 0 or (isinstance(value, float) and value > 1) or isinstance(value, bool):
        raise ValueError(
            "trainer.val_check_interval must be a number of training batches of at least 1, or a share of an epoch in "
            f"(0.0, 1.0], got {value}"
        )


def _check_devices(devices: object, accelerator: object, started: bool) -> None:
    """Check the number of processes, or the list of GPUs, that `trainer.devices` asks for."""
    indices = devices.split(",") if isinstance(devices, str) and "," in devices else devices
    if isinstance(indices, (list, tuple)):
        if not indices or not all(_whole(index) is not None and int(index) >= 0 for index in indices):
            raise ValueError(f"trainer.devices must list indices of GPUs from 0, got {devices!r}")
        return
    if devices in (None, "auto"):
        return
    number = _whole(devices)
    on_cpu = _runs_on_cpu(accelerator)
    if number is None or number == 0 or number < (1 if on_cpu else -1):
        every = "" if on_cpu else ", -1 (every GPU)"
        raise ValueError(f"trainer.devices must be 'auto'{every} or a number of at least 1, got {devices!r}")
    most = max(os.cpu_count() or 1, FEWEST_PROCESSES)
    if on_cpu and started and number > most:
        raise ValueError(
            f"trainer.devices must be at most {most} on this machine of {os.cpu_count()} CPU cores, as each is a "
            f"process with both models, got {number}"
        )


def _whole(value: object) -> int | None:
    """A whole number, or a text of one; otherwise None."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    text = value.strip() if isinstance(value, str) else ""
    return int(text) if text.removeprefix("-").isdecimal() else None


def _runs_on_cpu(accelerator: object) -> bool:
    if accelerator not in (None, "auto"):
        return accelerator == "cpu"
    import torch

    return not torch.cuda.is_available() and not torch.backends.mps.is_available()
