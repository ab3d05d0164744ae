"""The test of a served teacher at the start of a run, and that it stays the same model while the run lasts."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kd_lightning.models.openai_client import RequestRefusedError, ServerError
from kd_lightning.models.scoring.scorer import Entries, PromptScorer, PromptScores

LEAST_CHANGE = 1e-4
"""A probability that differs by more has changed."""
ROUNDING = 0.02
"""The probabilities of an entry may sum to so much more than 1."""
OTHER_MODEL = 0.05
"""If a probability of the first test changes by more, another model has answered; servers batch, and round."""
FEW = 20
"""Number of tokens of each distribution that are asked for in all tests but the first."""
LABELS = 32
"""Number of labels, of some rows, that must be more probable than by chance."""
SECONDS = 60.0
"""The first test is repeated after each outage, and when the last repetition is so long ago."""


def check_scores(scorer: PromptScorer, ids: Sequence[int], vocabulary: int, longest: int = 0) -> PromptScores:
    """Test what a server answers.

    Args:
        scorer: asks the server.
        ids: a prompt of the data.
        vocabulary: number of tokens of the student.
        longest: number of tokens of the longest row.

    Returns:
        The answer to `ids`.

    Raises:
        ServerError: the server fails the test; the message says in which respect.
    """
    where = f"server {scorer.client.url} (model {scorer.model})"
    check_length(scorer, ids, longest)
    try:
        scores = scorer.score(ids, "the first test")
    except RequestRefusedError as error:
        raise ServerError(
            f"{error}; if it is about the number of log-probabilities, lower top_k, or start the server with a larger "
            f"bound (vLLM: --max-logprobs {scorer.top_k})"
        ) from None
    entries = scores.entries()
    check_distributions(where, entries, min(scorer.top_k, vocabulary), vocabulary)
    few = replace(scorer, top_k=min(scorer.top_k, FEW))
    check_positions(few, where, ids, entries, vocabulary)
    check_tokens(few, where, ids, scores, vocabulary)
    return scores


def check_length(scorer: PromptScorer, ids: Sequence[int], longest: int) -> None:
    """Refuse rows that are longer than the server reads; if it does not say how much that is, ask for such a row.

    Raises:
        ServerError: the longest row does not fit.
    """
    limit = scorer.client.max_length(scorer.model)
    advice = "lower data.max_length, or start the server with a larger bound (vLLM: --max-model-len)"
    if limit is not None and longest + 1 > limit:
        raise ServerError(
            f"server {scorer.client.url} reads {limit} tokens (max_model_len), and the longest row has {longest} and "
            f"needs one more: {advice}"
        )
    if limit is None and longest > len(ids):
        repeated = [*ids] * (longest // len(ids) + 1)
        try:
            replace(scorer, top_k=1).score(
                repeated[:longest], f"a prompt of {longest} tokens, as many as the longest row has"
            )
        except ServerError as error:
            raise ServerError(f"{error}; if it is about the length, {advice}") from None


def check_distributions(where: str, entries: Entries, k: int, vocabulary: int) -> None:
    """Refuse entries that are no log-probabilities at temperature 1, or fewer than asked for.

    Raises:
        ServerError: a sum exceeds 1, an entry has fewer than k tokens, or the other tokens must be more probable.
    """
    for token, entry in enumerate(entries, start=2):
        values = sorted(entry.values(), reverse=True)
        total = math.fsum(math.exp(min(value, 50.0)) for value in values)
        if values[0] > ROUNDING or total > 1 + ROUNDING:
            raise ServerError(
                f"{where} gives values at token {token} that are no log-probabilities: their exponentials sum to "
                f"{total:.3g}; it may send logits, or probabilities"
            )
        if len(entry) < k:
            raise ServerError(
                f"{where} gives {len(entry)} tokens at token {token} where {k} are asked for: lower top_k, or start "
                "the server with a larger bound (vLLM: --max-logprobs)"
            )
        most = 2 * vocabulary * math.exp(values[k - 1])  # of the others: each is at most as probable as the last
        if 1 - total > most + ROUNDING:
            raise ServerError(
                f"{where} gives values at token {token} that are no log-probabilities of its most probable tokens: "
                f"their probabilities sum to {total:.3g}, and the others, at most {math.exp(values[k - 1]):.2g} each, "
                "cannot add up to the rest; it may send logits, use another temperature than 1, or leave out tokens"
            )


def check_positions(scorer: PromptScorer, where: str, ids: Sequence[int], entries: Entries, vocabulary: int) -> None:
    """Test by causality that the entry of a token is the distribution before it.

    Changing token t must leave the entries up to that of t as they were, and change that of t + 1.

    Raises:
        ServerError: the entries belong to other positions.
    """
    middle = max(1, len(ids) // 2)
    again = scorer.score(ids, "the repeated test").entries()
    noise = max(map(_distance, entries, again))
    limit = max(LEAST_CHANGE, 3 * noise)  # servers batch, and round
    found = []
    for step in range(1, 4):  # another token may by chance have nearly the same effect
        changed = [*ids]
        changed[middle] = (ids[middle] + 7 * step) % vocabulary
        other = scorer.score(changed, "the test of positions").entries()
        changes = [n for n, pair in enumerate(zip(entries, other, strict=True), start=1) if _distance(*pair) > limit]
        found += changes[:1]
        if changes[:1] == [middle + 1]:
            return
    if not found:
        raise ServerError(
            f"{where} gives the same distributions after another token {middle}: it does not read the token ids that "
            "it is sent"
        )
    raise ServerError(
        f"{where} gives distributions that are off by {min(found) - middle - 1:+d}: a change of token {middle} first "
        f"changes the entry of token {min(found)}, where {middle + 1} is expected"
    )


def check_tokens(scorer: PromptScorer, where: str, ids: Sequence[int], scores: PromptScores, vocabulary: int) -> None:
    """Test that the server's tokens are those of the student: by number, and by text where it gives texts.

    Raises:
        ServerError: it has another vocabulary.
    """
    beyond = scores.ids >= vocabulary
    mass = float(scores.log_probs.exp().masked_fill(~beyond, 0.0).sum(1).max())
    if mass > 0.5:
        raise ServerError(
            f"{where} gives {mass:.0%} of its probability to tokens that the student does not have (token "
            f"{int(scores.ids[beyond].min())} of {vocabulary}): it has another vocabulary; serve a teacher with the "
            "student's tokens"
        )
    if scorer.tokenizer is not None:
        texts = scorer.texts(ids, "the test of tokens")
        different = _different_texts(texts, scorer.tokenizer)
        if len(different) > max(1, len(texts) // 4):
            token, text = next(iter(different.items()))
            raise ServerError(
                f"{where} has another vocabulary: {len(different)} of {len(texts)} tokens have another text, such as "
                f"token {token}, {text!r}, which is {scorer.tokenizer.decode([token])!r} for the student; serve a "
                "teacher with the student's tokens"
            )


def check_labels(scorer: PromptScorer, rows: Sequence[tuple[Tensor, Sequence[int]]], vocabulary: int) -> None:
    """Test that the labels of some rows are more probable than by chance; a model that reads other tokens fails.

    Args:
        scorer: asks the server.
        rows: the tokens of each, and the indices of its labels' entries.
        vocabulary: number of tokens of the student.

    Raises:
        ServerError: they are not.
    """
    found: list[float] = []
    for number, (ids, positions) in enumerate(rows):
        if positions and len(found) < LABELS:
            scores = (
                replace(scorer, top_k=1).score(ids.tolist(), f"row {number} of the test of labels").select(positions)
            )
            found += scores.of(ids[1:][positions]).clamp_min(-100.0).tolist()
    if len(found) >= LABELS // 2 and math.fsum(found) / len(found) < -math.log(vocabulary):
        mean, chance = math.fsum(found) / len(found), -math.log(vocabulary)
        raise ServerError(
            f"server {scorer.client.url} (model {scorer.model}) gives {len(found)} labels of the data less probability "
            f"than chance: a log-probability of {mean:.1f} on average, where {chance:.1f} is chance; "
            "its tokens are others than the student's, or it reads other tokens than it is sent"
        )


def _different_texts(texts: Mapping[int, str], tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The texts that the tokenizer gives otherwise; white space and incomplete characters are not compared."""
    found = {}
    for token, text in texts.items():
        own = str(tokenizer.decode([token])) if token < len(tokenizer) else ""
        parts = {part.replace("\u2581", " ").replace("\u0120", " ").strip() for part in (own, text)}
        if len(parts) > 1 and not any("\ufffd" in part or not part for part in parts):
            found[token] = text
    return found


