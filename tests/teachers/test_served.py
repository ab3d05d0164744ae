"""A teacher behind a server: what it gives is the teacher's, and what a server does wrong is named."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor

import runs
from kd_lightning import AdaptiveKL, DistillationModule, ForwardKL, ReverseKL, SkewKL, TotalVariation
from kd_lightning.cli.program import main
from kd_lightning.data import InstructionDataModule
from kd_lightning.engine.top_k import TopK
from kd_lightning.teachers import HFTeacher
from kd_lightning.teachers.cache_writer import fill_cache
from kd_lightning.teachers.cached import CachedTeacher
from kd_lightning.teachers.served import ServerTeacher, as_top_k
from refusals import refused
from scoring_server import ScoringServer
from tiny_fits import assert_same_student, fit_data

SGD = functools.partial(torch.optim.SGD, lr=0.1)
FP32 = {"dtype": "float32"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(runs.little_data(tmp_path_factory.mktemp("rows"), rows=24))


def data_of(path: str, **kwargs: Any) -> InstructionDataModule:
    settings = {"tokenizer": "asset:student", "batch_size": 4, "max_length": 96, "shuffle": False, **kwargs}
    return InstructionDataModule(path, **settings)  # type: ignore[arg-type]


def train(
    teacher: Any, path: str, steps: int = 4, data: dict[str, Any] | None = None, **kwargs: Any
) -> dict[str, Tensor]:
    module = DistillationModule("asset:student", **{"teacher": teacher, "optimizer": SGD, **kwargs})
    return fit_data(module, data_of(path, **(data or {})), steps, seed=1)


@pytest.mark.parametrize(
    ("dialect", "objective", "steps"),
    [
        ("vllm", ForwardKL(), 2),
        ("echo ids", AdaptiveKL(), 1),
        pytest.param("vllm", ReverseKL(), 10, marks=pytest.mark.slow),
    ],
)
def test_all_tokens_give_the_run_in_process(dialect: str, objective: Any, steps: int, rows: str) -> None:
    settings = {"objective": objective, "temperature": 2.0, "ce_weight": 0.3, "data": {"batch_size": 2}, "steps": steps}
    with ScoringServer(dialect) as server:
        served = train(ServerTeacher(server.url, top_k=2048), rows, **settings)
    here = train("asset:teacher", rows, teacher_kwargs=FP32, **settings)
    assert_same_student(served, here, atol=1e-5)


@pytest.mark.parametrize("objective", [ForwardKL(), ReverseKL(), TotalVariation(), SkewKL()], ids=repr)
def test_the_top_k_are_those_of_a_cache(objective: Any, rows: str, tmp_path: Path) -> None:
    data = data_of(rows, teacher_prompt="{prompt} {task}")
    data.setup("fit")
    teacher = HFTeacher("asset:teacher", FP32)
    teacher.load()
    fill_cache(tmp_path / "cache", teacher, data, 2048, kind="top_k", k=20, dtype="float32", bar=False)
    own = {"teacher_prompt": "{prompt} {task}"}
    cached = train(CachedTeacher(str(tmp_path / "cache")), rows, data=own, objective=objective)
    with ScoringServer() as server:
        served = train(ServerTeacher(server.url, top_k=20), rows, data=own, objective=objective)
    assert_same_student(served, cached, atol=1e-5)


def test_a_cache_of_a_server_is_that_of_its_model(rows: str, tmp_path: Path) -> None:
    with ScoringServer() as server:
        train(ServerTeacher(server.url, top_k=8), rows, steps=1)
        data = data_of(rows)
        data.setup("fit")
        module = DistillationModule("asset:student", teacher=ServerTeacher(server.url, top_k=8))
        module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        module.trainer.datamodule = data  # type: ignore[attr-defined]
        module.configure_model()
        assert module.teacher is not None
        fill_cache(tmp_path / "a", module.teacher, data, 2048, kind="top_k", k=8, dtype="float32", bar=False)
        asked = len(server.bodies)
        fill_cache(tmp_path / "a", module.teacher, data, 2048, kind="top_k", k=8, dtype="float32", bar=False)
        assert len(server.bodies) == asked  # a finished row is not asked for again
        with pytest.raises(ValueError, match="k must be 8"):
            fill_cache(tmp_path / "b", module.teacher, data, 2048, kind="top_k", k=9, dtype="float32", bar=False)
    teacher = HFTeacher("asset:teacher", FP32)
    teacher.load()
    fill_cache(tmp_path / "c", teacher, data, 2048, kind="top_k", k=8, dtype="float32", bar=False)
    found = [CachedTeacher(str(tmp_path / name)) for name in "ac"]
    for cached in found:
        cached.load()
    for batch in data.every_row("train"):
        one, other = (cached.logits(batch) for cached in found)
        assert isinstance(one, TopK)
        assert isinstance(other, TopK)
        torch.testing.assert_close(one.log_tail, other.log_tail, atol=1e-5, rtol=0)
        torch.testing.assert_close(one.log_probs.sort(-1).values, other.log_probs.sort(-1).values, atol=1e-5, rtol=0)


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
    "another model": ({}, {"model": "missing"}, "missing|teacher"),
}


@pytest.mark.parametrize("case", FAULTS.values(), ids=FAULTS.keys())
def test_what_a_server_does_wrong_is_named_before_the_first_step(case: Any, rows: str) -> None:
    server_settings, settings, words = case
    fault = None
    if settings.get("model"):
        fault = lambda n, path, body: (404, b"model missing not found") if body and body["model"] == "missing" else None  # noqa: E731
    with ScoringServer(fault=fault, **server_settings) as server, pytest.raises(ValueError, match=words):
        train(ServerTeacher(server.url, patience=2.0, **settings), rows)


def test_texts_that_are_unique_are_accepted(rows: str) -> None:
    data = data_of(rows)
    data.setup("fit")
    texts = {token: data.tokenizer.decode([token]) for token in range(2048)}
    unique = len(set(texts.values())) == len(texts)
    with ScoringServer("echo", text=lambda t: texts[t]) as server:
        if unique:
            train(ServerTeacher(server.url, top_k=20), rows, steps=1)
        else:
            with pytest.raises(ValueError, match="names tokens by text"):
                train(ServerTeacher(server.url, top_k=2000), rows, steps=1)


def test_trouble_that_passes_and_trouble_that_does_not(rows: str) -> None:
    def trouble(number: int, path: str, body: Any) -> Any:
        if body is None or number < 8:
            return None
        return {0: (500, b"busy"), 1: (0, b""), 2: (200, b"nonsense")}.get(number % 11)

    with ScoringServer(fault=trouble) as server:
        shaken = train(ServerTeacher(server.url, top_k=20), rows, steps=2)
    with ScoringServer() as server:
        assert_same_student(train(ServerTeacher(server.url, top_k=20), rows, steps=2), shaken, atol=1e-6)
    broken = lambda n, path, body: (503, b"down") if body is not None and n > 10 else None  # noqa: E731
    with ScoringServer(fault=broken) as server, pytest.raises(ValueError, match="does not answer: row"):
        train(ServerTeacher(server.url, top_k=20, patience=0.5), rows)


def test_the_next_batch_is_asked_for_while_this_one_is_used(rows: str) -> None:
    with ScoringServer() as server:
        teacher = ServerTeacher(server.url, top_k=4)
        seen: list[int] = []

        class Watching(DistillationModule):
            def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
                loss = super().training_step(batch, batch_idx)
                deadline = time.monotonic() + 20
                while batch_idx < 2 and len(server.bodies) < before + 4 * (batch_idx + 2):
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                seen.append(len(server.bodies))
                return loss

            def on_train_start(self) -> None:
                super().on_train_start()
                nonlocal before
                before = len(server.bodies) - len(teacher._asked)

        before = 0
        module = Watching("asset:student", teacher=teacher, optimizer=SGD)
        trainer = L.Trainer(
            accelerator="cpu", max_steps=3, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(module, datamodule=data_of(rows))
    prompts = [tuple(body["prompt"]) for body in server.bodies[before:]]
    assert len(prompts) == len(set(prompts))  # nothing is asked twice


def test_no_more_requests_at_a_time_than_allowed(rows: str) -> None:
    with ScoringServer(delay=0.02) as server:
        train(ServerTeacher(server.url, top_k=4, requests=2), rows, steps=2)
        assert server.most == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"temperature": 2.0}, "temperature must be 1"), ({"objective": AdaptiveKL()}, "AdaptiveKL")],
)
def test_what_the_top_k_cannot_give_is_refused(settings: dict[str, Any], words: str, rows: str) -> None:
    with ScoringServer() as server, pytest.raises(ValueError, match=words):
        train(ServerTeacher(server.url, top_k=20), rows, **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"top_k": 0}, "top_k must be at least 1, got 0"), ({"requests": 0}, "requests"), ({"url": "nowhere"}, "address")],
)
def test_bad_arguments(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ServerTeacher(**{"url": "http://localhost:1", **settings})


def test_entries_become_the_top_k() -> None:
    entries = [{0: -1.0, 5: -0.7, 3: -9.0}, {1: -0.1}, {2: -0.5, 9: -2.0}]
    found = as_top_k(entries, [3, 1, 2], k=2, vocabulary=8)
    assert found.ids[0].tolist() == [5, 3]  # the label replaces the last
    assert found.ids[1, 0] == 1
    total = found.log_probs.exp().sum(-1) + found.log_tail.exp()
    torch.testing.assert_close(total, torch.ones(3))
    torch.testing.assert_close(found.log_probs[2, 0].exp(), torch.tensor(0.6065 / (1 - 0.1353)), atol=1e-3, rtol=0)
    whole = as_top_k([{n: float(v) for n, v in enumerate(torch.randn(8).log_softmax(0))}], [0], k=8, vocabulary=8)
    assert whole.log_tail.item() == -torch.inf


def test_the_key_is_in_nothing_that_a_run_writes(
    rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    key = "Pq-own+key/42x"
    monkeypatch.setenv("TEAM_SERVER", key)
    echo = lambda n, path, body: (500, f"bad header {key}".encode()) if n == 7 else None  # noqa: E731
    with ScoringServer(fault=echo) as server:
        words = [*runs.little(tmp_path / "run", steps=1), "--data.train", rows, "--model.teacher", "ServerTeacher"]
        words += ["--model.teacher.url", server.url, "--model.teacher.api_key_env"]
        assert main([*words, "TEAM_SERVER"]) == 0
        assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {key}"}
        printed = "".join(capfd.readouterr())
        assert "bad header ***" in printed
        assert key not in printed
        written = {path.name: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
        assert b"api_key_env: TEAM_SERVER" in written["config.yaml"]
        assert [name for name, content in written.items() if key.encode() in content] == []
        words[words.index(str(tmp_path / "run"))] = str(tmp_path / "other")
        refused([*words, "NOT_SET"], ["api_key_env", "not set (NOT_SET)"], capfd)
        assert "sk-12" not in refused([*words, "sk-12"], ["api_key_env must be the name"], capfd)
    assert not (tmp_path / "other").exists()
