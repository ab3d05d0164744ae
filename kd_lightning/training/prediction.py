"""Responses of a trained student to prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.models.hf_adapter import base_model, eos_token_ids
from kd_lightning.training.base import StudentTeacherModule


class PredictingModule(StudentTeacherModule):
    """A module whose `predict_step` generates the student's responses."""

    _max_new_tokens = 32

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Greedy responses to left-padded prompts.

        Returns:
            `row_ids` [B]; `responses`, token ids [B, up to max_new_tokens]; `finished` [B], whether a response has
            ended, or was cut.
        """
        responses, finished = greedy_responses(self.student, batch, self._max_new_tokens)
        return {"row_ids": batch["row_ids"], "responses": responses, "finished": finished}

    def set_max_new_tokens(self, max_new_tokens: int) -> None:
        """Set the longest response of `predict_step`, in tokens; it is 32 otherwise.

        Raises:
            ValueError: it is below 1.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self._max_new_tokens = max_new_tokens


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
