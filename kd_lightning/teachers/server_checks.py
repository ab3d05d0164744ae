"""The test of a served teacher at the start of a run: tokens, positions, log-probabilities, lengths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from kd_lightning.models.openai_client import RequestRefusedError
from kd_lightning.models.prompt_logprobs import Entries, PromptScorer

LEAST_CHANGE = 1e-4
"""A probability that differs by more has changed."""
ROUNDING = 0.02
"""The probabilities of an entry may sum to so much more than 1."""


def check_scores(scorer: PromptScorer, ids: Sequence[int], vocabulary: int, longest: int = 0) -> None:
    """Test what a server answers.

    Args:
        scorer: asks the server.
        ids: a prompt of the data.
        vocabulary: number of tokens of the student.
        longest: number of tokens of the longest row.

    Raises:
        ValueError: the server fails the test; the message says in which respect.
    """
    url, where = scorer.client.url, f"server {scorer.client.url} (model {scorer.model})"
    check_length(scorer, longest)
    try:
        entries = scorer.score(ids, "the first test")
    except RequestRefusedError as error:
        raise ValueError(
            f"{error}; if it is about the number of log-probabilities, lower top_k, or start the server with a larger "
            f"bound (vLLM: --max-logprobs {scorer.top_k})"
        ) from None
    check_distributions(where, entries, min(scorer.top_k, vocabulary))
    check_positions(scorer, where, ids, entries, vocabulary)
    beyond = {token for entry in entries for token in entry if token >= vocabulary}
    mass = max((sum(math.exp(v) for t, v in entry.items() if t >= vocabulary) for entry in entries), default=0.0)
    if beyond and mass > 0.5:
        raise ValueError(
            f"{where} gives {mass:.0%} of its probability to tokens that the student does not have (token "
            f"{min(beyond)} of {vocabulary}): it has another vocabulary than {url} was expected to serve"
        )


def check_length(scorer: PromptScorer, longest: int) -> None:
    """Refuse rows that are longer than the server reads, if it says how much that is.

    Raises:
        ValueError: the longest row does not fit.
    """
    limit = scorer.client.max_length(scorer.model)
    if limit is not None and longest + 1 > limit:
        raise ValueError(
            f"server {scorer.client.url} reads {limit} tokens (max_model_len), and the longest row has {longest} and "
            "needs one more: lower data.max_length, or start the server with a larger --max-model-len"
        )


def check_distributions(where: str, entries: Entries, k: int) -> None:
    """Refuse entries that are no log-probabilities, or fewer than asked for.

    Raises:
        ValueError: a sum exceeds 1, or an entry has fewer than k tokens.
    """
    for place, entry in enumerate(entries, start=1):
        total = math.fsum(math.exp(min(value, 50.0)) for value in entry.values())
        if max(entry.values()) > ROUNDING or total > 1 + ROUNDING:
            raise ValueError(
                f"{where} gives values at token {place} that are no log-probabilities: their exponentials sum to "
                f"{total:.3g}; it may send logits, or probabilities"
            )
        if len(entry) < k:
            raise ValueError(
                f"{where} gives {len(entry)} tokens at token {place} where {k} are asked for: lower top_k, or start "
                "the server with a larger bound (vLLM: --max-logprobs)"
            )


def check_positions(scorer: PromptScorer, where: str, ids: Sequence[int], entries: Entries, vocabulary: int) -> None:
    """Test by causality that the entry of a token is the distribution before it.

    Changing token t must leave the entries up to that of t as they were, and change that of t + 1.

    Raises:
        ValueError: the entries belong to other positions.
    """
    middle = max(1, len(ids) // 2)
    again = scorer.score(ids, "the repeated test")
    noise = max(map(_distance, entries, again))
    limit = max(LEAST_CHANGE, 3 * noise)  # servers batch, and round
    found = []
    for step in range(1, 4):  # another token may by chance have nearly the same effect
        changed = [*ids]
        changed[middle] = (ids[middle] + 7 * step) % vocabulary
        other = scorer.score(changed, "the test of positions")
        changes = [n for n, pair in enumerate(zip(entries, other, strict=True), start=1) if _distance(*pair) > limit]
        found += changes[:1]
        if changes[:1] == [middle + 1]:
            return
    if not found:
        raise ValueError(
            f"{where} gives the same distributions after another token {middle}: it does not read the token ids that "
            "it is sent"
        )
    raise ValueError(
        f"{where} gives distributions that are off by {min(found) - middle - 1:+d}: a change of token {middle} first "
        f"changes the entry of token {min(found)}, where {middle + 1} is expected"
    )


def _distance(one: Mapping[int, float], other: Mapping[int, float]) -> float:
    """Largest difference of the probabilities that both entries name."""
    return max((abs(math.exp(one[t]) - math.exp(other[t])) for t in one.keys() & other.keys()), default=1.0)
