"""A request for one completion: how sampling is sent, and what is taken from the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from kd_lightning.models.generate import Sampling
from kd_lightning.models.openai_client import valid_string

FINISH_REASONS = {"stop": "eos", "length": "length"}
STOPPED = "stop"
"""The reason of a response that a stop string has ended."""
UNKNOWN = "unknown"
"""The reason of a response where the server gives none."""
NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Settings that a server may otherwise take from the model's generation config: they would change the distribution."""


@dataclass(frozen=True)
class Completion:
    """A response of a served model.

    Args:
        ids: token ids, up to the end of sequence, which is included if the model has generated it.
        text: without the end of sequence and other special tokens.
        finish_reason: "eos", "stop", "length", "unknown", or the server's own.
        exact: the server gave the ids; False: they are those of the text.
    """

    ids: list[int]
    text: str
    finish_reason: str
    exact: bool


@dataclass(frozen=True)
class RawCompletion:
    """What an answer holds.

    Args:
        text: of the response.
        finish_reason: as in `Completion`.
        ids: token ids of the response; None: the server gives none.
        prompt_ids: token ids of the prompt; None: the server gives none.
    """

    text: str
    finish_reason: str
    ids: list[int] | None
    prompt_ids: list[int] | None


def sampling_fields(model: str, sampling: Sampling, seed: int) -> dict[str, Any]:
    """The fields of a request that say what is sampled.

    Args:
        model: name of the served model.
        sampling: how.
        seed: of this sample.
    """
    ends = {"min_tokens": sampling.min_new_tokens, "stop": list(sampling.stop)}
    return {
        "model": model,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": seed % 2**31,
        **{name: value for name, value in ends.items() if value},
    }


def completion_body(
    model: str, ids: Sequence[int], sampling: Sampling, seed: int, eos_token_ids: Sequence[int]
) -> dict[str, Any]:
    """The request for a completion of token ids.

    Args:
        model: name of the served model.
        ids: of the prompt.
        sampling: how the response is sampled.
        seed: of this sample.
        eos_token_ids: that end a response; empty: those of the server.
    """
    ends = {"stop_token_ids": list(eos_token_ids)} if eos_token_ids else {}
    fields = sampling_fields(model, sampling, seed)
    return {**fields, "prompt": list(ids), "return_token_ids": True, **NEUTRAL, **ends}


def finish_reason(choice: Any) -> str:
    """Why a response in an answer ended, in the words of this package.

    A stop string gives "stop" if the server names it, as vLLM does in `stop_reason`; otherwise "eos".
    """
    reason = choice.get("finish_reason")
    reason = UNKNOWN if reason is None else valid_string(reason) or UNKNOWN
    if reason == STOPPED and isinstance(choice.get("stop_reason"), str):
        return STOPPED
    return FINISH_REASONS.get(reason, reason)


def parse_completion(answer: Any, vocabulary: int | None = None) -> RawCompletion:
    """The response in a decoded answer; the errors of an invalid one are those of `OpenAIClient.request`.

    Args:
        answer: decoded.
        vocabulary: number of tokens of the model that reads the ids; None: any ids.
    """
    (choice, *_) = answer["choices"]
    text, ids = valid_string(choice["text"]), choice.get("token_ids")
    prompt = choice.get("prompt_token_ids", answer.get("prompt_token_ids"))
    limit = 2**31 if vocabulary is None else vocabulary
    return RawCompletion(text, finish_reason(choice), _valid_ids(ids, limit), _valid_ids(prompt, 2**31))


def _valid_ids(ids: Any, limit: int) -> list[int] | None:
    """Token ids of an answer; ValueError or TypeError if they are none."""
    if ids is None:
        return None
    if not isinstance(ids, list) or any(type(token) is not int or not 0 <= token < limit for token in ids):
        raise ValueError(f"token ids must be whole numbers below {limit}")
    return ids


def to_completion(
    raw: RawCompletion, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int], what: str
) -> Completion:
    """A response by the tokenizer of this process.

    Args:
        raw: what the server has answered.
        tokenizer: of the prompts.
        eos_token_ids: that end a response; the first one is added if the server leaves it out.
        what: the request in error messages.

    Raises:
        ValueError: the ids do not decode to the text: the server has other tokens.
    """
    ended = raw.finish_reason == "eos"
    if raw.ids is None:
        ids: list[int] = tokenizer(raw.text, add_special_tokens=False)["input_ids"]
        return Completion([*ids, *eos_token_ids[:1]] if ended else ids, raw.text, raw.finish_reason, False)
    content = list(raw.ids)
    end = [content.pop()] if ended and content and content[-1] in eos_token_ids else list(eos_token_ids[:1])
    text = str(tokenizer.decode(content, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    ids_text, server_text = _comparable(text), _comparable(raw.text)
    if raw.finish_reason == STOPPED:  # the ids may contain the stop string, the text does not
        ids_text, text = ids_text[: len(server_text)], raw.text
    if ids_text != server_text:
        raise ValueError(
            f"{what}: the token ids of the server's response do not decode to its text with the tokenizer of this run: "
            "serve a model with the same tokenizer"
        )
    return Completion([*content, *end] if ended else content, text, raw.finish_reason, True)


def _comparable(text: str) -> str:
    """A text without what decoding in pieces may change: spaces at its ends, and incomplete characters."""
    return text.replace("\ufffd", "").strip()
