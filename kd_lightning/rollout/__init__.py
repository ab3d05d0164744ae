"""Responses generated during the run: on-policy, replay, MiniLLM."""

from kd_lightning.models.generate import Sampling
from kd_lightning.rollout.base import ResponseSource, RolloutContext
from kd_lightning.rollout.minillm import MiniLLM
from kd_lightning.rollout.on_policy import OnPolicy
from kd_lightning.rollout.replay import AdaptiveReplay, ReplayBuffer

__all__ = ["AdaptiveReplay", "MiniLLM", "OnPolicy", "ReplayBuffer", "ResponseSource", "RolloutContext", "Sampling"]
