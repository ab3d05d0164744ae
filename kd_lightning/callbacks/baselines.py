"""Baselines for the curves of a run: the teacher, the untrained student, and another run."""

from __future__ import annotations

import lightning.pytorch as L

from kd_lightning.callbacks.base import PreparedRun, student_and_teacher
from kd_lightning.callbacks.run_config import split_digests
from kd_lightning.data.base import DistillationDataModule, datamodule_of
from kd_lightning.distributed.trainer import is_fast_dev_run
from kd_lightning.reporting.run_dir import RunFolder, resolved_source
from kd_lightning.training.evaluation import limited_batches, token_means

SCALARS = {"nll": "val/ce", "forward_kl": "val/forward_kl", "agreement": "val/agreement"}


class Baselines(L.Callback):
    """Measure teacher and student on the validation rows before the first step, and log them as constant lines.

    `baseline/teacher_nll`, `baseline/student_before_nll` (also `…_forward_kl`, `…_agreement`), and the last validation
    of another run as `baseline/run_nll` ….

    Args:
        root: folder of another run on the same validation rows, for example supervised fine-tuning; None: none.

    Raises:
        ValueError: `root` is not the folder of a run; before step 0: it has no validation, or was validated on other
            rows.
    """

    def __init__(self, root: str | None = None) -> None:
        self.other = None if root is None else RunFolder.read(root)
        self.levels: dict[str, float] = {}

    def state_dict(self) -> dict[str, dict[str, float]]:
        """The baselines, measured once per run."""
        return {"levels": self.levels}

    def load_state_dict(self, state_dict: dict[str, dict[str, float]]) -> None:
        """Restore the baselines."""
        self.levels = state_dict["levels"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that the other run was validated on the same rows."""
        self.check(datamodule_of(trainer), trainer.limit_val_batches)

    def check(self, datamodule: DistillationDataModule | None, limit: int | float | None) -> None:
        """Check that the other run was validated on the same rows.

        Args:
            datamodule: the data module, with its validation rows loaded; None for one of another class.
            limit: `limit_val_batches` of this run.

        Raises:
            ValueError: it was validated on other rows, or not at all.
        """
        if self.other is None:
            return
        given = self.other.config.get("data.val")
        own_files = [] if datamodule is None else datamodule.sources["val"]
        files = [[given] if isinstance(given, str) else given, own_files]
        digests = [rows.get("val rows") for rows in (self.other.rows, split_digests(datamodule))]
        if (resolved_source(files[0]) != resolved_source(files[1])) if None in digests else digests[0] != digests[1]:
            theirs, ours = (
                ", ".join(map(str, [*(names or ()), text])) for names, text in zip(files, digests, strict=True)
            )
            raise ValueError(f"--baseline {self.other.root} was validated on {theirs}, but this run is on {ours}")
        limits = [self.other.config.get("trainer.limit_val_batches"), limit]
        if len({1.0 if limit is None else limit for limit in limits}) > 1:
            raise ValueError(
                f"--baseline {self.other.root} was validated with limit_val_batches {limits[0]}, but this run has "
                f"{limits[1]}"
            )
        if self.other.last("val/ce") is None:
            raise ValueError(f"--baseline {self.other.root} has no validation yet (no val/ce in its events)")

    def check_before_start(self, run: PreparedRun) -> None:
        """Check that the other run was validated on the same rows.

        Raises:
            ValueError: it was validated on other rows, or not at all.
        """
        self.check(run.datamodule, run.trainer.limit_val_batches)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure teacher and student, once per run, and log the baselines."""
        datamodule = datamodule_of(trainer)
        if is_fast_dev_run(trainer) or datamodule is None or trainer.limit_val_batches == 0:
            return
        if not datamodule.sources["val"]:
            return
        if not self.levels:
            loader = datamodule.val_dataloader()
            batches = limited_batches(loader, trainer.limit_val_batches)
            means = token_means(trainer, student_and_teacher(pl_module), loader, batches, "Validation batches")
            means["nll"] = means["student_nll"]
            self.levels = {f"baseline/student_before_{name}": means[name] for name in SCALARS if name in means}
            if "teacher_nll" in means:
                self.levels["baseline/teacher_nll"] = means["teacher_nll"]
        if self.other is not None:
            other = {name: self.other.last(scalar) for name, scalar in SCALARS.items()}
            self.levels |= {f"baseline/run_{name}": value for name, value in other.items() if value is not None}
        self._log(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Extend the constant lines to this step."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._log(trainer)

    def _log(self, trainer: L.Trainer) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(self.levels, step=trainer.global_step)
