"""Reading the folder of a run, finished or not: its configuration, results table and curves."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from kd_lightning.paths import expand_path
from kd_lightning.reporting.markdown import markdown_table
from kd_lightning.reporting.moved_classes import update_class_paths
from kd_lightning.reporting.redaction import redact_config

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
ResultRow = dict[str, float | None]
Results = dict[str, ResultRow | None]
HEADINGS = {"nll": "NLL per answer token", "forward_kl": "forward KL to teacher", "exact_match": "exact match"}
SCORE = "score"
"""A further column, if the run had a scorer."""
SHARES = ("exact_match", SCORE)
"""Columns that are shares: printed in percent, and the larger the better."""

Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class RunFolder:
    """The files of a run under its `--trainer.default_root_dir`.

    Attributes:
        root: the folder.
        config: every argument by its dotted name.
        results: the results table; None if the run has not finished.
        scalars: (step, value) pairs of every logged scalar.
        rows: for each split a line that changes with its rows; empty if the run saved none.
    """

    root: Path
    config: dict[str, Any]
    results: Results | None
    scalars: dict[str, Curve]
    rows: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, root: str | Path) -> RunFolder:
        """Read a folder.

        Raises:
            ValueError: it is not the folder of a run, or a file in it cannot be parsed.
        """
        root = Path(expand_path(str(root)))
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
            raise ValueError(
                f"{results} is not a results table: it must have {', '.join(WHO)}, each with {', '.join(HEADINGS)}"
            )
        if not isinstance(known, dict):
            raise ValueError(f"{rows} must map each split to a line of text, got {known!r}")
        return cls(root, flatten_config(redact_config(read)), table, curves(root), known)

    @property
    def step(self) -> int:
        """The last step that was logged."""
        return max((curve[-1][0] for curve in self.scalars.values() if curve), default=0)

    @property
    def ended(self) -> bool:
        """Whether the run finished; without test rows it leaves a student but no results table."""
        return self.results is not None or (self.root / "student").is_dir()

    @property
    def seeds(self) -> tuple[object, object]:
        """The arguments in which repetitions differ: the run's seed and the data's."""
        return self.config.get("seed_everything"), self.config.get("data.seed")

    @property
    def method(self) -> dict[str, Any]:
        """Every argument except seeds and paths: runs that agree here are repetitions of each other."""
        return {name: value for name, value in self.config.items() if name not in NOT_THE_METHOD}

    def last(self, name: str) -> float | None:
        """The last value of a scalar; None if it was never logged."""
        curve = self.scalars.get(name)
        return curve[-1][1] if curve else None


def _is_table(table: object) -> TypeGuard[Results]:
    """Whether a value that was read from a file has the rows and columns of a results table."""
    if not isinstance(table, dict) or not set(WHO) <= table.keys():
        return False
    return all(row is None or (isinstance(row, dict) and HEADINGS.keys() <= row.keys()) for row in table.values())


def headings(rows: Iterable[Mapping[str, object] | None]) -> dict[str, str]:
    """The columns of results tables and their titles; with the score if a row has it."""
    scored = any(SCORE in row for row in rows if row is not None)
    return {**HEADINGS, **({SCORE: SCORE} if scored else {})}


def formatted_results(results: Results) -> list[list[str]]:
    """The rows of a results table as text: name, then one cell per heading."""
    rows, columns = [], headings(results.values())
    for name, values in results.items():
        found = {column: (values or {}).get(column) for column in columns}
        rows.append([name.replace("_", " "), *(_formatted(column, value) for column, value in found.items())])
    return rows


def results_table(results: Results) -> str:
    """A results table in Markdown."""
    return markdown_table(["", *headings(results.values()).values()], formatted_results(results))


def _formatted(column: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if column in SHARES else f"{value:.3f}"


def resolved_source(source: object) -> object:
    """The absolute path of a file or folder of rows, or of each in a list; anything else unchanged."""
    if isinstance(source, list):
        return [resolved_source(part) for part in source]
    if not isinstance(source, str):
        return source
    path = Path(os.path.expanduser(os.path.expandvars(source)))  # an unset variable of another machine is no error
    return str(path.resolve()) if path.exists() else source


def flatten_config(config: object, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names as on the command line (without `init_args`)."""
    if not isinstance(config, dict) or not config:
        return {prefix: config} if prefix else {}
    out: dict[str, Any] = {}
    for name, value in config.items():
        inside = prefix if name == "init_args" else f"{prefix}.{name}" if prefix else str(name)
        out |= flatten_config(value, inside)
    return out


def curves(root: Path) -> dict[str, Curve]:
    """Every scalar of a run: from `ROOT/tensorboard`, else from the newest event file or `metrics.csv` found."""
    if found := scalars(root / "tensorboard"):
        return found
    ours = [path for path in root.rglob("*") if not path.relative_to(root).parts[0].startswith("earlier-")]
    newest = sorted(ours, key=lambda path: path.stat().st_mtime, reverse=True)
    for path in newest:
        if path.name.startswith("events.out.tfevents.") and (found := scalars(path.parent)):
            return found
    return next((_csv(path) for path in newest if path.name == "metrics.csv"), {})


def _csv(path: Path) -> dict[str, Curve]:
    """Scalars of Lightning's CSVLogger: a row per step, a column per scalar, empty if it was not logged."""
    found: dict[str, dict[int, float]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    found.setdefault(name, {})[int(row["step"])] = float(value)
    return {name: sorted(steps.items()) for name, steps in found.items()}


def scalars(folder: Path) -> dict[str, Curve]:
    """Every scalar in a folder of TensorBoard events; the later value of a step that was logged twice."""
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
    """Names of the arguments in which the methods of some runs differ."""
    names = {name for run in runs for name in run.method}
    return sorted(name for name in names if len({repr(run.method.get(name)) for run in runs}) > 1)


def repetitions(runs: Sequence[RunFolder]) -> list[list[RunFolder]]:
    """The runs in groups that differ only in seeds, in the order of their first members."""
    groups: dict[str, list[RunFolder]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run.method, sort_keys=True, default=str), []).append(run)
    return list(groups.values())
