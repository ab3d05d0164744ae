"""The callback that writes `report.md` and the model card."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_info

from kd_lightning.atomic_io import atomic_file
from kd_lightning.callbacks.results import ResultsTable
from kd_lightning.data.base import datamodule_of
from kd_lightning.distributed.trainer import is_fast_dev_run
from kd_lightning.reporting.model_card import model_card
from kd_lightning.reporting.run_dir import RunFolder
from kd_lightning.reporting.run_report import page
from kd_lightning.training.optimization import AccumulatingModule


class Report(L.Callback):
    """Write `ROOT/report.md` after a fit: setup, results table, curves with baselines, samples, warnings.

    The exported student gets a model card, `ROOT/student/README.md`: figures, data, models, loss and arguments.

    It acts in `teardown`, after every `on_fit_end`.
    """

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write the report, on rank 0."""
        root = Path(trainer.default_root_dir)
        if (
            stage != "fit"
            or is_fast_dev_run(trainer)
            or not trainer.is_global_zero
            or not (root / "config.yaml").is_file()
        ):
            return
        for logger in trainer.loggers:
            logger.save()
        table = next((part for part in trainer.callbacks if isinstance(part, ResultsTable)), None)  # type: ignore[attr-defined]
        datamodule = datamodule_of(trainer)
        counts = {} if datamodule is None else datamodule.report
        notes = pl_module.run_notes if isinstance(pl_module, AccumulatingModule) else []
        samples = [] if table is None else table.samples
        run = RunFolder.read(root)
        with atomic_file(root / "report.md") as part:
            part.write_text(page(run, counts, samples, notes), encoding="utf-8")
        if (root / "student").is_dir():
            with atomic_file(root / "student" / "README.md") as part:
                part.write_text(model_card(run), encoding="utf-8")
        saved = {"student": "student/ (Hugging Face format)", "report.md": "report.md", "tensorboard": "tensorboard/"}
        saved["checkpoints/last.ckpt"] = "checkpoints/last.ckpt"
        rank_zero_info(f"Saved in {root}: {', '.join(text for name, text in saved.items() if (root / name).exists())}")
