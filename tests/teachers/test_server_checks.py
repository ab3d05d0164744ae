"""What a server does wrong is named in one line: before the first step, and when its model changes during the run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_served import train

import runs
from kd_lightning.models.openai_client import OpenAIClient
from kd_lightning.models.scoring.scorer import PromptScorer
from kd_lightning.teachers import server_checks
from kd_lightning.teachers.served import ServerTeacher
from scoring_server import ScoringServer

ORDER = torch.randperm(2048, generator=torch.Generator().manual_seed(8)).tolist()
BACK = {token: place for place, token in enumerate(ORDER)}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(runs.little_data(tmp_path_factory.mktemp("rows"), rows=24))


def renamed(rows: list[Any], name: Any) -> list[Any]:
    return [row if row is None else {str(name(int(token))): value for token, value in row.items()} for row in rows]


def without_own(rows: list[Any]) -> list[Any]:
    """The most probable token of each entry alone."""
    return [row if row is None else dict([*row.items()][:1]) for row in rows]


OTHER_TOKENS = {"reads": lambda ids: [ORDER[token] for token in ids], "edit": lambda rows: renamed(rows, BACK.get)}

FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "words only": ({"dialect": "words"}, {}, "gives no log-probabilities of a prompt"),
    "logits": ({"change": lambda x: x + 3}, {}, "no log-probabilities"),
    "probabilities": ({"change": lambda x: x.exp()}, {}, "no log-probabilities"),
    "too early": ({"shift": 1}, {}, r"off by -1: a change of token (\d+)"),
    "two too early": ({"shift": 2}, {}, r"off by -\d"),
    "deaf": ({"change": lambda x: x[:1].expand_as(x)}, {}, "does not read the token ids"),
    "bound": ({"bound": 20}, {"top_k": 64}, r"max allowed: 20.*--max-logprobs"),
    "short": ({"max_model_len": 20}, {}, "reads 20 tokens .* and the longest row has"),
    "texts": ({"dialect": "echo", "text": lambda t: f"t{t % 100}"}, {}, "names tokens by text"),
    "another model": ({}, {"model": "missing"}, r"model must be the name of one .*\(teacher\), got 'missing'"),
    "fewer than asked for": ({"cap": 5}, {}, r"gives [56] tokens at token \d+ where 20 are asked"),
    "without the own token": ({"edit": without_own}, {}, "without the prompt's own token"),
    "ids shifted": ({"edit": lambda rows: renamed(rows, lambda token: token + 1)}, {}, r"ids are shifted by \+1"),
    "entries shifted": ({"edit": lambda rows: [None, *rows[2:], {**rows[-1]}]}, {}, "off by -1"),
    "entries shifted back": ({"edit": lambda rows: [None, {**rows[1]}, *rows[1:-1]]}, {}, r"off by \+1"),
    "other tokens": ({**OTHER_TOKENS, "decode": lambda token: f"t{token}"}, {}, "another vocabulary: .* such as token"),
    "other tokens without texts": (
        {**OTHER_TOKENS, "decode": lambda token: ""},
        {},
        "labels of the data less probability",
    ),
    "T = 2": ({"change": lambda x: x / 2}, {}, "no log-probabilities: their exponentials sum to"),
    "T = 1/2": ({"change": lambda x: 2 * x}, {}, "cannot add up to the rest.*another temperature"),
    "no ends": ({"change": lambda x: x - 4}, {}, "cannot add up to the rest"),
    "truncated": ({"reads": lambda ids: ids[-20:]}, {}, r"gives 20 positions .* it truncates the prompt"),
    "BOS": ({"reads": lambda ids: [1, *ids]}, {}, "gives 5 positions for a prompt of 4 tokens: it adds tokens"),
    "hidden BOS": (
        {"reads": lambda ids: [1, *ids], "edit": lambda rows: rows[1:]},
        {},
        "distribution for the first token",
    ),
    "BOS in an echo": ({"dialect": "echo ids", "reads": lambda ids: [1, *ids]}, {}, "reads token 1 where token 1"),
    "BOS in SGLang": ({"dialect": "sglang", "reads": lambda ids: [1, *ids]}, {}, "gives 5 positions for a prompt of 4"),
    "other tokens in SGLang": (
        {"dialect": "sglang", "reads": lambda ids: ids[::-1]},
        {},
        "reads token .* where",
    ),
    "SGLang too early": ({"dialect": "sglang", "shift": 1}, {}, "off by -1"),
    "another model's name": ({"names": lambda name: "other"}, {}, "answers with model other, where teacher was asked"),
}


@pytest.mark.parametrize("case", FAULTS.values(), ids=FAULTS.keys())
def test_what_a_server_does_wrong_is_named_before_the_first_step(case: Any, rows: str) -> None:
    server_settings, settings, words = case
    with ScoringServer(**server_settings) as server, pytest.raises(ValueError, match=words):
        train(ServerTeacher(server.url, patience=2.0, **settings), rows)


def test_a_server_that_does_not_say_its_length_is_asked_for_such_a_row() -> None:
    with ScoringServer(reads=lambda ids: ids[:64]) as server:
        scorer = PromptScorer(OpenAIClient(server.url), "teacher", 20)
        server_checks.check_length(scorer, [5, 6, 7], 64)
        with pytest.raises(ValueError, match=r"of 65 tokens, as many as the longest row .* 64 positions.*max_length"):
            server_checks.check_length(scorer, [5, 6, 7], 65)
    with ScoringServer(max_model_len=65) as server:
        scorer = PromptScorer(OpenAIClient(server.url), "teacher", 20)
        server_checks.check_length(scorer, [5, 6, 7], 64)
        assert not server.bodies


def test_names_of_one_model_are_accepted(rows: str) -> None:
    models = ({"id": "teacher", "root": "org/t"}, {"id": "alias", "root": "org/t"}, {"id": "third", "root": "org/u"})
    with ScoringServer(models=models, names=lambda name: "teacher") as server:
        train(ServerTeacher(server.url, model="alias"), rows, steps=1)
        with pytest.raises(ValueError, match="answers with model teacher, where third was asked for"):
            train(ServerTeacher(server.url, model="third"), rows, steps=1)
        with pytest.raises(ValueError, match=r"model must be the name of one .*\(teacher, alias, third\)"):
            train(ServerTeacher(server.url), rows, steps=1)


@pytest.mark.parametrize("how", ["name", "weights after an outage", "weights after a while"])
def test_another_model_during_the_run(how: str, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "weights after a while":
        monkeypatch.setattr(server_checks, "SECONDS", 0.0)
    after = 14

    def fault(number: int, path: str, body: Any) -> Any:
        if body is None or number < after:
            return None
        if how == "name":
            server.names = lambda name: "other"
        else:
            server.change = lambda scores: scores.roll(1, -1)
        return (503, b"restarting") if number == after and how == "weights after an outage" else None

    words = "answers with model other" if how == "name" else "another model than at the start.*--ckpt_path last"
    with ScoringServer(fault=fault) as server, pytest.raises(ValueError, match=words) as error:
        train(ServerTeacher(server.url, patience=20), rows, steps=6)
    assert "\n" not in str(error.value)


def test_the_same_model_after_an_outage_is_accepted(rows: str) -> None:
    fault = lambda number, path, body: (503, b"restarting") if body and number in (14, 15) else None  # noqa: E731
    noise = torch.Generator().manual_seed(1)
    bend = lambda x: (x + 0.01 * torch.randn(x.shape, generator=noise)).log_softmax(-1)  # noqa: E731
    with ScoringServer(fault=fault, change=bend) as server:
        train(ServerTeacher(server.url), rows, steps=6)
