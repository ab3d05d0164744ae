"""What TensorBoard shows: four charts, the run in words, figures of every validation, final metrics."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from kd_lightning.distributed.trainer import is_fast_dev_run
from kd_lightning.engine.label_mask import next_token_mask
from kd_lightning.reporting import figures
from kd_lightning.reporting.run_dir import flatten_config
from kd_lightning.reporting.run_report import SET_UP

CHARTS = {
    "quality against baselines": ["val/ce", "baseline/teacher_nll", "baseline/student_before_nll", "baseline/run_nll"],
    "divergences": ["val/forward_kl", "val/reverse_kl", "val/jsd", "val/total_variation"],
    "parts of the loss": ["train/loss", "train/kd", "train/ce", "component/.*"],
    "schedules": ["schedule/.*", "train/student_share"],
}
PLACES = 32  # of a response; later tokens go into the last
BINS = 20  # of a probability


class Dashboard(L.Callback):
    """Lay out TensorBoard and draw what curves cannot show; with another logger it does nothing.

    Figures of every validation: share of tokens on which both models agree, and forward KL on the teacher's head and
    tail, by place in the response; probability of the label, the student's against the teacher's. At the end
    hyper-parameters with the last metrics.

    Args:
        text: every argument of the run as YAML; shown as text and as hyper-parameters.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._places = torch.zeros(4, PLACES)
        self._probabilities = torch.zeros(BINS, BINS)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lay out the charts and say what the run is."""
        for writer in summary_writers(trainer):
            charts = {title: ["Multiline", [_exactly(tag) for tag in tags]] for title, tags in CHARTS.items()}
            writer.add_custom_scalars({"distillation": charts})
            writer.add_text("config", "```yaml\n" + self.text + "\n```")

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the sums of the figures."""
        self._places = torch.zeros(4, PLACES, device=pl_module.device)  # tokens, agreeing ones, KL, KL on the head
        self._probabilities = torch.zeros(BINS, BINS, device=pl_module.device)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Add a batch to the sums."""
        if not outputs or "agreement" not in outputs:
            return
        counted = next_token_mask(batch["labels"])
        place = (counted.cumsum(1) - 1)[counted].clamp(max=PLACES - 1)
        agreement = outputs["agreement"].float()
        ones = torch.ones_like(agreement)
        kl, head = (
            outputs[name].float() if {"head_kl", "forward_kl"} <= outputs.keys() else 0 * ones
            for name in ("forward_kl", "head_kl")
        )
        self._places.index_add_(1, place, torch.stack([ones, agreement, kl, head]))
        theirs, ours = (_bin(outputs[name]) for name in ("teacher_nll", "ce"))
        self._probabilities.view(-1).index_add_(0, theirs * BINS + ours, ones)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw, from all ranks' sums."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if trainer.world_size > 1:
            self._places = trainer.strategy.reduce(self._places, reduce_op="sum")
            self._probabilities = trainer.strategy.reduce(self._probabilities, reduce_op="sum")
        known = int((self._places[0] > 0).sum())
        if not known:
            return
        means = (self._places[1:, :known] / self._places[0, :known]).tolist()
        for writer in summary_writers(trainer):
            drawn = {"agreement by place in the response": figures.by_place(means[0])}
            if any(means[1]):
                drawn["forward KL on the teacher's head and tail"] = figures.head_and_tail(*means[1:])
            drawn["probability of the label"] = figures.label_probabilities(self._probabilities.cpu())
            for title, figure in drawn.items():
                writer.add_figure(f"validation/{title}", figure, trainer.global_step)  # one group: it is opened whole

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hyper-parameters beside the last metrics, which are there now and not at step 0."""
        from torch.utils.tensorboard.summary import hparams

        given = {k: v for k, v in flatten_config(yaml.safe_load(self.text)).items() if k.startswith(SET_UP)}
        plain = {k: v for k, v in given.items() if isinstance(v, (bool, int, float, str))}
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if not metrics:
            return
        for writer in summary_writers(trainer):
            # values of these metrics are those of the scalars of the same names
            for summary in hparams(plain, dict.fromkeys(metrics, 0.0)):  # type: ignore[no-untyped-call]
                writer.file_writer.add_summary(summary)
            writer.flush()


def summary_writers(trainer: L.Trainer) -> list[Any]:
    """The SummaryWriters of this rank; empty where the logger is another or there is nothing to be left behind."""
    if not trainer.is_global_zero or is_fast_dev_run(trainer):
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _exactly(tag: str) -> str:
    """TensorBoard reads a tag as a pattern that may match anywhere."""
    return f"^{tag}$"


def _bin(nll: Tensor) -> Tensor:
    return (nll.float().neg().exp() * BINS).long().clamp(0, BINS - 1)
