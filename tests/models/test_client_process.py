"""Requests from a process of their own: the same answers and errors, and no process that stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from kd_lightning.models.openai_client import OpenAIClient, RequestRefusedError, ServerError
from kd_lightning.models.scoring.dialects import DIALECTS, Dialect
from kd_lightning.models.scoring.scorer import PromptScorer
from scoring_server import ScoringServer

PROMPTS = [[5 + n, 9, 11 + n, 4, 20] for n in range(12)]
FORMS = {"vllm": DIALECTS[0], "sglang": DIALECTS[1], "echo ids": DIALECTS[2]}


def scorer_of(server: ScoringServer, dialect: Dialect = DIALECTS[0], **settings: Any) -> PromptScorer:
    return PromptScorer(OpenAIClient(server.url, **settings), "teacher", 6, dialect)


def child_of(scorer: PromptScorer) -> subprocess.Popen[bytes]:
    assert scorer.process is not None
    return scorer.process._process


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_many_threads_get_the_answers_of_their_own_prompts(name: str) -> None:
    with ScoringServer(name) as server:
        scorer = scorer_of(server, FORMS[name])
        behind = scorer.in_process()
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda ids: behind.score(ids, "a row"), PROMPTS))
        for ids, answer in zip(PROMPTS, answers, strict=True):
            expected = scorer.score(ids, "a row")
            assert torch.equal(answer.ids, expected.ids)
            assert torch.equal(answer.log_probs, expected.log_probs)
        behind.close()


def test_answers_that_may_name_tokens_by_text_are_read_by_threads() -> None:
    with ScoringServer("echo ids") as server:
        scorer = scorer_of(server, FORMS["echo ids"])
        assert scorer.in_process() is scorer


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ((400, b"k is too large"), r"refused row 3: HTTP 400 k is too large"),
        ((200, b"nonsense"), r"row 3: invalid answer: nonsense"),
        ((503, b"down"), r"does not answer: row 3 failed for .* s \(HTTP 503 down\); finished responses"),
        ((200, b'{"model": "other", "choices": []}'), r"row 3: it answers with model other, where teacher was asked"),
    ],
)
def test_errors_are_those_of_threads(answer: Any, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with ScoringServer(fault=lambda number, path, body: answer) as server:
        scorer = scorer_of(server, patience=0.6)
        found = []
        for asking in (scorer, scorer.in_process()):
            with pytest.raises(ServerError, match=expected) as caught:
                asking.score(PROMPTS[0], "row 3")
            found.append(type(caught.value))
            assert ("retrying" in capsys.readouterr().err) == (answer[0] == 503 or answer[1] == b"nonsense")
            asking.close()
    assert found[0] is found[1] is (RequestRefusedError if answer[0] == 400 else ServerError)


def test_outages_are_counted() -> None:
    down = lambda number, path, body: (503, b"") if number == 0 else None  # noqa: E731
    with ScoringServer(fault=down) as server:
        scorer = scorer_of(server).in_process()
        scorer.score(PROMPTS[0], "a row")
        assert scorer.outages == 1
        scorer.score(PROMPTS[0], "a row")
        assert scorer.outages == 1
        scorer.close()


def test_requests_of_a_process_that_was_killed_fail_with_what_to_do() -> None:
    with ScoringServer(delay=30.0) as server:
        scorer = scorer_of(server, advice="resume the run").in_process()
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(scorer.score, ids, "a row") for ids in PROMPTS[:2]]
            deadline = time.monotonic() + 20
            while len(server.bodies) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            child_of(scorer).kill()
            for future in waiting:
                with pytest.raises(ServerError, match="the process of its requests has ended; resume the run"):
                    future.result(20)
        with pytest.raises(ServerError, match="has ended"):
            scorer.score(PROMPTS[0], "a row")


def test_the_process_ends_with_its_scorer() -> None:
    with ScoringServer() as server:
        scorer = scorer_of(server).in_process()
        child = child_of(scorer)
        assert child.poll() is None
        del scorer
        assert child.poll() is not None


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_the_process_ends_with_the_program(end: str) -> None:
    code = (
        "import sys, time; from kd_lightning.models.openai_client import OpenAIClient\n"
        "from kd_lightning.models.scoring.client_process import ClientProcess\n"
        "process = ClientProcess(OpenAIClient('http://localhost:1'))\n"
        "print(process._process.pid, flush=True)\n"
        f"time.sleep(0 if {end == 'exit'} else 600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, encoding="utf-8") as program:
        assert program.stdout is not None
        child = int(program.stdout.readline())
        if end == "kill":
            os.kill(program.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while _is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
