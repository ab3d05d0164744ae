"""A teacher behind a server: the top k of its distributions over HTTP."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from kd_lightning.engine.head import Head
from kd_lightning.engine.label_mask import next_token_mask
from kd_lightning.engine.top_k import TopK
from kd_lightning.models.openai_client import OpenAIClient
from kd_lightning.models.prompt_logprobs import PromptScorer, detect_dialect
from kd_lightning.teachers.base import RunContext, Teacher
from kd_lightning.teachers.cache_format import row_keys
from kd_lightning.teachers.server_checks import check_scores

AHEAD = 4
"""Answers of so many batches are kept for a batch that has not been read yet."""


class ServerTeacher(Teacher):
    """A teacher behind an OpenAI-compatible server that gives log-probabilities of a prompt.

    For each labeled token, the `top_k` most probable tokens and the total probability of all others are known, as with
    `kd-lightning cache --kind top_k`: divergences are lower bounds, and only f-divergences can be computed. With
    `top_k` at least the vocabulary it equals the teacher in process. Rows are sent as token ids, several at a time, and
    those of the next batch while a step runs. The server is tested before the first step: its tokens, positions and
    log-probabilities, and whether it gives as many tokens as asked for.

    Args:
        url: address of the server, with or without `/v1`.
        model: name of the served model; None: the only one that is served.
        top_k: number of tokens of each distribution, at least 1; vLLM allows 20 unless started with `--max-logprobs`.
        requests: largest number of requests at a time, at least 1.
        patience: seconds during which requests to a server that does not answer are retried.
        timeout: seconds to wait for one answer.
        api_key_env: name of the environment variable that holds the server's key; `OPENAI_API_KEY` may be unset.

    Raises:
        ValueError: an argument is out of its range; on `load`: the server refuses, does not answer, or fails the test.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        top_k: int = 20,
        requests: int = 8,
        patience: float = 180.0,
        timeout: float = 600.0,
        api_key_env: str = "OPENAI_API_KEY",
    ) -> None:
        for name, value in (("top_k", top_k), ("requests", requests)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._client = OpenAIClient(url, patience, timeout, api_key_env)
        self.top_k, self.requests = top_k, requests
        self._model = model
        self._scorer: PromptScorer | None = None
        self._run: RunContext | None = None
        self._vocabulary: int | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._asked: dict[bytes, Future[TopK]] = {}

    @property
    def name(self) -> str | None:
        """None: it reads the student's tokens."""
        return None

    @property
    def head(self) -> Head | None:
        """None: only distributions are known."""
        return None

    @property
    def vocabulary(self) -> int | None:
        """Number of tokens of the student, once attached."""
        return self._vocabulary

    @property
    def is_exact(self) -> bool:
        """Whether all tokens of every distribution are known."""
        return self._vocabulary is not None and self.top_k >= self._vocabulary

    def attach(self, run: RunContext) -> None:
        """Take the student's vocabulary and the rows, and check that the loss can be computed from the top k."""
        self._run = run
        self._vocabulary = run.student.vocabulary
        if not self.is_exact:
            run.check_top_k_loss()

    def load(self, device: torch.device | str = "cpu") -> None:
        """Connect to the server and test it with tokens of the data."""
        if self._scorer is not None:
            return
        if self._run is None or self._vocabulary is None:
            raise ValueError("ServerTeacher must be attached to a run before it is loaded")
        tokenizer = None if self._run.data is None else self._run.data.text_tokenizer.tokenizer
        scorer = PromptScorer(self._client, self._client.select_model(self._model), self.top_k, tokenizer=tokenizer)
        probe = self._probe()
        scorer = replace(scorer, dialect=detect_dialect(scorer, probe[:4]))
        longest = 0 if self._run.data is None else self._run.data.longest("teacher")
        check_scores(scorer, probe, self._vocabulary, longest)
        self._scorer = scorer
        self._pool = ThreadPoolExecutor(self.requests)
        if self._run.data is not None:
            self._run.data.look_ahead(self.prefetch)
        if not self.is_exact:
            rank_zero_info(
                f"teacher: {scorer.model} at {self._client.url}: {self.top_k} tokens and the mass of the others are "
                "known: divergences, monitored ones too, are lower bounds"
            )

    def _probe(self) -> list[int]:
        """Tokens of a row of the data, or any others."""
        data = None if self._run is None else self._run.data
        for split in () if data is None else data.splits:
            assert data is not None
            for batch in itertools.islice(data.every_row(split), 1):
                return [int(token) for token in _prompts(batch)[0][:64]]
        assert self._vocabulary is not None
        return [(7 * n + 3) % self._vocabulary for n in range(16)]

    def to(self, device: torch.device | str) -> None:
        """Does nothing: answers go to the device of the batch."""

    def prefetch(self, batch: Mapping[str, Tensor]) -> None:
        """Ask for the rows of a batch that is read later; does not wait."""
        self._ask(batch)
        limit = AHEAD * max(1, len(batch["labels"]))
        for key in [key for key, answer in self._asked.items() if answer.done()][: max(0, len(self._asked) - limit)]:
            del self._asked[key]

    def _ask(self, batch: Mapping[str, Tensor]) -> dict[int, bytes]:
        """Ask for the rows of a batch that have a label; their keys in `_asked` by row of the batch."""
        if self._scorer is None or self._pool is None:
            raise ValueError("the teacher is not loaded yet: call `load(device)` first")
        labels = batch["labels"].cpu()
        labeled = next_token_mask(labels)
        keys, prompts = row_keys(batch), _prompts(batch)
        names = batch["row_ids"].tolist() if "row_ids" in batch else range(len(labels))
        found = {}
        for row in torch.nonzero(labeled.any(1)).flatten().tolist():
            key = keys[row].cpu().numpy().tobytes()
            if key not in self._asked:
                places = self._places(batch, row, labeled[row])
                what = f"row {names[row]}"
                self._asked[key] = self._pool.submit(self._answer, prompts[row].tolist(), places, what)
            found[row] = key
        return found

    def _result(self, answer: Future[TopK]) -> TopK:
        """Wait for an answer; if there is none, or the wait is interrupted, cancel all others."""
        try:
            return answer.result()
        except BaseException:
            self._client.close()
            if self._pool is not None:
                self._pool.shutdown(wait=False, cancel_futures=True)
            raise

    @staticmethod
    def _places(batch: Mapping[str, Tensor], row: int, labeled: Tensor) -> list[int]:
        """Positions of a row's labels among its tokens without padding, minus one: indices of the entries."""
        order = batch["attention_mask"][row].cpu().cumsum(0) - 1
        return [int(place) for place in order[1:][labeled] - 1]

    def _answer(self, ids: Sequence[int], places: Sequence[int], what: str) -> TopK:
        assert self._scorer is not None and self._vocabulary is not None
        entries = self._scorer.score(ids, what)
        return as_top_k([entries[n] for n in places], [ids[n + 1] for n in places], self.top_k, self._vocabulary)

    def hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Not available.

        Raises:
            ValueError: always.
        """
        raise ValueError("a served teacher gives distributions only: ask for its logits")

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor | TopK:
        """`TopK` of shape [B, T], or log-probabilities [B, T, V] if `top_k` is at least the vocabulary."""
        labels, width = batch["labels"], min(self.top_k, self._vocabulary or self.top_k)
        device = labels.device
        ids = torch.arange(width, device=device).expand(*labels.shape, width).clone()
        log_probs = torch.full(ids.shape, -math.log(max(width, 2)), device=device)
        log_tail = torch.full(labels.shape, -math.log(2.0), device=device)
        labeled = next_token_mask(labels)
        asked = self._ask(batch)
        for row, key in asked.items():
            known, where = self._result(self._asked[key]), labeled[row]
            ids[row, :-1][where] = known.ids.to(device)
            log_probs[row, :-1][where] = known.log_probs.to(device)
            log_tail[row, :-1][where] = known.log_tail.to(device)
        for key in asked.values():  # two rows may be the same
            self._asked.pop(key, None)
        assert self._vocabulary is not None
        if self.is_exact:
            return torch.empty_like(log_probs).scatter_(-1, ids, log_probs)
        return TopK(ids, log_probs, log_tail, self._vocabulary)

    def fingerprint(self) -> str:
        """A digest of address and name of the model: its weights cannot be seen."""
        model = self._model if self._scorer is None else self._scorer.model
        return hashlib.sha256(f"served {self._client.url} {model}".encode()).hexdigest()


def _prompts(batch: Mapping[str, Tensor]) -> list[Tensor]:
    """The tokens of each row without padding."""
    ids, mask = batch["input_ids"].cpu(), batch["attention_mask"].cpu().bool()
    return [row[there] for row, there in zip(ids, mask, strict=True)]


def as_top_k(entries: Sequence[Mapping[int, float]], labels: Sequence[int], k: int, vocabulary: int) -> TopK:
    """The k most probable tokens of each entry; the label replaces the last one where it is not among them.

    Tokens outside of the vocabulary are removed and the rest is normalized again. Missing tokens of an entry that has
    fewer than k are filled up with tokens that share its tail.

    Args:
        entries: log-probabilities by token id.
        labels: the label of each; it has a log-probability.
        k: number of tokens.
        vocabulary: number of tokens that are known to the student.
    """
    width = min(k, vocabulary)
    ids = torch.empty(len(entries), width, dtype=torch.long)
    log_probs, log_tail = torch.empty(len(entries), width), torch.empty(len(entries))
    for n, (entry, label) in enumerate(zip(entries, labels, strict=True)):
        outside = math.fsum(math.exp(value) for token, value in entry.items() if token >= vocabulary)
        shift = -math.log1p(-min(outside, 1 - 1e-6))
        inside = {token: value + shift for token, value in entry.items() if token < vocabulary}
        best = sorted(inside, key=lambda token: (-inside[token], token))[:width]
        if label not in best:
            best[-1] = label
        mass = math.fsum(math.exp(inside[token]) for token in best)
        rest = max(1 - mass, 0.0)
        others = vocabulary - len(best)
        share = rest / others if others else 0.0
        spare = (token for token in itertools.count() if token not in inside)
        filled = [*best, *itertools.islice(spare, width - len(best))]
        missing = width - len(best)
        ids[n] = torch.tensor(filled)
        values = [inside[token] for token in best] + [math.log(share) if share else -math.inf] * missing
        log_probs[n] = torch.tensor(values)
        tail = rest - share * missing
        log_tail[n] = math.log(tail) if tail > 0 and others > missing else -math.inf
    return TopK(ids, log_probs, log_tail, vocabulary)
