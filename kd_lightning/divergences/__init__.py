"""Divergences of the student q from the teacher p, one value per token."""

from kd_lightning.divergences.alpha import AlphaBeta, AlphaDivergence
from kd_lightning.divergences.base import (
    Composite,
    Divergence,
    WeightedTokens,
    check_divergence,
    check_one_per_token,
    described,
    evaluate,
    first_not_f_divergence,
    first_not_mergeable,
)
from kd_lightning.divergences.chunk_likelihood import (
    CHUNK_LOG_Q,
    CHUNK_STUDENT,
    CHUNK_TEACHER,
    CHUNK_TOKENS,
    ChunkLikelihood,
)
from kd_lightning.divergences.kl import AdaptiveKL, ForwardKL, GeneralizedJSD, ReverseKL, SymmetricKL, ToDi
from kd_lightning.divergences.on_support import OnSupport
from kd_lightning.divergences.total_variation import TotalVariation
from kd_lightning.divergences.weighted_sum import WeightedSum

__all__ = [
    "CHUNK_LOG_Q",
    "CHUNK_STUDENT",
    "CHUNK_TEACHER",
    "CHUNK_TOKENS",
    "AdaptiveKL",
    "AlphaBeta",
    "AlphaDivergence",
    "ChunkLikelihood",
    "Composite",
    "Divergence",
    "ForwardKL",
    "GeneralizedJSD",
    "OnSupport",
    "ReverseKL",
    "SymmetricKL",
    "ToDi",
    "TotalVariation",
    "WeightedSum",
    "WeightedTokens",
    "check_divergence",
    "check_one_per_token",
    "described",
    "evaluate",
    "first_not_f_divergence",
    "first_not_mergeable",
]
