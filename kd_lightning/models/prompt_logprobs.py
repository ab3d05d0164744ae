"""Log-probabilities of a prompt's tokens from a completions endpoint, asked by token ids."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from kd_lightning.models.openai_client import OpenAIClient, RequestRefusedError

Dialect = Literal["prompt_logprobs", "echo"]
DIALECTS: tuple[Dialect, ...] = ("prompt_logprobs", "echo")
Entries = list[dict[int, float]]
"""For each token of a prompt after the first: log-probabilities by token id, of the tokens that the server names."""

DEAD = -1e4
"""Log-probabilities below are −inf: vLLM writes a large negative number."""
TOKEN_ID = re.compile(r"token_id:(\d+)")


@dataclass(frozen=True)
class PromptScorer:
    """Asks a served model for the log-probabilities of prompts.

    Args:
        client: of the server.
        model: name of the served model.
        top_k: number of tokens asked for at each position; the prompt's own token is always among the answer.
        dialect: "prompt_logprobs" (vLLM), or "echo" (`echo` with `logprobs`).
        tokenizer: for servers that name tokens by text.
    """

    client: OpenAIClient
    model: str
    top_k: int
    dialect: Dialect = "prompt_logprobs"
    tokenizer: PreTrainedTokenizerBase | None = None

    def score(self, ids: Sequence[int], what: str) -> Entries:
        """The entries of a prompt, one fewer than its tokens.

        Args:
            ids: token ids of the prompt, at least two.
            what: the prompt in error messages, such as `row 3`.

        Raises:
            RequestRefusedError: the server has refused the request.
            ValueError: the server does not answer, or not with a valid answer.
        """
        body: dict[str, Any] = {"model": self.model, "prompt": list(ids), "max_tokens": 1, "temperature": 0.0}
        parse: Callable[[Any], Entries]
        if self.dialect == "prompt_logprobs":
            body["prompt_logprobs"] = self.top_k
            parse = lambda answer: parse_prompt_logprobs(answer, ids)  # noqa: E731
        else:
            body |= {"echo": True, "logprobs": self.top_k, "return_tokens_as_token_ids": True}
            parse = lambda answer: parse_echo(answer, ids, self.id_of)  # noqa: E731
        try:
            return self.client.request("completions", body, parse, what)
        except AmbiguousTokenError as error:
            raise ValueError(str(error)) from None

    def id_of(self, text: str) -> int:
        """The id of a token that a server names by text.

        Raises:
            AmbiguousTokenError: several tokens have this text, or none, or there is no tokenizer.
        """
        if found := TOKEN_ID.fullmatch(text):
            return int(found[1])
        ids = self._ids_by_text.get(text, [])
        if len(ids) != 1:
            many = f"tokens {', '.join(map(str, ids[:5]))} have" if ids else "no token has"
            raise AmbiguousTokenError(
                f"server {self.client.url} names tokens by text, and {many} the text {text!r}: use a server that "
                "answers with token ids (vLLM's prompt_logprobs, or return_tokens_as_token_ids)"
            )
        return ids[0]

    @cached_property
    def _ids_by_text(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for token in range(0 if self.tokenizer is None else len(self.tokenizer)):
            assert self.tokenizer is not None
            found.setdefault(str(self.tokenizer.decode([token])), []).append(token)
        return found


class AmbiguousTokenError(Exception):
    """A server names a token by a text that does not determine it. Not a ValueError: asking again does not help."""


def detect_dialect(scorer: PromptScorer, ids: Sequence[int]) -> Dialect:
    """The first way of asking that a server answers.

    Args:
        scorer: with any dialect.
        ids: a short prompt.

    Raises:
        ValueError: it answers neither; the message has both answers.
    """
    reasons = []
    for dialect in DIALECTS:
        probe = replace(scorer, dialect=dialect, top_k=1)  # a bound of the server is tested later
        try:
            probe.score(ids, f"a prompt with {dialect}")
        except RequestRefusedError as error:
            reasons.append(str(error))
        except ValueError as error:
            if "invalid answer" not in str(error):
                raise
            reasons.append(str(error))
        else:
            return probe.dialect
    raise ValueError(
        f"server {scorer.client.url} gives no log-probabilities of a prompt: neither prompt_logprobs (vLLM) nor echo "
        f"with logprobs is supported ({'; '.join(reasons)})"
    )


def parse_prompt_logprobs(answer: Any, ids: Sequence[int]) -> Entries:
    """The entries of vLLM's `prompt_logprobs`; KeyError, TypeError, IndexError or ValueError if they are invalid."""
    (choice, *_) = answer["choices"]
    first, *rest = choice["prompt_logprobs"]
    if first is not None or len(rest) != len(ids) - 1:
        raise ValueError
    return [
        _checked({int(token): entry["logprob"] for token, entry in entries.items()}, own)
        for entries, own in zip(rest, ids[1:], strict=True)
    ]


def parse_echo(answer: Any, ids: Sequence[int], id_of: Callable[[str], int]) -> Entries:
    """The entries of `echo` with `logprobs`; KeyError, TypeError, IndexError or ValueError if they are invalid."""
    (choice, *_) = answer["choices"]
    found = choice["logprobs"]
    own, top = found["token_logprobs"][: len(ids)], found["top_logprobs"][: len(ids)]
    if own[0] is not None or len(own) != len(ids) or len(top) != len(ids):
        raise ValueError
    entries = []
    for token, value, named in zip(ids[1:], own[1:], top[1:], strict=True):
        by_id = {id_of(text): logprob for text, logprob in named.items()}
        entries.append(_checked({**by_id, token: value}, token))
    return entries


def _checked(entries: Mapping[int, Any], own: int) -> dict[int, float]:
    values = {token: float(value) for token, value in entries.items()}
    if own not in values or any(math.isnan(value) for value in values.values()):
        raise ValueError
    return {token: -math.inf if value < DEAD else value for token, value in values.items()}
