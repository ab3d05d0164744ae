"""A teacher behind a server: what it gives is the teacher's, and what a server does wrong is named."""

from __future__ import annotations

import functools
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor

import leaves
import runs
from kd_lightning import (
    AdaptiveKL,
    DistillationModule,
    ForwardKL,
    ReverseKL,
    SkewKL,
    TotalVariation,
    distillation_loss,
)
from kd_lightning.cli.program import main
from kd_lightning.data import InstructionDataModule
from kd_lightning.engine.top_k import TopK, top_k
from kd_lightning.teachers import HFTeacher
from kd_lightning.teachers.base import Teacher
from kd_lightning.teachers.cache_format import CacheManifest, CacheReader
from kd_lightning.teachers.cache_writer import fill_cache
from kd_lightning.teachers.cached import CachedTeacher
from kd_lightning.teachers.served import ServerTeacher
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
        ("sglang", ForwardKL(), 1),
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
        behind = attached(ServerTeacher(server.url, top_k=8), data)
        fill_cache(tmp_path / "a", behind, data, 2048, kind="top_k", k=8, dtype="float32", bar=False)
        asked = len(server.bodies)
        fill_cache(tmp_path / "a", behind, data, 2048, kind="top_k", k=8, dtype="float32", bar=False)
        assert len(server.bodies) == asked  # a finished row is not asked for again
        with pytest.raises(ValueError, match="k must be 8"):
            fill_cache(tmp_path / "b", behind, data, 2048, kind="top_k", k=9, dtype="float32", bar=False)
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


@pytest.fixture(scope="module")
def known(rows: str) -> tuple[dict[str, Tensor], TopK, TopK]:
    """A batch, and the top k of the bundled teacher: behind a server, and in this process."""
    data = data_of(rows)
    data.setup("fit")
    teacher = HFTeacher("asset:teacher", FP32)
    teacher.load()
    batch = next(iter(data.every_row("train")))
    with ScoringServer() as server:
        served = attached(ServerTeacher(server.url, top_k=20), data).logits(batch)
    labels = batch["labels"].roll(-1, 1)
    with torch.no_grad():
        head = teacher.head
        assert head is not None
        logits = head.logits(teacher.hidden(batch))
    here = top_k(logits.flatten(0, 1), labels.clamp_min(0).flatten(), 20)
    assert isinstance(served, TopK)
    return batch, served, TopK(here.ids.view(*labels.shape, -1), here.log_probs.view(*labels.shape, -1),
                               here.log_tail.view(labels.shape), here.vocabulary)  # fmt: skip


def attached(teacher: ServerTeacher, data: InstructionDataModule) -> Teacher:
    """The teacher in a run that is not started."""
    module = DistillationModule("asset:student", teacher=teacher)
    module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.trainer.datamodule = data  # type: ignore[attr-defined]
    module.configure_model()
    return teacher


TOP_K_LEAVES = {name: leaf for name, leaf in leaves.ALL.items() if leaf.make().not_f_divergence() is None}


@pytest.mark.parametrize("leaf", TOP_K_LEAVES.values(), ids=TOP_K_LEAVES.keys())
def test_every_divergence_of_a_top_k(leaf: leaves.Leaf, known: tuple[dict[str, Tensor], TopK, TopK]) -> None:
    batch, served, here = known
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    student = torch.randn(*labels.shape, 2048, generator=torch.Generator().manual_seed(3), requires_grad=True)
    found = []
    for teacher in (served, here):
        columns = leaf.columns(torch.empty(*labels.shape, 1))
        loss = distillation_loss(student, teacher, labels, objective=leaf.make(), rows=columns or None)
        found.append((loss, torch.autograd.grad(loss, student)[0]))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)
    assert found[0][0] > 0 or leaf.partial


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
                before = len(server.bodies) - len(teacher._answers._answers)

        before = 0
        module = Watching("asset:student", teacher=teacher, optimizer=SGD)
        trainer = L.Trainer(
            accelerator="cpu", max_steps=3, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(module, datamodule=data_of(rows))
    prompts = [tuple(body["prompt"]) for body in server.bodies[before:]]
    assert len(prompts) == len(set(prompts))  # nothing is asked twice


def test_a_cache_asks_ahead_over_batches_and_keeps_what_was_answered(rows: str, tmp_path: Path) -> None:
    data = data_of(rows, batch_size=1)
    data.setup("fit")
    settings: dict[str, Any] = {"kind": "top_k", "k": 4, "dtype": "float32", "bar": False}
    dead = threading.Event()
    down = lambda number, path, body: (503, b"down") if dead.is_set() else None  # noqa: E731

    def stop(number: int, path: str, body: Any) -> Any:
        if body is not None and number >= start + 12:
            dead.set()
        return down(number, path, body)

    start = 10**9
    with ScoringServer(fault=stop, delay=0.03) as server:
        teacher = attached(ServerTeacher(server.url, top_k=4, requests=4, patience=0.2), data)
        server.most, start = 0, len(server.bodies)
        with pytest.raises(ValueError, match=r"does not answer.*`cache` with the same arguments"):
            fill_cache(tmp_path / "cache", teacher, data, 2048, **settings)
        assert server.most == 4
    done = CacheReader(tmp_path / "cache", CacheManifest.read(tmp_path / "cache").digest)
    assert 8 <= len(done.keys) <= 12
    with ScoringServer() as server:
        teacher = attached(ServerTeacher(server.url, top_k=4), data)
        teacher.fingerprint = lambda: CacheManifest.read(tmp_path / "cache").teacher_fingerprint  # type: ignore[method-assign]
        start = len(server.bodies)
        fill_cache(tmp_path / "cache", teacher, data, 2048, **settings)
        assert len(server.bodies) - start == 24 - len(done.keys)


def test_the_teachers_own_rows_are_asked_ahead_and_each_once(rows: str) -> None:
    data = {"teacher_prompt": "{prompt} {task}", "num_workers": 2, "batch_size": 2}
    with ScoringServer() as server:
        train(ServerTeacher(server.url, top_k=4, requests=2), rows, steps=10, data=data)
        prompts = [tuple(body["prompt"]) for body in server.bodies]
    asked = {prompt: prompts.count(prompt) for prompt in prompts if len(prompt) > 4}
    assert len([count for count in asked.values() if count > 1]) <= 2  # those of the test at the start: one batch
    assert len(asked) <= 24 + 3  # rows, and those with a changed token; none of the student's


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
