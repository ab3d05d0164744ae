"""The forms in which servers are asked for log-probabilities of a prompt, and in which they answer."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

TOKEN_ID = re.compile(r"token_id:(\d+)")


class WrongAnswerError(Exception):
    """An answer that would be as wrong again; the message continues after "it". Not a ValueError: it is not retried."""


@dataclass
class NamedTokens:
    """The tokens that the entries of an answer name, one entry after the other.

    Args:
        ids: token ids.
        values: log-probabilities.
        lengths: number of tokens of each entry.
    """

    ids: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))
    lengths: array[int] = field(default_factory=lambda: array("q"))

    def add(self, ids: Iterable[int], values: Iterable[float]) -> None:
        """Add an entry.

        Raises:
            TypeError: an id or a value is no number.
        """
        before = len(self.ids)
        self.ids.extend(ids)
        self.values.extend(values)
        self.lengths.append(len(self.ids) - before)


class Dialect(ABC):
    """A form of requests and answers. KeyError, TypeError, IndexError or ValueError of `parse`: the answer is invalid.

    Attributes:
        name: in messages.
        path: below the server's `/v1`; with a leading slash: below its root.
        names_ids: answers name tokens by id, never by text.
    """

    name: str
    path: str = "completions"
    names_ids: bool = True

    @abstractmethod
    def body(self, model: str, ids: Sequence[int], top_k: int) -> dict[str, Any]:
        """The request for one prompt."""

    @abstractmethod
    def parse(self, answer: Any, ids: Sequence[int], id_of: Callable[[str], int]) -> NamedTokens:
        """The entries of an answer.

        Raises:
            WrongAnswerError: they are those of other tokens, or of more or fewer.
        """

    def texts(self, answer: Any) -> dict[int, str]:
        """Texts of tokens by id, where the server gives them next to the ids."""
        return {}


class PromptLogprobs(Dialect):
    """vLLM's `prompt_logprobs`."""

    name = "prompt_logprobs (vLLM)"

    def body(self, model: str, ids: Sequence[int], top_k: int) -> dict[str, Any]:
        """One token is generated, the fewest that vLLM allows."""
        return {**_completion(model, ids), "prompt_logprobs": top_k}

    def parse(self, answer: Any, ids: Sequence[int], id_of: Callable[[str], int]) -> NamedTokens:
        """Each entry maps ids, as text, to `logprob`."""
        rows = answer["choices"][0]["prompt_logprobs"]
        _check_length(len(rows), ids)
        _check_first(rows[0])
        found = NamedTokens()
        for row in rows[1:]:
            found.add(map(int, row), [entry["logprob"] for entry in row.values()])
        return found

    def texts(self, answer: Any) -> dict[int, str]:
        """The field `decoded_token`."""
        rows = answer["choices"][0]["prompt_logprobs"][1:]
        pairs = [(int(token), entry.get("decoded_token")) for row in rows for token, entry in row.items()]
        return {token: text for token, text in pairs if isinstance(text, str)}


class SGLang(Dialect):
    """SGLang's own endpoint: its completions endpoint names tokens by text."""

    name = "/generate (SGLang)"
    path = "/generate"

    def body(self, model: str, ids: Sequence[int], top_k: int) -> dict[str, Any]:
        """Log-probabilities from the first token on; the endpoint takes no name of a model."""
        sampling = {"max_new_tokens": 1, "temperature": 0.0}
        wanted = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": top_k}
        return {"input_ids": list(ids), "sampling_params": sampling, **wanted}

    def parse(self, answer: Any, ids: Sequence[int], id_of: Callable[[str], int]) -> NamedTokens:
        """Log-probability, id and text of each named token."""
        own, top = answer["meta_info"]["input_token_logprobs"], answer["meta_info"]["input_top_logprobs"]
        if len(own) != len(top):
            raise ValueError
        _check_length(len(own), ids)
        _check_first(top[0])
        found = NamedTokens()
        for n, (token, (value, read, *_), named) in enumerate(zip(ids, own, top, strict=True)):
            _check_token(read, token, n)
            if n:
                by_id = {int(other): logprob for logprob, other, *_ in named} | {token: value}
                found.add(by_id, by_id.values())
        return found


class Echo(Dialect):
    """`echo` with `logprobs`, the older form, in which many servers name tokens by text."""

    name = "echo with logprobs"
    names_ids = False

    def body(self, model: str, ids: Sequence[int], top_k: int) -> dict[str, Any]:
        """Ask for ids instead of texts; servers that do not know this field ignore it."""
        return {**_completion(model, ids), "echo": True, "logprobs": top_k, "return_tokens_as_token_ids": True}

    def parse(self, answer: Any, ids: Sequence[int], id_of: Callable[[str], int]) -> NamedTokens:
        """The prompt's tokens and at most one that was generated."""
        logprobs = answer["choices"][0]["logprobs"]
        own, top, tokens = logprobs["token_logprobs"], logprobs["top_logprobs"], logprobs.get("tokens") or []
        if len(own) != len(top):
            raise ValueError
        _check_length(len(own) - (len(own) == len(ids) + 1), ids)
        _check_first(own[0])
        for n, (token, text) in enumerate(zip(ids, tokens, strict=False)):
            if known := TOKEN_ID.fullmatch(text):
                _check_token(int(known[1]), token, n)
        found = NamedTokens()
        for token, value, named in zip(ids[1:], own[1 : len(ids)], top[1 : len(ids)], strict=True):
            by_id = {id_of(text): logprob for text, logprob in named.items()} | {token: value}
            found.add(by_id, by_id.values())
        return found


def _completion(model: str, ids: Sequence[int]) -> dict[str, Any]:
    return {"model": model, "prompt": list(ids), "max_tokens": 1, "temperature": 0.0}


def _check_length(found: int, ids: Sequence[int]) -> None:
    """Refuse an answer with more or fewer positions than the prompt has tokens."""
    if found != len(ids):
        raise WrongAnswerError(
            f"gives {found} positions for a prompt of {len(ids)} tokens: it "
            + ("truncates the prompt" if found < len(ids) else "adds tokens to the prompt, such as BOS")
            + "; start it such that it reads token ids as they are sent"
        )


def _check_token(read: int, sent: int, number: int) -> None:
    """Refuse another token than was sent."""
    if read != sent:
        raise WrongAnswerError(f"reads token {read} where token {number + 1} of the prompt is {sent}")


def _check_first(entry: Any) -> None:
    """Refuse a distribution for the first token, which nothing precedes."""
    if entry:
        raise WrongAnswerError(
            "gives a distribution for the first token of the prompt: it reads a token before it, such as BOS; start it "
            "such that it reads token ids as they are sent"
        )


DIALECTS: tuple[Dialect, ...] = (PromptLogprobs(), SGLang(), Echo())
"""All forms, in the order in which they are tried."""
