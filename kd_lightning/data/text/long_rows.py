"""Conversations that are far longer than the tokens that are kept of them: only their beginning is looked at."""

from __future__ import annotations

import dataclasses

from kd_lightning.data.conversation import Conversation, text_of

SHORT_TEXT = 100_000
"""Texts of at most so many characters are always tokenized in full."""
MANY_TURNS = 20_000
"""Answers are located one by one in conversations of at most about twice as many characters."""


def first_size(length: int) -> int:
    """Number of characters that are tokenized at first to find `length` tokens."""
    return max(SHORT_TEXT, 16 * length)


def beginning(conversation: Conversation, size: int) -> Conversation | None:
    """The first turns, of at least `size` characters, and the last ones; None if this is not much less than all turns.

    The turns from the last question on are kept, since templates treat them differently.

    Args:
        conversation: turns.
        size: number of characters.
    """
    messages = conversation.messages
    seen, cut = 0, 0
    while cut < len(messages) and seen < size:
        seen += len(text_of(messages[cut]))
        cut += 1
    last = max((n for n, turn in enumerate(messages) if turn["role"] == "user"), default=0)
    if last - cut < cut:
        return None
    kept = [*range(cut), *range(last, len(messages))]
    unlearned = [at for at, n in enumerate(kept) if n in set(conversation.unlearned)]
    first = sum(n < conversation.first for n in kept)
    return dataclasses.replace(conversation, messages=[messages[n] for n in kept], first=first, unlearned=unlearned)
