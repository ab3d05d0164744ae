"""Torchmetrics that compare a student with its teacher."""

from kd_lightning.metrics.bucketed import ByPosition, BySource
from kd_lightning.metrics.per_token import (
    NLL,
    Agreement,
    BeatsTeacher,
    CalibrationError,
    DivergenceMetric,
    Entropy,
    TokenMean,
)

__all__ = [
    "NLL",
    "Agreement",
    "BeatsTeacher",
    "ByPosition",
    "BySource",
    "CalibrationError",
    "DivergenceMetric",
    "Entropy",
    "TokenMean",
]
