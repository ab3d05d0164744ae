"""Responses of an OpenAI-compatible server to many prompts, with several requests at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kd_lightning.data.conversation import Conversation
from kd_lightning.distributed.signals import StopRequest
from kd_lightning.generation.response_file import Response
from kd_lightning.models.generate import Sampling
from kd_lightning.models.openai_client import OpenAIClient, valid_string
from kd_lightning.seeding import derive_seed
from kd_lightning.serving.completion import finish_reason, sampling_fields
from kd_lightning.serving.request_pool import answers


class ServerGenerator:
    """A served model and how its responses are sampled.

    Args:
        client: of the server.
        model: name of the model; None: the only one that is served.
        sampling: how responses are sampled.
        seed: of the samples.

    Raises:
        ValueError: the server refuses or does not answer, or `model` is None and it does not serve exactly one.
    """

    def __init__(self, client: OpenAIClient, model: str | None, sampling: Sampling, seed: int = 0) -> None:
        self.client = client
        self.model = client.select_model(model)
        self.sampling = sampling
        self.seed = seed

    def respond(self, conversation: Conversation, number: int) -> Response:
        """The response to one prompt.

        Args:
            conversation: the prompt.
            number: of the row, from 0; it determines the samples and is named in errors.

        Raises:
            ValueError: the server refuses, does not answer, or sends invalid answers.
        """
        body = sampling_fields(self.model, self.sampling, derive_seed(self.seed, number))
        if conversation.messages:
            path = "chat/completions"
            body["messages"] = conversation.messages
            extras = {"tools": conversation.tools, "chat_template_kwargs": conversation.template_kwargs}
            body |= {name: value for name, value in extras.items() if value}
        else:
            path, body["prompt"] = "completions", conversation.prompt
        return self.client.request(path, body, parse_response, f"row {number + 1}")

    def generate(
        self,
        conversations: Sequence[Conversation],
        start: int = 0,
        requests: int = 8,
        request: StopRequest | None = None,
    ) -> Iterator[tuple[int, Response]]:
        """Responses with the numbers of their rows, in the order in which they finish.

        Args:
            conversations: all prompts.
            start: number of the first row that is sent.
            requests: largest number of requests at a time, at least 1.
            request: to stop: the requests that are sent are finished, and no more are sent.
        """

        def ask(number: int) -> Response:
            return self.respond(conversations[number], number)

        return answers(self.client, ask, range(start, len(conversations)), requests, request)


def parse_response(answer: Any) -> Response:
    """The response in a decoded answer of the server; the errors of an invalid one are those of `request`."""
    (choice, *_) = answer["choices"]
    text = choice["message"].get("content") if "message" in choice else choice["text"]
    tokens = (answer.get("usage") or {}).get("completion_tokens")
    return Response("" if text is None else valid_string(text), finish_reason(choice), _count(tokens))


def _count(tokens: object) -> int:
    """A number of tokens, 0 if the server reports none; ValueError if it is not such a number."""
    if tokens is None:
        return 0
    if isinstance(tokens, bool) or not isinstance(tokens, (int, float)) or not 0 <= tokens < 2**53:
        raise ValueError(f"completion_tokens must be a number of tokens, got {tokens!r}")
    return int(tokens)
