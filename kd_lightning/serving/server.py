"""A writer behind a server: it is given the student's weights, and writes responses to token ids."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd_lightning.distributed.collectives import on_first_rank
from kd_lightning.distributed.dtensor import tensor_digest
from kd_lightning.distributed.signals import StopRequest
from kd_lightning.models.generate import Sampling
from kd_lightning.models.hf_adapter import eos_token_ids, input_embeddings, num_embeddings
from kd_lightning.models.openai_client import OpenAIClient
from kd_lightning.models.scoring.scorer import PromptScorer, detect_dialect
from kd_lightning.serving.completion import Completion, completion_body, parse_completion, to_completion
from kd_lightning.serving.publication import (
    AdapterPublisher,
    FolderPublisher,
    check_publishable,
    published_state,
    split_command,
)
from kd_lightning.serving.request_pool import answers
from kd_lightning.serving.weights_probe import WeightsProbe, weights_probe


class Server:
    """A model behind an OpenAI-compatible server that writes responses, such as vLLM.

    A student with adapters is published by loading its adapter into the server (vLLM's run-time LoRA endpoints); one
    whose weights all learn by exporting it and running `reload_command`. After each publication, log-probabilities of a
    prompt are compared with those of the student in this process.

    Args:
        url: address of the server, with or without `/v1`.
        model: name of the served model; None: the only one that is served.
        requests: largest number of requests at a time, at least 1.
        adapter_name: beginning of the names of adapters and folders; each run that uses the server at the same time
            needs its own.
        adapter_folder: where adapters and exported models are saved; the server must read it at the same path. None:
            the folder `served` of the run.
        reload_command: a command that makes the server load the model in `{folder}` and returns when it does, as a list
            or as one text; `{step}` is the number of steps. It runs without a shell. None: adapters are loaded by the
            server's endpoint.
        api_key_env: name of the environment variable that holds the server's key; `OPENAI_API_KEY` may be unset.
        patience: seconds during which requests to a server that does not answer are retried.
        timeout: seconds to wait for one answer.
        reload_timeout: seconds for `reload_command`.

    Attributes:
        last_published: number of steps of the weights that the server has; None: those that it was started with.

    Raises:
        ValueError: an argument is out of its range.

    Examples:
        >>> from kd_lightning import OnPolicy, Server
        >>> server = Server("http://localhost:8000/v1", requests=16)
        >>> source = OnPolicy(writer=server, max_staleness=1)
        >>> server.last_published is None  # nothing is sent before the run
        True
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        requests: int = 8,
        adapter_name: str = "student",
        adapter_folder: str | None = None,
        reload_command: str | list[str] | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        patience: float = 180.0,
        timeout: float = 600.0,
        reload_timeout: float = 600.0,
    ) -> None:
        if requests < 1:
            raise ValueError(f"requests must be at least 1, got {requests}")
        if not adapter_name or not adapter_name.replace("-", "").replace("_", "").isalnum():
            raise ValueError(f"adapter_name must have letters, digits, '-' and '_' only, got {adapter_name!r}")
        if not reload_timeout > 0:
            raise ValueError(f"reload_timeout must be > 0 seconds, got {reload_timeout}")
        self._command = split_command(reload_command)
        self._client = OpenAIClient(url, patience, timeout, api_key_env)
        self.requests, self.adapter_name, self.adapter_folder = requests, adapter_name, adapter_folder
        self.last_published: int | None = None
        self._asked_for = model
        self._adapters = AdapterPublisher(self._client)
        self._folders = None if self._command is None else FolderPublisher(self._command, reload_timeout)
        self._model: str | None = None
        self._written_by: str | None = None
        self._max_length: int | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._eos: list[int] = []
        self._vocabulary: int | None = None
        self._previous: WeightsProbe | None = None
        self._told = False

    @property
    def written_by(self) -> str:
        """The weights that write now: adapter or folder with its step and a hash, or the name of the served model."""
        return self._written_by or f"{self._connected()} (server)"

    @property
    def max_length(self) -> int | None:
        """The longest sequence that the served model reads, in tokens; None: unknown."""
        return self._max_length

    def check(self, student: PreTrainedModel) -> None:
        """Check that there is a way for a student's weights to reach the server; sends nothing.

        Raises:
            ValueError: its weights all learn, and there is no `reload_command`.
        """
        check_publishable(student, self._command)

    def connect(self, tokenizer: PreTrainedTokenizerBase, student: PreTrainedModel | None = None) -> None:
        """Look for the served model. All ranks must call it.

        Args:
            tokenizer: of the prompts.
            student: the model whose weights are published; None: the server keeps its own.

        Raises:
            ValueError: the server refuses or does not answer; `model` is None and it does not serve exactly one; there
                is no way for the student's weights to reach it.
        """
        self._tokenizer = tokenizer
        if student is not None:
            self.check(student)
            self._eos = eos_token_ids(student)
            self._vocabulary = num_embeddings(input_embeddings(student))
            self.last_published = None  # another run may have published the same step
        if self._model is None:
            self._model, self._max_length = on_first_rank(self._find_model)

    def publish(self, student: PreTrainedModel, step: int, folder: str | Path, prompt: Sequence[int]) -> None:
        """Give the server the student's weights of this moment, and test that it answers with them.

        A collective: all ranks must call it, in the precision of the run. Folders of earlier publications are deleted
        when the new weights are loaded: adapters before the two newest, and exported models before the newest. With
        `reload_command`, no request may be waiting for its answer.

        Args:
            student: the model, for which `connect` was called.
            step: number of optimizer steps; the same step again does nothing.
            folder: of the run; `adapter_folder` takes precedence.
            prompt: token ids of a prompt, for the test; the same on all ranks.

        Raises:
            ValueError: the server refuses, does not answer, or still has other weights; `reload_command` fails.
        """
        self._connected()
        if step == self.last_published:
            return
        probe = weights_probe(student, step, prompt)
        first = not dist.is_initialized() or dist.get_rank() == 0
        state = published_state(student, merged=self._folders is not None, keep=first)
        parent = Path(folder) / "served" if self.adapter_folder is None else Path(self.adapter_folder)

        def load() -> tuple[str, str]:
            name = f"{self.adapter_name}-{step}-{tensor_digest(state.items())[:8]}"
            path = parent.absolute() / name
            if self._folders is not None:
                assert self._tokenizer is not None
                self._folders.load(student, state, self._tokenizer, step, path)
                model = self._connected()
            else:
                model = self._adapters.load(student, state, name, path)
            self._test(probe, model)
            (self._adapters if self._folders is None else self._folders).remove_old()
            return model, name

        self._model, self._written_by = on_first_rank(load)
        self._previous, self.last_published = probe, step
        rank_zero_info(f"server {self._client.url}: {self._written_by} is loaded")

    def respond(self, ids: Sequence[int], sampling: Sampling, seed: int, what: str = "a prompt") -> Completion:
        """The response to one prompt. Threads can call it.

        Args:
            ids: token ids of the prompt.
            sampling: how the response is sampled.
            seed: of the sample.
            what: the prompt in error messages, such as `row 3`.

        Raises:
            ValueError: the server refuses, does not answer, or sends invalid answers.
        """
        body = completion_body(self._connected(), ids, sampling, seed, self._eos)
        parse = functools.partial(parse_completion, vocabulary=self._vocabulary)
        raw = self._client.request("completions", body, parse, what)
        where = f"server {self._client.url}, {what}"
        if raw.prompt_ids is not None and raw.prompt_ids != list(ids):
            raise ValueError(
                f"{where}: the server reads other tokens than the prompt's: it must not add tokens to token ids"
            )
        assert self._tokenizer is not None
        found = to_completion(raw, self._tokenizer, self._eos, where)
        if not found.exact and not self._told:
            self._told = True
            rank_zero_info(
                f"server {self._client.url} gives no token ids of its responses: their texts are tokenized again, "
                "which can give other tokens than were sampled"
            )
        return found

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        start: int = 0,
        names: Sequence[object] | None = None,
        request: StopRequest | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """Responses with the numbers of their prompts, in the order in which they finish; several requests at a time.

        Args:
            prompts: token ids of all prompts.
            sampling: how responses are sampled.
            seeds: of the samples, one for each prompt.
            start: number of the first prompt that is sent.
            names: of the prompts in error messages; None: their numbers, from 0.
            request: to stop: the requests that are sent are finished, and no more are sent.

        Raises:
            ValueError: see `respond`; no further request can be sent then.
        """
        shown: Sequence[object] = range(len(prompts)) if names is None else names

        def ask(number: int) -> Completion:
            return self.respond(prompts[number], sampling, seeds[number], f"row {shown[number]}")

        numbers: Iterable[int] = range(start, len(prompts))
        return answers(self._client, ask, numbers, self.requests, request)

    def close(self) -> None:
        """Cancel the retries of other threads. The server must not be used afterwards."""
        self._client.close()

    def _find_model(self) -> tuple[str, int | None]:
        """Name and longest sequence of the served model."""
        model = self._client.select_model(self._asked_for)
        return model, self._client.max_length(model)

    def _connected(self) -> str:
        """The name of the model that requests ask for."""
        if self._model is None:
            raise ValueError("Server is not connected: call `connect(tokenizer, student)` first")
        return self._model

    def _test(self, probe: WeightsProbe, model: str) -> None:
        """Check that the server answers with the weights of a probe."""
        scorer = PromptScorer(self._client, model, 1, tokenizer=self._tokenizer)
        probe.check(replace(scorer, dialect=detect_dialect(scorer, probe.ids[:4])), self._previous)
