"""Plans of tiny runs, and what real runs hold."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from torch import Tensor

import runs
from kd_lightning.cli.plan import main
from kd_lightning.engine.chunked import padded_width
from kd_lightning.memory_plan.tracker import Tracker


class Watch(L.Callback):
    """Watches the second window of a run, whose first has made the optimizer's state."""

    def __init__(self, window: int, vocabularies: Iterable[int]) -> None:
        self.window = window
        self.tracker = Tracker(widths={padded_width(size): "tiles" for size in vocabularies})

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        if batch_idx == self.window:
            learning = list(module.model.parameters())
            self.tracker.hold("student", [*learning, *module.model.buffers()])
            self.tracker.hold("gradients", [parameter.grad for parameter in learning if parameter.grad is not None])
            self.tracker.hold("optimizer", moments(trainer))
            self.tracker.hold("teacher", [*module.teacher.model.parameters(), *module.teacher.model.buffers()])
            self.tracker.hold("batch", batch.values())
            self.tracker.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2 * self.window - 1:
            self.tracker.__exit__(None, None, None)


def moments(trainer: L.Trainer) -> list[Tensor]:
    return [entry for entries in trainer.optimizers[0].state.values() for entry in entries.values()]


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
