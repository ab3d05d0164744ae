"""A run's folder, finished or not, read back: its configuration, closing table and curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

NOT_THE_METHOD = ("seed_everything", "data.seed", "trainer.default_root_dir", "ckpt_path", "export.overwrite")
DATA = ("data.train", "data.val", "data.test", "data.max_length", "data.chat_template", "results.task")

Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class RunFolder:
    """What a run left under its `--trainer.default_root_dir`.

    Attributes:
        root: the folder.
        config: every argument by its dotted name.
        results: the closing table; None where the run has not come to its end.
        scalars: (step, value) of every scalar of its TensorBoard events.
    """

    root: Path
    config: dict[str, Any]
    results: dict[str, dict[str, float | None] | None] | None
    scalars: dict[str, Curve]

    @classmethod
    def read(cls, root: str | Path) -> RunFolder:
        """Read a folder.

        Raises:
            ValueError: it is not the folder of a run, or a file in it is broken.
        """
        root = Path(root)
        config, results = root / "config.yaml", root / "results.json"
        if not config.is_file():
            raise ValueError(f"{root} is not the folder of a run: it has no config.yaml")
        try:
            read = yaml.safe_load(config.read_text(encoding="utf-8"))
            table = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else None
        except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{root}: {' '.join(str(error).split())}") from None
        return cls(root, flat(read), table, scalars(root / "tensorboard"))

    @property
    def step(self) -> int:
        """The last step that was logged."""
        return max((curve[-1][0] for curve in self.scalars.values() if curve), default=0)

    @property
    def method(self) -> dict[str, Any]:
        """What makes two runs repetitions of each other: every argument but seeds and places."""
        return {name: value for name, value in self.config.items() if name not in NOT_THE_METHOD}

    @property
    def data(self) -> dict[str, Any]:
        """The arguments that say which rows are learned and measured."""
        return {name: self.config.get(name) for name in DATA}

    def last(self, name: str) -> float | None:
        """The last value of a scalar; None where it was never logged."""
        curve = self.scalars.get(name)
        return curve[-1][1] if curve else None


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names as on the command line (`init_args` is left out)."""
    if not isinstance(config, dict) or not config:
        return {prefix: config} if prefix else {}
    out: dict[str, Any] = {}
    for name, value in config.items():
        inside = prefix if name == "init_args" else f"{prefix}.{name}" if prefix else str(name)
        out |= flat(value, inside)
    return out


def scalars(folder: Path) -> dict[str, Curve]:
    """Every scalar of a folder of TensorBoard events; of a step that was logged twice, the later value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    if not any(folder.glob("events.out.tfevents.*")):
        return {}
    events: Any = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        steps = {event.step: event.value for event in events.Scalars(name)}
        found[name] = sorted(steps.items())
    return found


def differing(runs: Sequence[RunFolder]) -> list[str]:
    """Names of the arguments of the method in which some of the runs differ."""
    names = {name for run in runs for name in run.method}
    return sorted(name for name in names if len({repr(run.method.get(name)) for run in runs}) > 1)


def repetitions(runs: Sequence[RunFolder]) -> list[list[RunFolder]]:
    """The runs in groups that differ in seeds alone, in the order in which each group first comes."""
    groups: dict[str, list[RunFolder]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run.method, sort_keys=True, default=str), []).append(run)
    return list(groups.values())
