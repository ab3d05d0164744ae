"""The configuration of a run, saved in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from kd_lightning.atomic_io import atomic_file, first_unused_path
from kd_lightning.data.base import DistillationDataModule, datamodule_of
from kd_lightning.distributed.collectives import check_ranks_agree
from kd_lightning.distributed.trainer import is_fast_dev_run


class RunConfig(L.Callback):
    """Write `ROOT/config.yaml`, which repeats the run, once every check before step 0 has passed, and `rows.json`.

    The latter has a line for each split that changes with its rows, so that runs on others are not taken for alike.
    Curves and tables that another run has left there go to `ROOT/earlier-N`, so that they are not read as this one's.

    Args:
        text: the configuration as YAML.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._earlier: list[Path] = []
        self._fresh = False

    def look(self, root: str | Path) -> None:
        """See what another run has left; before a logger writes, and not where a run goes on."""
        root = Path(root)
        there = [root / "results.json", root / "report.md", *root.glob("tensorboard/*")]
        self._earlier = [path for path in there if path.exists()]
        self._fresh = True

    def setup(self, trainer: Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """See that every rank was started with the same one."""
        check_ranks_agree({"configuration": self.text})

    def on_fit_start(self, trainer: Trainer, pl_module: L.LightningModule) -> None:
        """Write the file of a fresh run, which may have to write much else before its first step."""
        if self._fresh:
            self._write(trainer)

    def on_train_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Write the file of a run that goes on, which nobody has refused now."""
        if not self._fresh:
            self._fresh = True
            self._write(trainer)

    @rank_zero_only
    def _write(self, trainer: Trainer) -> None:
        if is_fast_dev_run(trainer):
            return
        root = Path(trainer.default_root_dir)
        if self._earlier:
            aside = first_unused_path(lambda n: root / f"earlier-{n}")
            for path in self._earlier:
                target = aside / path.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.rename(target)
            rank_zero_info(f"{root} holds another run: its curves and tables are in {aside} now")
        with atomic_file(root / "config.yaml") as part:
            part.write_text(self.text, encoding="utf-8")
        with atomic_file(root / "rows.json") as part:
            part.write_text(json.dumps(split_digests(datamodule_of(trainer)), indent=2) + "\n", encoding="utf-8")


def split_digests(datamodule: DistillationDataModule | None) -> dict[str, str]:
    """Every loaded split in a line that changes with its rows; training rows only where they are there beforehand."""
    if datamodule is None:
        return {}
    later = datamodule.accepts_responses
    return {name: text for name, text in datamodule.description().items() if not (later and name == "train rows")}
