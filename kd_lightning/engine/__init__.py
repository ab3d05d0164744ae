"""The loss engine: per-token values and gradients from hidden states and LM heads, chunk by chunk."""

from kd_lightning.engine.head import Head

__all__ = ["Head"]
