"""Lightning callbacks: checkpoints, export, results, reports, TensorBoard, regeneration."""

from kd_lightning.callbacks.baselines import Baselines
from kd_lightning.callbacks.checkpoint import RunCheckpoint
from kd_lightning.callbacks.export import HFExport
from kd_lightning.callbacks.generation_eval import GenerationQuality
from kd_lightning.callbacks.predictions import Predictions
from kd_lightning.callbacks.regenerate import Regeneration
from kd_lightning.callbacks.report import Report
from kd_lightning.callbacks.results import ResultsTable
from kd_lightning.callbacks.run_config import RunConfig
from kd_lightning.callbacks.samples import Samples
from kd_lightning.callbacks.tensorboard import Dashboard

__all__ = [
    "Baselines",
    "Dashboard",
    "GenerationQuality",
    "HFExport",
    "Predictions",
    "Regeneration",
    "Report",
    "ResultsTable",
    "RunCheckpoint",
    "RunConfig",
    "Samples",
]
