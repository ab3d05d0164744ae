"""Scripted students and batches for the tests of response sources."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.rollout.base import RolloutContext

NOT = -100


class Script(nn.Module):
    """A student that writes what it is told, and remembers how it was asked."""

    def __init__(self, tokens: list[list[int]], ends: Any = 2, places: int = 64) -> None:
        super().__init__()
        self.tokens = torch.tensor(tokens)
        self.generation_config = SimpleNamespace(eos_token_id=ends, pad_token_id=0)
        text = SimpleNamespace(vocab_size=80, max_position_embeddings=places)
        self.config = SimpleNamespace(get_text_config=lambda decoder: text)
        self.asked: dict[str, Any] = {}

    def generate(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        self.asked = {"input_ids": input_ids, "training": self.training, "grad": torch.is_grad_enabled(), **kwargs}
        return torch.cat([input_ids, self.tokens[:, : kwargs["max_new_tokens"]]], 1)


def author(student: Any, **kwargs: Any) -> RolloutContext:
    """An author around a student that is only asked to write."""
    model: Any = SimpleNamespace(student=student, call=lambda function, *a, **k: function(*a, **k))
    return RolloutContext(model, **kwargs)


def batch(*rows: tuple[list[int], list[int]], width: int | None = None) -> dict[str, Tensor]:
    """Prompts and answers, padded on the right with 0."""
    width = width or max(len(p) + len(a) for p, a in rows)
    pad = [width - len(p) - len(a) for p, a in rows]
    ids = [[*p, *a, *[0] * n] for (p, a), n in zip(rows, pad, strict=True)]
    mask = [[1] * (len(p) + len(a)) + [0] * n for (p, a), n in zip(rows, pad, strict=True)]
    labels = [[*[NOT] * len(p), *a, *[NOT] * n] for (p, a), n in zip(rows, pad, strict=True)]
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
        "row_ids": torch.arange(len(rows)),
        "source": torch.zeros(len(rows), dtype=torch.long),
    }


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
