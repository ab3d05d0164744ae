"""Log-probabilities of a prompt's tokens from a server, asked by token ids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from kd_lightning.models.openai_client import OpenAIClient, RequestRefusedError, ServerError
from kd_lightning.models.scoring.client_process import ClientProcess
from kd_lightning.models.scoring.dialects import DIALECTS, TOKEN_ID, Dialect, NamedTokens, WrongAnswerError
from kd_lightning.models.scoring.exchange import PromptRequest

Entries = list[dict[int, float]]
"""For each token of a prompt after the first: log-probabilities by token id, of the tokens that the server names."""

DEAD = -1e4
"""Log-probabilities below are −inf: vLLM writes a large negative number."""


@dataclass(frozen=True)
class PromptScores:
    """What a server answers to a prompt: an entry for each token after the first.

    Args:
        ids: ids of the named tokens, [N, W]; −1 where an entry names fewer.
        log_probs: their log-probabilities, float64 [N, W]; −inf there.
    """

    ids: Tensor
    log_probs: Tensor

    def select(self, positions: Sequence[int]) -> PromptScores:
        """The entries at these positions."""
        index = torch.tensor(positions, dtype=torch.long)
        return PromptScores(self.ids[index], self.log_probs[index])

    @classmethod
    def concatenated(cls, parts: Sequence[PromptScores]) -> PromptScores:
        """The entries of several answers, one after the other."""
        width = max(part.ids.shape[1] for part in parts)
        gaps = [(0, width - part.ids.shape[1]) for part in parts]
        ids = [pad(part.ids, gap, value=-1) for part, gap in zip(parts, gaps, strict=True)]
        log_probs = [pad(part.log_probs, gap, value=-math.inf) for part, gap in zip(parts, gaps, strict=True)]
        return cls(torch.cat(ids), torch.cat(log_probs))

    def of(self, tokens: Tensor) -> Tensor:
        """The log-probability of one named token of each entry, [N]."""
        return self.log_probs[self.ids == tokens.unsqueeze(1)]

    def entries(self) -> Entries:
        """The same as mappings."""
        pairs = zip(self.ids.tolist(), self.log_probs.tolist(), strict=True)
        return [{t: v for t, v in zip(ids, values, strict=True) if t >= 0} for ids, values in pairs]


@dataclass(frozen=True)
class PromptScorer:
    """Asks a served model for the log-probabilities of prompts.

    Args:
        client: of the server.
        model: name of the served model.
        top_k: number of tokens asked for at each position; the prompt's own token is always among the answer.
        dialect: the form of the requests.
        tokenizer: for servers that name tokens by text.
        names: names that the server may answer with; empty: `model` alone.
        process: sends the requests; None: the threads that call.
    """

    client: OpenAIClient
    model: str
    top_k: int
    dialect: Dialect = DIALECTS[0]
    tokenizer: PreTrainedTokenizerBase | None = None
    names: frozenset[str] = field(default_factory=frozenset)
    process: ClientProcess | None = None

    @property
    def outages(self) -> int:
        """How often a request has succeeded after it had failed."""
        return self.client.outages + (0 if self.process is None else self.process.outages)

    def score(self, ids: Sequence[int], what: str) -> PromptScores:
        """The entries of a prompt, one fewer than its tokens.

        Args:
            ids: token ids of the prompt, at least two.
            what: the prompt in error messages, such as `row 3`.

        Raises:
            RequestRefusedError: the server has refused the request.
            ServerError: it does not answer, or with other values, tokens or another model than was asked for.
        """
        request = self._request(ids, what)
        if self.process is None:
            named = request.named_tokens(self.client, self.id_of)
        else:
            named = self.process.named_tokens(request)
        try:
            return _as_scores(named, ids)
        except WrongAnswerError as error:
            raise request.wrong(self.client, error) from None

    def texts(self, ids: Sequence[int], what: str) -> dict[int, str]:
        """The texts of the tokens of an answer by id, where the server gives them.

        Raises:
            ServerError: as `score`.
        """
        return self._request(ids, what).ask(self.client, self.dialect.texts)

    def in_process(self) -> PromptScorer:
        """The same, whose requests are sent by a process of their own; itself if answers may name tokens by text."""
        return replace(self, process=ClientProcess(self.client)) if self.dialect.names_ids else self

    def close(self) -> None:
        """Cancel all requests; it must not be used afterwards."""
        self.client.close()
        if self.process is not None:
            self.process.close()

    def _request(self, ids: Sequence[int], what: str) -> PromptRequest:
        return PromptRequest(self.model, self.names, self.top_k, [*ids], what, self.dialect.name)

    def id_of(self, text: str) -> int:
        """The id of a token that a server names by text.

        Raises:
            WrongAnswerError: several tokens have this text, or none, or there is no tokenizer.
        """
        if found := TOKEN_ID.fullmatch(text):
            return int(found[1])
        ids = self._ids_by_text.get(text, [])
        if len(ids) != 1:
            many = f"tokens {', '.join(map(str, ids[:5]))} have" if ids else "no token has"
            raise WrongAnswerError(
                f"names tokens by text, and {many} the text {text!r}: use a server that answers with token ids (vLLM's "
                "prompt_logprobs, or return_tokens_as_token_ids)"
            )
        return ids[0]

    @cached_property
    def _ids_by_text(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for token in range(0 if self.tokenizer is None else len(self.tokenizer)):
            assert self.tokenizer is not None
            found.setdefault(str(self.tokenizer.decode([token])), []).append(token)
        return found


def detect_dialect(scorer: PromptScorer, ids: Sequence[int]) -> Dialect:
    """The first form of requests that a server answers.

    Args:
        scorer: with any dialect.
        ids: a short prompt.

    Raises:
        ServerError: it answers none; the message has all answers.
    """
    reasons = []
    for dialect in DIALECTS:
        probe = replace(scorer, dialect=dialect, top_k=1)  # a bound of the server is tested later
        try:
            probe.score(ids, f"a prompt with {dialect.name}")
        except RequestRefusedError as error:
            reasons.append(str(error))
        except ValueError as error:
            if "invalid answer" not in str(error):
                raise
            reasons.append(str(error))
        else:
            return dialect
    raise ServerError(
        f"server {scorer.client.url} gives no log-probabilities of a prompt: none of "
        f"{', '.join(dialect.name for dialect in DIALECTS)} is supported ({'; '.join(reasons)})"
    )


def _as_scores(named: NamedTokens, prompt: Sequence[int]) -> PromptScores:
    """The entries as tensors.

    Raises:
        WrongAnswerError: an entry lacks the prompt's own token.
    """
    lengths, named_ids, values = (torch.from_numpy(np.asarray(x)) for x in (named.lengths, named.ids, named.values))
    where = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    ids = torch.full(where.shape, -1).masked_scatter_(where, named_ids)
    log_probs = torch.full(where.shape, -math.inf, dtype=torch.float64)
    log_probs.masked_scatter_(where, values.masked_fill(values < DEAD, -math.inf))
    own = torch.tensor(prompt)[1:]
    if not (ids == own.unsqueeze(1)).any(1).all():
        raise WrongAnswerError(_missing_own(ids, own))
    return PromptScores(ids, log_probs)


def _missing_own(ids: Tensor, own: Tensor) -> str:
    """What is probably wrong with entries that lack the prompt's own tokens."""
    for step in (1, -1, 2, -2):
        if (ids == (own + step).unsqueeze(1)).any(1).all():
            return (
                f"names token {int(own[0]) + step} where the prompt has {int(own[0])}, and so on: its token ids are "
                f"shifted by {step:+d}; it must have the tokens of the student"
            )
    for step in (1, -1, 2, -2):
        one, other = (ids[:-step], own[step:]) if step > 0 else (ids[-step:], own[:step])
        if len(other) > 1 and (one == other.unsqueeze(1)).any(1).all():
            return f"gives distributions that are off by {-step:+d}: the entry of a token belongs to the one {step:+d}"
    first = int((ids == own.unsqueeze(1)).any(1).logical_not().nonzero()[0])
    return (
        f"gives an entry for token {first + 2} of the prompt without the prompt's own token {int(own[first])}: it "
        "reads other tokens than it is sent, or does not give the log-probabilities of the prompt's own tokens"
    )