class SameModel:
    """Compares a server's answer to one prompt with that of the start, after each outage and every `SECONDS`.

    Args:
        scorer: asks the server.
        ids: the prompt.
        scores: the answer at the start.
    """

    def __init__(self, scorer: PromptScorer, ids: Sequence[int], scores: PromptScores) -> None:
        self._scorer, self._ids = replace(scorer, top_k=min(scorer.top_k, FEW)), [*ids]
        self._entries = scores.entries()
        self._lock = threading.Lock()
        self._outages = scorer.outages
        self._last = time.monotonic()

    def check(self) -> None:
        """Repeat the test if it is due. Threads can share it: all wait for the one that asks.

        Raises:
            ServerError: another model has answered.
        """
        with self._lock:
            outages = self._scorer.outages
            if outages == self._outages and time.monotonic() - self._last < SECONDS:
                return
            again = self._scorer.score(self._ids, "the repeated first test").entries()
            change = max(map(_distance, self._entries, again))
            if change > OTHER_MODEL:
                raise ServerError(
                    f"server {self._scorer.client.url} answers with another model than at the start of the run, or "
                    f"other weights: a probability of the first test has changed by {change:.2g}; serve the same "
                    f"{self._scorer.model} again, and {self._scorer.client.advice}"
                )
            self._outages, self._last = outages, time.monotonic()


def _distance(one: Mapping[int, float], other: Mapping[int, float]) -> float:
    """Largest difference of the probabilities that both entries name."""
    return max((abs(math.exp(one[t]) - math.exp(other[t])) for t in one.keys() & other.keys()), default=1.0)
