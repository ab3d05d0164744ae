"""The TensorBoard logger and dashboard: charts, the configuration as text, figures of every validation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as L
import torch
import yaml
from lightning.fabric.loggers.logger import _DummyExperiment, rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from kd_lightning.console import printable
from kd_lightning.distributed.trainer import is_fast_dev_run
from kd_lightning.engine.label_mask import next_token_mask
from kd_lightning.metrics.bucketed import response_positions
from kd_lightning.reporting import figures
from kd_lightning.reporting.markdown import code_block
from kd_lightning.reporting.run_dir import flatten_config
from kd_lightning.reporting.run_report import SETUP

Batch = dict[str, Tensor]

CHARTS = {
    "quality against baselines": ["val/ce", "baseline/teacher_nll", "baseline/student_before_nll", "baseline/run_nll"],
    "divergences": ["val/forward_kl", "val/reverse_kl", "val/jsd", "val/total_variation"],
    "terms of the loss": ["train/loss", "train/kd", "train/ce", "component/.*"],
    "schedules": ["schedule/.*", "train/student_share"],
}
POSITIONS = 32  # later tokens of a response are added to the last one
BINS = 20  # bins of a probability


class Dashboard(L.Callback):
    """Lay out TensorBoard and add figures; does nothing with another logger.

    Figures of every validation: by position in the response, the share of tokens on which both models agree, and
    forward KL on the top and the tail of the teacher's distribution; the student's probability of the label against
    the teacher's. At the end, hyperparameters with the last metrics.

    Args:
        text: every argument of the run as YAML, shown as text and as hyperparameters.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._by_position = torch.zeros(4, POSITIONS)
        self._probabilities = torch.zeros(BINS, BINS)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lay out the charts and show the configuration."""
        for writer in summary_writers(trainer):
            charts = {title: ["Multiline", [_exactly(tag) for tag in tags]] for title, tags in CHARTS.items()}
            writer.add_custom_scalars({"distillation": charts})
            writer.add_text("config", code_block(self.text, "yaml"))

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reset the sums of the figures."""
        self._by_position = torch.zeros(4, POSITIONS, device=pl_module.device)  # tokens, agreement, KL, KL on the top
        self._probabilities = torch.zeros(BINS, BINS, device=pl_module.device)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Batch, *args: object
    ) -> None:
        """Add a batch to the sums."""
        if not isinstance(outputs, Mapping) or "agreement" not in outputs:
            return
        positions = response_positions(batch["labels"][:, 1:])[next_token_mask(batch["labels"])]
        position = positions.clamp(max=POSITIONS - 1)
        agreement = outputs["agreement"].float()
        ones = torch.ones_like(agreement)
        kl, top = (
            outputs[name].float() if {"head_kl", "forward_kl"} <= outputs.keys() else 0 * ones
            for name in ("forward_kl", "head_kl")
        )
        self._by_position.index_add_(1, position, torch.stack([ones, agreement, kl, top]))
        teacher, student = (_bin(outputs[name]) for name in ("teacher_nll", "ce"))
        self._probabilities.view(-1).index_add_(0, teacher * BINS + student, ones)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the figures from the sums over all ranks."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if trainer.world_size > 1:
            self._by_position = trainer.strategy.reduce(self._by_position, reduce_op="sum")
            self._probabilities = trainer.strategy.reduce(self._probabilities, reduce_op="sum")
        known = int((self._by_position[0] > 0).sum())
        if not known:
            return
        means = (self._by_position[1:, :known] / self._by_position[0, :known]).tolist()
        for writer in summary_writers(trainer):
            drawn = {"agreement by position in the response": figures.agreement_by_position(means[0])}
            if any(means[1]):
                drawn["forward KL on the top and the tail of the teacher"] = figures.top_and_tail(*means[1:])
            drawn["probability of the label"] = figures.label_probabilities(self._probabilities.cpu())
            for title, figure in drawn.items():
                writer.add_figure(f"validation/{title}", figure, trainer.global_step)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add hyperparameters with the last metrics; at step 0 there are no metrics yet."""
        from torch.utils.tensorboard.summary import hparams

        arguments = {k: v for k, v in flatten_config(yaml.safe_load(self.text)).items() if k.startswith(SETUP)}
        values = {k: printable(v) if isinstance(v, str) else v for k, v in arguments.items()}
        plain = {k: v for k, v in values.items() if isinstance(v, (bool, int, float, str))}
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if not metrics:
            return
        for writer in summary_writers(trainer):
            # TensorBoard takes the values of these metrics from the scalars of the same names
            for summary in hparams(plain, dict.fromkeys(metrics, 0.0)):  # type: ignore[no-untyped-call]
                writer.file_writer.add_summary(summary)
            writer.flush()


def summary_writers(trainer: L.Trainer) -> list[Any]:
    """The SummaryWriters of this rank; empty for other loggers, other ranks than 0, and a `fast_dev_run`."""
    if not trainer.is_global_zero or is_fast_dev_run(trainer):
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


class RunLogger(TensorBoardLogger):
    """Lightning's logger, which writes nothing before `open`, or before the first metric.

    Lightning creates the files of its loggers before it sets up data and models: a run that is refused there would
    leave them behind.
    """

    _opened = False

    def open_writer(self) -> None:
        """Create the file of events at its next use."""
        self._opened = True

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The SummaryWriter; before `open` an object that ignores every call."""
        return super().experiment if self._opened else _DummyExperiment()

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics: the run has begun."""
        self.open_writer()
        super().log_metrics(metrics, step)


def _exactly(tag: str) -> str:
    """A pattern for this tag alone: TensorBoard matches a pattern anywhere in a tag."""
    return f"^{tag}$"


def _bin(nll: Tensor) -> Tensor:
    return (nll.float().neg().exp() * BINS).long().clamp(0, BINS - 1)
