"""Shipped configs with random damage: each is built, or refused with one line before anything is written."""

from __future__ import annotations

import copy
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

import runs
from kd_lightning.cli.error_messages import expected, explain
from kd_lightning.cli.program import run

MUTATIONS = 120
STRANGE: list[Any] = [None, True, -1, 0, 3.7, 10**30, -2.5, float("nan"), float("inf"), "", "x", "a b", "../", [], [1]]
STRANGE += [{}, {"a": 1}, {"class_path": "torch.nn.ReLU"}, {"class_path": "Nope"}, {"class_path": 3}, [[]], "1e-3", "~"]
NAMES = ["widgets", "lr", "class_path", "init_args", "__path__", "max_stepz", "student.x", "", "a-b"]


def places(config: dict[str, Any], above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The keys of a configuration at any depth, as paths."""
    found = []
    for name, value in config.items():
        found.append((*above, name))
        if isinstance(value, dict):
            found += places(value, (*above, name))
    return found


def damaged(config: dict[str, Any], rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A copy of a configuration with one key changed, added or deleted, and what was done."""
    found = copy.deepcopy(config)
    path = rng.choice(places(found))
    section = found
    for name in path[:-1]:
        section = section[name]
    kind = rng.choice(["replace", "replace", "replace", "number", "delete", "add"])
    if kind == "delete":
        del section[path[-1]]
    elif kind == "add":
        section[rng.choice(NAMES)] = rng.choice(STRANGE)
    elif kind == "number" and isinstance(section[path[-1]], (int, float)):
        section[path[-1]] = rng.choice([-1, 0, 1e30, -1e-9, 0.5, section[path[-1]] * -1])
    else:
        section[path[-1]] = rng.choice(STRANGE)
    return f"{kind} {'.'.join(path)}", found


@pytest.mark.slow
def test_a_damaged_config(tmp_path: Path) -> None:
    rng = random.Random(20261128)
    shipped = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(runs.CONFIGS.glob("*.yaml"))]
    counts: Counter[str] = Counter()
    broken = []
    for number in range(MUTATIONS):
        what, config = damaged(rng.choice(shipped), rng)
        path, root = tmp_path / "config.yaml", tmp_path / "runs" / str(number)
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        words = ["fit", "--config", str(path), "--trainer.default_root_dir", str(root), *runs.CPU, *runs.QUIET]
        try:
            cli = run(words, start=False)
            cli.model.check_optimizer()
            counts["built"] += 1
        except Exception as error:
            text = explain(error)
            counts["refused"] += 1
            if not expected(error) or "\n" in text or not text:
                broken.append(f"{what}: {type(error).__name__}: {text[:300]}")
        if root.exists():
            broken.append(f"{what}: wrote {root}")
    print(dict(counts))
    assert not broken, "\n".join(broken)
    assert counts["built"] > 10
    assert counts["refused"] > 40
