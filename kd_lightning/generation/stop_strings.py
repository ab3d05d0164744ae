"""Ends responses at stop strings, row by row."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor
from transformers import StoppingCriteria

from kd_lightning.models.generate import Sampling

MARGIN = 8
"""Characters at the edges of decoded tokens that differ in a longer text: parts of a character, a leading space."""


class StopStrings(StoppingCriteria):
    """Ends a row of a batch as soon as its text contains a stop string, whatever the other rows contain.

    At each step only the last tokens of a row are decoded: enough for the longest stop string. A match is confirmed in
    the text of all tokens of the response.

    Args:
        sampling: `stop` and `min_new_tokens`.
        decode: the text of token ids.
        eos_token_ids: that end a response; they are no part of its text.

    Attributes:
        found: the responses that were ended, by row: their number of tokens, and their text before the stop string.
    """

    def __init__(self, sampling: Sampling, decode: Callable[[list[int]], str], eos_token_ids: Collection[int]) -> None:
        self.sampling = sampling
        self.found: dict[int, tuple[int, str]] = {}
        self._decode = decode
        self._eos = frozenset(eos_token_ids)
        self._longest = max(map(len, sampling.stop))
        self._ids: list[list[int]] = []
        self._starts: list[int] = []  # of the last tokens that are decoded
        self._over: list[bool] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        """Which rows are over, after each new token of the batch, [B]."""
        tokens = input_ids[:, -1].tolist()
        if not self._over:
            self._ids = [[] for _ in tokens]
            self._starts, self._over = [0] * len(tokens), [False] * len(tokens)
        for row, token in enumerate(tokens):
            if not self._over[row]:
                self._over[row] = token in self._eos or self._ends(row, token)
        return torch.tensor(self._over, device=input_ids.device)

    def _ends(self, row: int, token: int) -> bool:
        """Add a token to a row; whether its text contains a stop string now."""
        ids, start = self._ids[row], self._starts[row]
        ids.append(token)
        tail = self._decode(ids[start:])
        if any(text in tail for text in self.sampling.stop):
            text = self._decode(ids)
            position = self._position(ids, text)
            if position is not None:
                self.found[row] = (len(ids), text[:position])
                return True
        if len(tail) > 4 * (self._longest + MARGIN):
            middle = (start + len(ids)) // 2
            rest = self._decode(ids[middle:])[MARGIN:]
            # a tail that begins within a character can be garbled up to its end
            if len(rest) >= self._longest and tail.endswith(rest) and "\ufffd" not in rest:
                self._starts[row] = middle
        return False

    def _position(self, ids: list[int], text: str) -> int | None:
        """Where the first stop string begins that is not complete within the first `min_new_tokens` tokens."""
        least = self.sampling.min_new_tokens
        passed = len(self._decode(ids[:least]).rstrip("\ufffd")) if least else 0
        positions = [text.find(stop, max(0, passed - len(stop) + 1)) for stop in self.sampling.stop]
        return min((position for position in positions if position >= 0), default=None)
