"""The loss engine: hidden states and LM heads in, per-token values and gradients out, chunk by chunk."""

from kd_lightning.engine.head import Head

__all__ = ["Head"]
