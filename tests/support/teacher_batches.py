"""Batches for the tests of teachers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from architectures import VOCABULARY
from kd_lightning.engine.head import Head
from kd_lightning.models.backbone import hidden_states
from kd_lightning.teachers import hf as teachers


def batch(rows: int = 2, length: int = 9) -> dict[str, Tensor]:
    """Tokens, the last row padded at its end."""
    ids = torch.randint(3, VOCABULARY, (rows, length))
    mask = torch.ones_like(ids)
    mask[-1, length - 3 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def said(head: Head, hidden: Tensor) -> Tensor:
    """Logits by the head's definition."""
    z = hidden @ head.weight.T
    if head.bias is not None:
        z = z + head.bias
    z = head.scale * z
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def assert_same(model: PreTrainedModel, body: nn.Module, head: Head, atol: float = 1e-4) -> None:
    tokens = batch()
    counted = tokens["attention_mask"].bool()
    with torch.no_grad():
        expected = teachers.logits(model, **tokens)[counted]
        found = said(head, hidden_states(body, **tokens))[counted]
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)
