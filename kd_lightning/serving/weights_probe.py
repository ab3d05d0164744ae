"""Tests whether a server answers with the weights of a student: log-probabilities of one prompt on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from kd_lightning.models.generate import Sampling, generate
from kd_lightning.models.hf_adapter import eos_token_ids
from kd_lightning.models.scoring.scorer import PromptScorer

LONGEST = 24
"""Tokens of a prompt that are compared, with the first, which is given."""
LARGEST_DIFFERENCE = 0.25
"""Root mean square of the differences, in nats per token: bfloat16 on one side explains less, other weights more."""
NEARER = 2.0
"""A server has the previous weights if its answers are so many times nearer to them than to the new ones."""
FLOOR = -20.0
"""Log-probabilities below are compared as this one: their rounding errors are large, and vLLM cuts them off."""
ROUNDING = 1e-4
"""Differences that are rounding in float32, in nats per token."""


@dataclass(frozen=True)
class WeightsProbe:
    """A prompt and its log-probabilities by the weights of a step.

    Args:
        step: number of optimizer steps.
        ids: token ids of the prompt.
        log_probs: of each token after the first, float64.
    """

    step: int
    ids: list[int]
    log_probs: Tensor

    def check(self, scorer: PromptScorer, previous: WeightsProbe | None) -> None:
        """Check that a served model gives these log-probabilities.

        Args:
            scorer: asks the served model.
            previous: of the weights that the server had before; None: unknown.

        Raises:
            ValueError: it has other weights, or does not answer.
        """
        found = scorer.score(self.ids, "the test of its weights").of(torch.tensor(self.ids[1:]))
        distance = _distance(found, self.log_probs)
        begin = f"server {scorer.client.url}, model {scorer.model!r},"
        if previous is not None and previous.ids == self.ids:
            before = _distance(found, previous.log_probs)
            if distance > NEARER * before + ROUNDING:
                raise ValueError(
                    f"{begin} still answers with the weights of step {previous.step} instead of step {self.step}: its "
                    "log-probabilities did not change. It has not loaded the new weights"
                )
        if not distance <= LARGEST_DIFFERENCE:
            raise ValueError(
                f"{begin} answers with other weights than the student's at step {self.step}: its log-probabilities "
                f"of a prompt differ by {distance:.3g} nats per token (at most {LARGEST_DIFFERENCE}). It has not "
                "loaded them, or serves another base model"
            )


def weights_probe(student: PreTrainedModel, step: int, prompt: Sequence[int]) -> WeightsProbe:
    """The log-probabilities of the beginning of a prompt. A collective if the student is sharded.

    The prompt is generated with each token given: a strategy that shards the student gathers it in `generate`. Tokens
    that end a response are left out, because they would end it.

    Args:
        student: the model.
        step: number of optimizer steps that it has learned.
        prompt: token ids; the same on all ranks.

    Raises:
        ValueError: the prompt has no token that does not end a response.
    """
    ids = [int(token) for token in prompt if token not in eos_token_ids(student)][:LONGEST]
    if not ids:
        raise ValueError("the prompt for the test of a server's weights has no token")
    ids = ids if len(ids) > 1 else [*ids, *ids]
    given = GivenTokens(ids)
    start = torch.tensor([ids[:1]], device=next(student.parameters()).device)
    generate(student, start, torch.ones_like(start), Sampling(len(ids) - 1, 0.0), processors=[given])
    return WeightsProbe(step, ids, torch.stack(given.log_probs))


class GivenTokens(LogitsProcessor):
    """Generates given tokens, and keeps their log-probabilities.

    Args:
        ids: the tokens, the first of which is the prompt.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = ids
        self.log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores that leave only the given token."""
        token = self.ids[input_ids.shape[1]]
        self.log_probs.append(scores[0].double().log_softmax(-1)[token].cpu())
        only = torch.full_like(scores, -torch.inf)
        only[:, token] = 0.0
        return only


def _distance(a: Tensor, b: Tensor) -> float:
    """Root mean square of the difference, where tokens that are all but impossible count alike."""
    return float((a.clamp_min(FLOOR) - b.clamp_min(FLOOR)).square().mean().sqrt())
