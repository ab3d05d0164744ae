"""Knowledge distillation of language models for PyTorch Lightning.

Every public name is here, and imported when it is first used: the losses need torch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "schedules": ("Schedule", "Weight", "Linear", "Cosine", "TAIDSchedule", "ResponseGap"),
    "divergences": (
        "Divergence",
        "Composite",
        "ForwardKL",
        "ReverseKL",
        "SymmetricKL",
        "GeneralizedJSD",
        "TotalVariation",
        "AdaptiveKL",
        "AlphaDivergence",
        "AlphaBeta",
        "WeightedSum",
    ),
    "assistants": ("Assistant", "AlphaMixture", "ArithmeticMixture", "GeometricMixture"),
    "objectives": ("Objective", "SkewKL", "SkewReverseKL", "TAID", "AMiD", "Contrastive"),
    "label_losses": ("LabelLoss", "CrossEntropy", "ClippedPolicyGradient", "SampledReverseKL"),
    "engine": ("Head",),
    "losses": ("DistillationLoss", "LossParts", "distillation_loss", "fused_distillation_loss"),
    "metrics": ("TokenMean", "DivergenceMetric", "NLL", "Agreement", "Entropy", "BeatsTeacher", "CalibrationError"),
    "metric_buckets": ("ByPosition", "BySource"),
    "lora": ("LoRA",),
    "teachers": (
        "Teacher",
        "HFTeacher",
        "OffloadedTeacher",
        "AdapterOffTeacher",
        "CachedTeacher",
        "body_and_head",
    ),
    "rollout": ("ResponseSource", "OnPolicy", "AdaptiveReplay", "MiniLLM"),
    "module": ("DistillationModule",),
    "strategies": ("FSDP2Strategy",),
    "data.instruction": ("InstructionDataModule",),
    "data.contrastive": ("ContrastiveDataModule",),
    "data.prompted": ("PromptDataModule",),
    "regeneration": ("Regeneration",),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    """Import a public name from its file."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """Public names, imported yet or not."""
    return sorted({*globals(), *_HOMES})


if TYPE_CHECKING:  # the same names for type checkers and editors
    from kd_lightning.assistants import AlphaMixture as AlphaMixture
    from kd_lightning.assistants import ArithmeticMixture as ArithmeticMixture
    from kd_lightning.assistants import Assistant as Assistant
    from kd_lightning.assistants import GeometricMixture as GeometricMixture
    from kd_lightning.data.contrastive import ContrastiveDataModule as ContrastiveDataModule
    from kd_lightning.data.instruction import InstructionDataModule as InstructionDataModule
    from kd_lightning.data.prompted import PromptDataModule as PromptDataModule
    from kd_lightning.divergences import AdaptiveKL as AdaptiveKL
    from kd_lightning.divergences import AlphaBeta as AlphaBeta
    from kd_lightning.divergences import AlphaDivergence as AlphaDivergence
    from kd_lightning.divergences import Composite as Composite
    from kd_lightning.divergences import Divergence as Divergence
    from kd_lightning.divergences import ForwardKL as ForwardKL
    from kd_lightning.divergences import GeneralizedJSD as GeneralizedJSD
    from kd_lightning.divergences import ReverseKL as ReverseKL
    from kd_lightning.divergences import SymmetricKL as SymmetricKL
    from kd_lightning.divergences import TotalVariation as TotalVariation
    from kd_lightning.divergences import WeightedSum as WeightedSum
    from kd_lightning.engine import Head as Head
    from kd_lightning.label_losses import ClippedPolicyGradient as ClippedPolicyGradient
    from kd_lightning.label_losses import CrossEntropy as CrossEntropy
    from kd_lightning.label_losses import LabelLoss as LabelLoss
    from kd_lightning.label_losses import SampledReverseKL as SampledReverseKL
    from kd_lightning.lora import LoRA as LoRA
    from kd_lightning.losses import DistillationLoss as DistillationLoss
    from kd_lightning.losses import LossParts as LossParts
    from kd_lightning.losses import distillation_loss as distillation_loss
    from kd_lightning.losses import fused_distillation_loss as fused_distillation_loss
    from kd_lightning.metric_buckets import ByPosition as ByPosition
    from kd_lightning.metric_buckets import BySource as BySource
    from kd_lightning.metrics import NLL as NLL
    from kd_lightning.metrics import Agreement as Agreement
    from kd_lightning.metrics import BeatsTeacher as BeatsTeacher
    from kd_lightning.metrics import CalibrationError as CalibrationError
    from kd_lightning.metrics import DivergenceMetric as DivergenceMetric
    from kd_lightning.metrics import Entropy as Entropy
    from kd_lightning.metrics import TokenMean as TokenMean
    from kd_lightning.module import DistillationModule as DistillationModule
    from kd_lightning.objectives import TAID as TAID
    from kd_lightning.objectives import AMiD as AMiD
    from kd_lightning.objectives import Contrastive as Contrastive
    from kd_lightning.objectives import Objective as Objective
    from kd_lightning.objectives import SkewKL as SkewKL
    from kd_lightning.objectives import SkewReverseKL as SkewReverseKL
    from kd_lightning.regeneration import Regeneration as Regeneration
    from kd_lightning.rollout import AdaptiveReplay as AdaptiveReplay
    from kd_lightning.rollout import MiniLLM as MiniLLM
    from kd_lightning.rollout import OnPolicy as OnPolicy
    from kd_lightning.rollout import ResponseSource as ResponseSource
    from kd_lightning.schedules import Cosine as Cosine
    from kd_lightning.schedules import Linear as Linear
    from kd_lightning.schedules import ResponseGap as ResponseGap
    from kd_lightning.schedules import Schedule as Schedule
    from kd_lightning.schedules import TAIDSchedule as TAIDSchedule
    from kd_lightning.schedules import Weight as Weight
    from kd_lightning.strategies import FSDP2Strategy as FSDP2Strategy
    from kd_lightning.teachers import AdapterOffTeacher as AdapterOffTeacher
    from kd_lightning.teachers import CachedTeacher as CachedTeacher
    from kd_lightning.teachers import HFTeacher as HFTeacher
    from kd_lightning.teachers import OffloadedTeacher as OffloadedTeacher
    from kd_lightning.teachers import Teacher as Teacher
    from kd_lightning.teachers import body_and_head as body_and_head
