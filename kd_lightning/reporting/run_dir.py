"""A run's folder, finished or not, read back: its configuration, closing table and curves."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kd_lightning.reporting.moved_classes import update_class_paths

NOT_THE_METHOD = (
    "seed_everything",
    "data.seed",
    "trainer.default_root_dir",
    "ckpt_path",
    "export.overwrite",
    "predictions.max_new_tokens",
)
DATA = ("data.train", "data.val", "data.test", "data.max_length", "data.chat_template", "results.task")

WHO = ("teacher", "student_before", "student_after")
HEADINGS = {"nll": "NLL per answer token", "forward_kl": "forward KL to teacher", "exact_match": "exact match"}

Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class RunFolder:
    """What a run left under its `--trainer.default_root_dir`.

    Attributes:
        root: the folder.
        config: every argument by its dotted name.
        results: the closing table; None where the run has not come to its end.
        scalars: (step, value) of every scalar of its TensorBoard events.
        rows: a line for each split that changes with its rows; empty where the run did not say.
    """

    root: Path
    config: dict[str, Any]
    results: dict[str, dict[str, float | None] | None] | None
    scalars: dict[str, Curve]
    rows: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, root: str | Path) -> RunFolder:
        """Read a folder.

        Raises:
            ValueError: it is not the folder of a run, or a file in it is broken.
        """
        root = Path(root)
        config, results, rows = root / "config.yaml", root / "results.json", root / "rows.json"
        if not config.is_file():
            raise ValueError(f"{root} is not the folder of a run: it has no config.yaml")
        try:
            read = update_class_paths(yaml.safe_load(config.read_text(encoding="utf-8")))
            table = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else None
            known = json.loads(rows.read_text(encoding="utf-8")) if rows.is_file() else {}
        except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{root}: {' '.join(str(error).split())}") from None
        if not isinstance(read, dict) or not {"model", "data", "trainer"} & read.keys():
            raise ValueError(f"{root} is not the folder of a run: its config.yaml has no model, data or trainer")
        if table is not None and not _is_table(table):
            raise ValueError(f"{results}: no table of a run, which has {', '.join(WHO)} with {', '.join(HEADINGS)}")
        if not isinstance(known, dict):
            raise ValueError(f"{rows}: not the splits of a run, got {known!r}")
        return cls(root, flatten_config(read), table, curves(root), known)

    @property
    def step(self) -> int:
        """The last step that was logged."""
        return max((curve[-1][0] for curve in self.scalars.values() if curve), default=0)

    @property
    def ended(self) -> bool:
        """Whether the run came to its end; without test rows it leaves a student and no table."""
        return self.results is not None or (self.root / "student").is_dir()

    @property
    def seeds(self) -> tuple[Any, Any]:
        """What two repetitions differ in."""
        return self.config.get("seed_everything"), self.config.get("data.seed")

    @property
    def method(self) -> dict[str, Any]:
        """What makes two runs repetitions of each other: every argument but seeds and places."""
        return {name: value for name, value in self.config.items() if name not in NOT_THE_METHOD}

    def last(self, name: str) -> float | None:
        """The last value of a scalar; None where it was never logged."""
        curve = self.scalars.get(name)
        return curve[-1][1] if curve else None


def _is_table(table: Any) -> bool:
    """Whether a closing table has its rows and columns."""
    if not isinstance(table, dict) or not set(WHO) <= table.keys():
        return False
    return all(row is None or (isinstance(row, dict) and HEADINGS.keys() <= row.keys()) for row in table.values())


def resolved_source(source: Any) -> Any:
    """Where a source of rows lies, however it is written."""
    if isinstance(source, list):
        return [resolved_source(part) for part in source]
    return str(Path(source).resolve()) if isinstance(source, str) and Path(source).exists() else source


def flatten_config(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names as on the command line (`init_args` is left out)."""
    if not isinstance(config, dict) or not config:
        return {prefix: config} if prefix else {}
    out: dict[str, Any] = {}
    for name, value in config.items():
        inside = prefix if name == "init_args" else f"{prefix}.{name}" if prefix else str(name)
        out |= flatten_config(value, inside)
    return out


def curves(root: Path) -> dict[str, Curve]:
    """Every scalar of a run: of `ROOT/tensorboard`, or of the newest events or `metrics.csv` that a logger left."""
    if found := scalars(root / "tensorboard"):
        return found
    ours = [path for path in root.rglob("*") if not path.relative_to(root).parts[0].startswith("earlier-")]
    newest = sorted(ours, key=lambda path: path.stat().st_mtime, reverse=True)
    for path in newest:
        if path.name.startswith("events.out.tfevents.") and (found := scalars(path.parent)):
            return found
    return next((_csv(path) for path in newest if path.name == "metrics.csv"), {})


def _csv(path: Path) -> dict[str, Curve]:
    """Scalars as Lightning's CSVLogger writes them: a row a step, a column a scalar, empty where it was not logged."""
    found: dict[str, dict[int, float]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    found.setdefault(name, {})[int(row["step"])] = float(value)
    return {name: sorted(steps.items()) for name, steps in found.items()}


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
