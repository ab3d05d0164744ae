"""The configuration of a run, saved in its folder."""

from __future__ import annotations

import json
from pathlib import Path

import lightning.pytorch as L
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from kd_lightning.atomic_io import atomic_file, first_unused_path
from kd_lightning.callbacks.tensorboard import RunLogger
from kd_lightning.data.base import DistillationDataModule, datamodule_of
from kd_lightning.distributed.collectives import check_ranks_agree
from kd_lightning.distributed.trainer import is_fast_dev_run
from kd_lightning.reporting.redaction import redact_value


class RunConfig(L.Callback):
    """Save `ROOT/config.yaml`, which repeats the run, and `ROOT/rows.json`, once every check before step 0 has passed.

    `rows.json` has a line for each split that changes with its rows: runs on different rows are not comparable. Curves
    and tables of another run in the same folder are moved to `ROOT/earlier-N`.

    Args:
        text: the configuration as YAML.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._earlier: list[Path] = []
        self._fresh = False

    def find_earlier_files(self, root: str | Path) -> None:
        """Find the curves and tables of another run; call it before a logger writes, and not for a resumed run."""
        root = Path(root)
        candidates = [root / "results.json", root / "report.md", *root.glob("tensorboard/*")]
        self._earlier = [path for path in candidates if path.exists()]
        self._fresh = True

    def setup(self, trainer: Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that all ranks were started with the same configuration."""
        check_ranks_agree({"configuration": self.text})

    def on_fit_start(self, trainer: Trainer, pl_module: L.LightningModule) -> None:
        """Open the logger, and save the configuration of a fresh run; the first step may be far away."""
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.open_writer()
        if self._fresh:
            self._write(trainer)

    def on_train_batch_start(self, trainer: Trainer, *args: object, **kwargs: object) -> None:
        """Save the configuration of a resumed run, after every check before step 0 has passed."""
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
            rank_zero_info(f"{root} held another run: moved its curves and tables to {aside}")
        with atomic_file(root / "config.yaml") as part:
            part.write_text(self.text, encoding="utf-8")
        with atomic_file(root / "rows.json") as part:
            part.write_text(json.dumps(split_digests(datamodule_of(trainer)), indent=2) + "\n", encoding="utf-8")


def split_digests(datamodule: DistillationDataModule | None) -> dict[str, str]:
    """A line for each loaded split that changes with its rows; without training rows that get generated responses."""
    if datamodule is None:
        return {}
    later = datamodule.accepts_responses
    return {
        name: redact_value(text)
        for name, text in datamodule.description().items()
        if not (later and name == "train rows")
    }
