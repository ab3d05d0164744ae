"""Responses of a trained student to prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.models.hf_adapter import base_model, eos_token_ids


def greedy_responses(student: nn.Module, batch: Mapping[str, Tensor], max_new_tokens: int) -> tuple[Tensor, Tensor]:
    """Greedy responses to a batch of left-padded prompts.

    Args:
        student: a Hugging Face causal LM.
        batch: `input_ids` and `attention_mask`, [B, T].
        max_new_tokens: longest response.

    Returns:
        Token ids [B, up to max_new_tokens], and whether each response has ended [B]; False: it was cut.
    """
    from kd_lightning.models.generate import Sampling, generate

    model: Any = student  # a Hugging Face model, or one wrapped by PEFT
    sampling = Sampling(max_new_tokens, temperature=0.0)
    responses = generate(model, batch["input_ids"], batch["attention_mask"], sampling)
    ends = torch.tensor(eos_token_ids(base_model(student)), dtype=responses.dtype, device=responses.device)
    return responses, torch.isin(responses, ends).any(1)
