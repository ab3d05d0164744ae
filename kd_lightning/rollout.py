"""Responses from a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_sampling(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Refuse settings of generation that are out of range.

    Raises:
        ValueError: it names the one that is.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not temperature >= 0 or temperature == float("inf"):
        raise ValueError(f"temperature must be a number >= 0 (0: the likeliest token each time), got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")


def generate(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    max_new_tokens: int = 32,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Responses to left-padded prompts, dropout off.

    Args:
        model: a causal LM; its mode (train or eval) is put back afterwards.
        input_ids: prompts, padded on the left, [B, T].
        attention_mask: 1 where there is a token, [B, T].
        max_new_tokens: longest response, > 0.
        temperature: 0: the likeliest token each time; otherwise samples of softmax(logits / temperature).
        top_p: sample from the likeliest tokens that together have this mass, in (0, 1].
        seed: of the samples; the generators outside are left as they were.

    Returns:
        Response tokens, [B, up to max_new_tokens]; after the end of a response, padding.

    Raises:
        ValueError: a setting is out of its range.
    """
    check_sampling(max_new_tokens, temperature, top_p)
    config = model.generation_config
    eos = config.eos_token_id
    pad = config.pad_token_id if config.pad_token_id is not None else (eos[0] if isinstance(eos, list) else eos)
    # top_k, repetition penalties and the like that a folder brings along would make another distribution of it
    plain = {"top_k": 0, "top_p": top_p, "temperature": temperature, "repetition_penalty": 1.0, "min_p": None}
    sampling: dict[str, Any] = {"do_sample": True, **plain} if temperature > 0 else {"do_sample": False}
    training = model.training
    device = input_ids.device
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            tokens: Tensor = model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
                **sampling,
            )
    finally:
        model.train(training)
    return tokens[:, input_ids.shape[1] :]
