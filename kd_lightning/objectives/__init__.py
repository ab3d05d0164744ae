"""Objectives: which two distributions are compared on which responses, and how much each token counts."""

from kd_lightning.constants import SOURCES
from kd_lightning.objectives.contrastive import Contrastive, OnSource
from kd_lightning.objectives.objective import ROLES, TAID, AMiD, Objective, SkewKL, SkewReverseKL
from kd_lightning.objectives.weighted import Weighted

__all__ = [
    "ROLES",
    "SOURCES",
    "TAID",
    "AMiD",
    "Contrastive",
    "Objective",
    "OnSource",
    "SkewKL",
    "SkewReverseKL",
    "Weighted",
]
