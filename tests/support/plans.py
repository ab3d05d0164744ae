"""Plans of tiny runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import runs
from kd_lightning.cli.plan import main


def shapes(folder: Path, **configs: dict[str, Any]) -> list[str]:
    """Words that name folders with nothing but a configuration in them."""
    words = []
    for role, config in configs.items():
        (folder / role).mkdir(parents=True)
        (folder / role / "config.json").write_text(json.dumps(config))
        words += [f"--model.{role}", str(folder / role)]
    return words


def planned(folder: Path, *words: str) -> dict[str, Any]:
    """What the command says about a run with these words."""
    usual = ["--config", str(runs.CONFIGS / "quickstart.yaml"), "--trainer.default_root_dir", str(folder / "root")]
    assert main([*usual, "--trainer.accelerator", "cpu", "--json", str(folder / "plan.json"), *words]) == 0
    return json.loads((folder / "plan.json").read_text())
