"""Responses from a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def generate(model: Any, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int = 32) -> Tensor:
    """Greedy responses to left-padded prompts, dropout off.

    Args:
        model: a causal LM; its mode (train or eval) is put back afterwards.
        input_ids: prompts, padded on the left, [B, T].
        attention_mask: 1 where there is a token, [B, T].
        max_new_tokens: longest response, > 0.

    Returns:
        Response tokens, [B, up to max_new_tokens]; after the end of a response, padding.

    Raises:
        ValueError: `max_new_tokens` is not positive.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    config = model.generation_config
    eos = config.eos_token_id
    pad = config.pad_token_id if config.pad_token_id is not None else (eos[0] if isinstance(eos, list) else eos)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            tokens: Tensor = model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=pad,
            )
    finally:
        model.train(training)
    return tokens[:, input_ids.shape[1] :]
