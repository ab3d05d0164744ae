"""A teacher behind a server: the top k of its distributions over HTTP."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from kd_lightning.engine.head import Head
from kd_lightning.engine.label_mask import next_token_mask
from kd_lightning.engine.top_k import TopK
from kd_lightning.models.openai_client import OpenAIClient, ServerError
from kd_lightning.models.scoring.scorer import PromptScorer, PromptScores, detect_dialect
from kd_lightning.teachers.base import RunContext, Teacher
from kd_lightning.teachers.batches import teacher_batch
from kd_lightning.teachers.cache_format import row_keys
from kd_lightning.teachers.server_answers import AnswersAhead, as_top_k
from kd_lightning.teachers.server_checks import SameModel, check_labels, check_scores

PROBE = 64
"""Number of tokens of the test at the start."""
ADVICE = "start it again, then resume: `fit` with --ckpt_path last, `cache` with the same arguments"


@dataclass(frozen=True)
class _Row:
    """A row to ask for.

    Args:
        ids: its tokens without padding, [n].
        positions: of its labels among them, minus one: indices of the entries.
        what: the row in error messages.
    """

    ids: Tensor
    positions: list[int]
    what: str


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

    Examples:
        >>> from kd_lightning import DistillationModule, ServerTeacher
        >>> teacher = ServerTeacher("http://localhost:8000/v1", top_k=20)  # no request yet
        >>> module = DistillationModule("asset:student", teacher)
        >>> module.teacher.top_k
        20
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
        self._client = OpenAIClient(url, patience, timeout, api_key_env, ADVICE)
        self.top_k, self.requests = top_k, requests
        self._model = model
        self._scorer: PromptScorer | None = None
        self._run: RunContext | None = None
        self._vocabulary: int | None = None
        self._same_model: SameModel | None = None
        self._answers: AnswersAhead[_Row, PromptScores] = AnswersAhead(self._ask, requests)

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
        known = None if run.data is None else run.data.vocabulary_map
        self._vocabulary = run.student.vocabulary if known is None else known.teacher_size
        if not self.is_exact:
            run.check_top_k_loss()

    def load(self, device: torch.device | str = "cpu") -> None:
        """Connect to the server and test it with tokens of the data."""
        if self._scorer is not None:
            return
        if self._run is None or self._vocabulary is None:
            raise ValueError("ServerTeacher must be attached to a run before it is loaded")
        data = self._run.data
        tokenizer = None if data is None else data.teacher_text_tokenizer.tokenizer
        model = self._client.select_model(self._model)
        listed = self._client.models()
        if listed and model not in listed:
            raise ServerError(
                f"model must be the name of one that {self._client.url} serves ({', '.join(listed[:5])}), got {model!r}"
            )
        names = self._client.aliases(model)
        scorer = PromptScorer(self._client, model, self.top_k, tokenizer=tokenizer, names=names)
        rows = self._first_rows()
        probe = rows[0].ids[:PROBE].tolist() if rows else [(7 * n + 3) % self._vocabulary for n in range(16)]
        scorer = replace(scorer, dialect=detect_dialect(scorer, probe[:4]))
        longest = 0 if data is None else data.longest("teacher")
        scores = check_scores(scorer, probe, self._vocabulary, longest)
        check_labels(scorer, [(row.ids, row.positions) for row in rows], self._vocabulary)
        self._scorer = scorer.in_process()
        self._same_model = SameModel(self._scorer, probe, scores)
        if data is not None and self._run.loss.reads_teacher and not self._run.generates_responses:
            data.look_ahead(self.prefetch)
        if not self.is_exact:
            rank_zero_info(
                f"teacher: {scorer.model} at {self._client.url}: {self.top_k} tokens and the mass of the others are "
                "known: divergences, monitored ones too, are lower bounds"
            )

    def _first_rows(self) -> list[_Row]:
        """The rows of the first batch of the data that has labels, or of the first one."""
        data, found = None if self._run is None else self._run.data, []
        for split in () if data is None else data.splits:
            assert data is not None
            for batch in itertools.islice(map(teacher_batch, data.every_row(split)), 1):
                found = [row for _, row in self._rows(batch).values()] or [_Row(ids, [], "") for ids in _prompts(batch)]
        return found

    def to(self, device: torch.device | str) -> None:
        """Does nothing: answers go to the device of the batch."""

    def prefetch(self, batch: Mapping[str, Tensor]) -> None:
        """Ask for the rows of a batch that is read later; does not wait."""
        self._answers.announce(dict(self._rows(teacher_batch(batch)).values()))

    def _rows(self, batch: Mapping[str, Tensor]) -> dict[int, tuple[bytes, _Row]]:
        """The rows of a batch that have a label, and their keys, by number."""
        labeled = next_token_mask(batch["labels"].cpu())
        keys, prompts = row_keys(batch), _prompts(batch)
        names = batch["row_ids"].tolist() if "row_ids" in batch else range(len(labeled))
        order = batch["attention_mask"].cpu().cumsum(1) - 1
        found = {}
        for row in torch.nonzero(labeled.any(1)).flatten().tolist():
            positions = (order[row, 1:][labeled[row]] - 1).tolist()
            found[row] = keys[row].cpu().numpy().tobytes(), _Row(prompts[row], positions, f"row {names[row]}")
        return found

    def _ask(self, row: _Row) -> PromptScores:
        """The answer for the labels of one row; called in threads."""
        assert self._scorer is not None and self._same_model is not None
        scores = self._scorer.score(row.ids.tolist(), row.what).select(row.positions)
        self._same_model.check()
        return scores

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
        if self._scorer is None:
            raise ValueError("the teacher is not loaded yet: call `load(device)` first")
        rows = self._rows(batch)
        try:
            answers = self._answers.take(dict(rows.values()))
        except BaseException:
            self._scorer.close()
            raise
        assert self._vocabulary is not None
        if rows:
            scores = PromptScores.concatenated([answers[key] for key, _ in rows.values()])
            labels_of_rows = [row.ids[1:][row.positions] for _, row in rows.values()]
            known = as_top_k(scores, torch.cat(labels_of_rows), self.top_k, self._vocabulary)
            for target, values in ((ids, known.ids), (log_probs, known.log_probs), (log_tail, known.log_tail)):
                target[:, :-1][labeled] = values.to(device)
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
