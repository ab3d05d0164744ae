"""A server that gives log-probabilities of prompts by a model in this process, in the forms of several servers."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import torch

from fake_server import Answer, FakeServer
from kd_lightning.data.tokenization import load_tokenizer
from kd_lightning.models.loading import load_causal_lm

Change = Callable[[Any], Any]


class ScoringServer(FakeServer):
    """Answers with the log-probabilities of the bundled teacher.

    Args:
        dialect: "vllm", "echo" (tokens by text), "echo ids" (tokens as `token_id:N`), "sglang" (`/generate`; no
            log-probabilities of completions) or "words" (no log-probabilities).
        bound: largest number of log-probabilities.
        change: is applied to the log-probabilities [T, V] of each prompt.
        shift: entries are given so many tokens too early.
        text: the text of a token.
        fault: as in `FakeServer`, asked first.
        max_model_len: as in the list of models.
        delay: seconds that an answer takes.
        reads: the token ids that the model reads, from those that are sent.
        decode: the text of a token that the vllm form gives next to its id; None: that of the teacher's tokenizer.
        names: the name of the model in the answers, from the one that was asked for; None: no name.
        edit: is applied to the entries of each prompt, the first of which is None.
        models: the list of models.
        cap: a larger number of log-probabilities than this is lowered to it, without an error.
    """

    def __init__(
        self,
        dialect: str = "vllm",
        bound: int = 4096,
        change: Callable[[torch.Tensor], torch.Tensor] | None = None,
        shift: int = 0,
        text: Callable[[int], str] = str,
        fault: Any = None,
        max_model_len: int | None = None,
        delay: float = 0.0,
        port: int = 0,
        reads: Callable[[list[int]], list[int]] = list,
        decode: Callable[[int], str] | None = None,
        names: Callable[[str], str] | None = str,
        edit: Callable[[list[Any]], list[Any]] = list,
        models: tuple[dict[str, Any], ...] = ({"id": "teacher"},),
        cap: int = 4096,
    ) -> None:
        self.model = load_causal_lm("asset:teacher", kwargs={"dtype": "float32"}, role="teacher").eval()
        self.dialect, self.bound, self.change, self.shift, self.text = dialect, bound, change, shift, text
        self.max_model_len = max_model_len
        tokenizer = load_tokenizer("asset:teacher")
        self.decode = functools.cache(decode or (lambda token: str(tokenizer.decode([token]))))
        self.reads, self.names, self.edit, self.models, self.cap = reads, names, edit, models, cap
        self.fault = fault
        super().__init__(self._choose, delay=delay, port=port)

    def _choose(self, number: int, path: str, body: Any) -> Answer | None:
        if self.fault is not None and (found := self.fault(number, path, body)) is not None:
            answer: Answer = found
            return answer
        if path == "/v1/models":
            length = {} if self.max_model_len is None else {"max_model_len": self.max_model_len}
            return 200, json.dumps({"data": [{**model, **length} for model in self.models]}).encode()
        if path != ("/generate" if self.dialect == "sglang" and "input_ids" in body else "/v1/completions"):
            return 404, b"no such endpoint"
        return self._scores(body)

    def _scores(self, body: dict[str, Any]) -> Answer:
        ids = self.reads(body["input_ids"] if "input_ids" in body else body["prompt"])
        k = (
            body.get("prompt_logprobs")
            if self.dialect == "vllm"
            else body.get("top_logprobs_num")
            if self.dialect == "sglang"
            else body.get("logprobs")
            if body.get("echo")
            else None
        )
        if k is None or self.dialect == "words":
            return 200, json.dumps({"choices": [{"text": "words", "finish_reason": "length"}]}).encode()
        if k > self.bound:
            return 400, f"Requested sample logprobs of {k}, which is greater than max allowed: {self.bound}".encode()
        k = min(k, self.cap)
        with torch.no_grad():
            scores = self.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        scores = scores if self.change is None else self.change(scores)
        rows = [None, *(self._entry(scores[min(t + self.shift, len(ids)) - 1], ids[t], k) for t in range(1, len(ids)))]
        own = [None, *(row[str(ids[t])] for t, row in enumerate(rows) if row is not None)]
        rows = self.edit(rows)
        if self.dialect == "sglang":
            named = [None if row is None else [[v, int(t), None] for t, v in row.items()] for row in rows]
            pairs = [[value, token, None] for value, token in zip(own, ids, strict=False)]
            meta = {"input_token_logprobs": pairs, "input_top_logprobs": named, "prompt_tokens": len(ids)}
            return 200, json.dumps({"text": "", "meta_info": meta}).encode()
        if self.dialect == "vllm":
            choice: dict[str, Any] = {"text": "", "finish_reason": "length", "prompt_logprobs": rows}
            for row in filter(None, rows):
                for rank, (token, value) in enumerate(list(row.items())):
                    row[token] = {
                        "logprob": max(value, -9999.0),
                        "rank": rank + 1,
                        "decoded_token": self.decode(int(token)),
                    }
        else:
            name = (lambda t: f"token_id:{t}") if self.dialect == "echo ids" else self.text
            top = [None if row is None else {name(int(t)): v for t, v in row.items()} for row in rows]
            logprobs = {"tokens": [name(t) for t in ids], "token_logprobs": own, "top_logprobs": top}
            choice = {"text": "", "finish_reason": "length", "logprobs": logprobs}
        named = {} if self.names is None else {"model": self.names(body["model"])}
        return 200, json.dumps({**named, "choices": [choice]}).encode()

    @staticmethod
    def _entry(scores: torch.Tensor, own: int, k: int) -> dict[str, Any]:
        best = scores.topk(min(k, len(scores))).indices.tolist()
        return {str(t): float(scores[t]) for t in [*best, *([] if own in best else [own])]}
