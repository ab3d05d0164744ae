"""Losses of a batch, from logits or from hidden states."""

from kd_lightning.losses.arguments import REDUCTIONS, check_monitors
from kd_lightning.losses.distillation import DistillationLoss
from kd_lightning.losses.functional import distillation_loss, fused_distillation_loss
from kd_lightning.losses.loss_parts import LossParts

__all__ = [
    "REDUCTIONS",
    "DistillationLoss",
    "LossParts",
    "check_monitors",
    "distillation_loss",
    "fused_distillation_loss",
]
