"""Responses of an OpenAI-compatible server to many prompts, with several requests at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from kd_lightning.data.conversation import Conversation
from kd_lightning.distributed.signals import StopRequest
from kd_lightning.generation.response_file import Response
from kd_lightning.models.generate import Sampling
from kd_lightning.models.openai_client import OpenAIClient, valid_string
from kd_lightning.seeding import derive_seed

FINISH_REASONS = {"stop": "eos", "length": "length"}
UNKNOWN = "unknown"
"""The reason of a response where the server gives none."""


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
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.sampling.max_new_tokens,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "seed": derive_seed(self.seed, number) % 2**31,
        }
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
        """Responses with the numbers of their rows, in the order in which they finish. Closes the client.

        Args:
            conversations: all prompts.
            start: number of the first row that is sent.
            requests: largest number of requests at a time, at least 1.
            request: to stop: the requests that are sent are finished, and no more are sent.
        """
        request = request or StopRequest()
        remaining = request.until_requested(range(start, len(conversations)))
        pending: dict[Future[Response], int] = {}
        pool = ThreadPoolExecutor(requests)
        try:
            while True:
                for number in remaining:
                    pending[pool.submit(self.respond, conversations[number], number)] = number
                    if len(pending) >= 2 * requests:
                        break
                if request.signal:
                    pending = {future: number for future, number in pending.items() if not future.cancel()}
                if not pending:
                    return
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                failed = None
                for future in done:
                    number = pending.pop(future)
                    if future.exception() is None:
                        yield number, future.result()
                    else:
                        failed = future
                if failed is not None:
                    failed.result()  # raises
        finally:
            self.client.close()
            pool.shutdown(wait=False, cancel_futures=True)


def parse_response(answer: Any) -> Response:
    """The response in a decoded answer of the server; the errors of an invalid one are those of `request`."""
    (choice, *_) = answer["choices"]
    text = choice["message"].get("content") if "message" in choice else choice["text"]
    reason = choice.get("finish_reason")
    reason = UNKNOWN if reason is None else valid_string(reason) or UNKNOWN
    tokens = (answer.get("usage") or {}).get("completion_tokens")
    return Response("" if text is None else valid_string(text), FINISH_REASONS.get(reason, reason), _count(tokens))


def _count(tokens: object) -> int:
    """A number of tokens, 0 if the server reports none; ValueError if it is not such a number."""
    if tokens is None:
        return 0
    if isinstance(tokens, bool) or not isinstance(tokens, (int, float)) or not 0 <= tokens < 2**53:
        raise ValueError(f"completion_tokens must be a number of tokens, got {tokens!r}")
    return int(tokens)
