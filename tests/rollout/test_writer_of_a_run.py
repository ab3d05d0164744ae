"""Responses of a server in a run: those of this process, written ahead, never older than allowed."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

import runs
from fake_server import stable_port
from kd_lightning import (
    AdaptiveReplay,
    DistillationModule,
    InstructionDataModule,
    LoRA,
    OnPolicy,
    SampledReverseKL,
    Server,
)
from kd_lightning.models.generate import Sampling
from kd_lightning.rollout.base import ResponseSource
from kd_lightning.rollout.served import Request, ServedWriter, as_tokens
from kd_lightning.schedules import Linear
from tiny_fits import Run, assert_same_student, weights
from writing_server import WritingServer

SGD = functools.partial(torch.optim.SGD, lr=0.3)
FP32 = {"dtype": "float32"}
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.0}
STEPS = 3


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(runs.little_data(tmp_path_factory.mktemp("rows"), rows=12))


@contextmanager
def refused(*words: str) -> Iterator[None]:
    with pytest.raises(ValueError) as error:
        yield
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), error.value


def train(
    root: Path, rows: str, source: ResponseSource, *, ckpt_path: Path | None = None, seed: int = 1, **more: Any
) -> tuple[dict[str, Tensor], list[float]]:
    """The student's weights, and `train/staleness` after each micro-batch; −1: not logged yet."""
    L.seed_everything(seed, verbose=False)
    module = {name: more.pop(name) for name in ("lora", "label_loss", "ce_weight") if name in more}
    data = InstructionDataModule(
        rows, val=rows, tokenizer="asset:student", batch_size=more.pop("batch_size", 4), max_length=96
    )
    settings: dict[str, Any] = {"max_steps": STEPS, "limit_val_batches": 0, "enable_checkpointing": False}
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=root,
        logger=False,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **{**settings, **more},
    )
    pair = Run(
        "asset:student",
        "asset:teacher",
        student_kwargs=FP32,
        teacher_kwargs=FP32,
        optimizer=SGD,
        responses=source,
        **module,
    )
    trainer.fit(pair, datamodule=data, ckpt_path=ckpt_path)
    return weights(pair), [logged.get("train/staleness", -1.0) for logged in pair.logged]


def server(writer: WritingServer, **more: Any) -> Server:
    return Server(writer.url, **{"reload_command": writer.reload_command(), "requests": 3, "patience": 1.0, **more})


# ----------------------------------------------------------------------------------------------------------- exactness
@pytest.mark.parametrize("kind", [pytest.param("adapters", marks=pytest.mark.slow), "all weights"])
def test_a_server_gives_the_run_of_this_process(kind: str, rows: str, tmp_path: Path) -> None:
    lora = {"lora": LoRA(r=4)} if kind == "adapters" else {}
    there, _ = train(tmp_path / "here", rows, OnPolicy(1.0, **GREEDY), **lora)
    with WritingServer() as writer:
        found = server(writer) if kind == "all weights" else server(writer, reload_command=None)
        served, ages = train(tmp_path / "served", rows, OnPolicy(1.0, writer=found, **GREEDY), **lora)
        assert len(writer.generated()) == 4 * STEPS
        names = list(writer.loaded) if kind == "adapters" else [Path(folder).name for folder in writer.reloaded]
    assert_same_student(there, served, atol=1e-5)
    assert ages == [0.0] * STEPS
    assert [name.split("-")[1] for name in names] == ["0", "1", "2"]


def test_micro_batches_of_a_step_share_its_weights(rows: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {"accumulate_grad_batches": 2, "batch_size": 2, "max_steps": 2}
    there, _ = train(tmp_path / "here", rows, OnPolicy(1.0, **GREEDY), **more)
    with WritingServer() as writer:
        served, ages = train(tmp_path / "served", rows, OnPolicy(1.0, writer=server(writer), **GREEDY), **more)
        assert len(writer.reloaded) == 2 and len(writer.generated()) == 8
    assert_same_student(there, served, atol=1e-5)
    assert ages[1::2] == [0.0, 0.0]


def test_replayed_responses_can_be_those_of_a_server(rows: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"threshold": 1.0, "capacity": 6, "fresh_share": 0.5, **GREEDY}
    there, _ = train(tmp_path / "here", rows, AdaptiveReplay(**settings), max_steps=5)
    with WritingServer() as writer:
        source = AdaptiveReplay(writer=server(writer), **settings)
        served, ages = train(tmp_path / "served", rows, source, max_steps=5)
    assert_same_student(there, served, atol=1e-5)
    assert set(ages) == {0.0}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_resumed_run_asks_again_and_is_the_same(rows: str, tmp_path: Path) -> None:
    def run(writer: WritingServer, ckpt_path: Path | None = None) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        count, source = len(writer.generated()), OnPolicy(1.0, 6, writer=server(writer))
        saved = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=2, save_top_k=-1)
        more: dict[str, Any] = {"enable_checkpointing": True, "callbacks": [saved], "max_steps": 4}
        found, _ = train(tmp_path, rows, source, ckpt_path=ckpt_path, **more)
        return found, writer.generated()[count:]

    with WritingServer() as writer:
        whole, expected = run(writer)
        resumed, asked = run(writer, tmp_path / "saved" / "step=2.ckpt")
    keys = [sorted((body["seed"], body["prompt"]) for body in bodies) for bodies in (expected[8:], asked)]
    assert keys[0] == keys[1] and len(keys[0]) == 8
    assert_same_student(whole, resumed, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- written ahead
@pytest.mark.parametrize("bound", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_no_response_is_older_than_the_bound(bound: int, rows: str, tmp_path: Path) -> None:
    with WritingServer() as writer:
        source = OnPolicy(1.0, writer=server(writer), max_staleness=bound, **GREEDY)
        more: dict[str, Any] = {"max_steps": 6, "limit_val_batches": 1, "val_check_interval": 2}
        _, ages = train(tmp_path, rows, source, **more)
        steps = [int(Path(folder).name.split("-")[1]) for folder in writer.reloaded]
        assert len(writer.generated()) == 24  # two passes, and nothing is asked for twice
    if bound == 1:  # the first batch of a pass is not known ahead
        assert ages == [0, 1, 1, 0, 1, 1] and steps == [0, 1, 3, 4]
    else:
        assert ages == [0, 1, 2, 0, 1, 2] and steps == [0, 3]


def test_the_server_writes_while_a_step_trains(rows: str, tmp_path: Path) -> None:
    class Slow(L.Callback):
        def __init__(self) -> None:
            self.asked: list[int] = []

        def on_before_zero_grad(self, trainer: L.Trainer, *args: object) -> None:
            for _ in range(100):
                if len(writer.generated()) >= 4 * (trainer.global_step + 2):
                    break
                threading.Event().wait(0.05)
            self.asked.append(len(writer.generated()))

    with WritingServer() as writer:
        source = OnPolicy(1.0, writer=server(writer), max_staleness=1, **GREEDY)
        train(tmp_path, rows, source, callbacks=[slow := Slow()], limit_train_batches=2, max_steps=-1, max_epochs=1)
        assert slow.asked == [8, 8] and len(writer.generated()) == 8  # none for the batch beyond the limit


def test_only_steps_that_generate_ask(rows: str, tmp_path: Path) -> None:
    with WritingServer() as writer:
        source = OnPolicy(0.5, writer=server(writer), max_staleness=1, **GREEDY)
        _, ages = train(tmp_path, rows, source, max_steps=6)
        generating = len(writer.generated()) // 4
        assert 0 < generating < 6 and len(writer.generated()) == 4 * generating
        moving = OnPolicy(Linear(0.0, 1.0), writer=server(writer), max_staleness=1, **GREEDY)
        train(tmp_path, rows, moving, max_steps=6)
    assert max(ages) <= 1


@pytest.mark.parametrize(
    "more",
    [
        {"fast_dev_run": True},
        {"overfit_batches": 2, "max_steps": 4},
        {"num_sanity_val_steps": 1, "limit_val_batches": 1, "max_steps": 2},
        {"accumulate_grad_batches": 2, "max_steps": -1, "max_epochs": 1},
    ],
    ids=["fast_dev_run", "overfit", "sanity", "short last window"],
)
def test_odd_runs_end(more: dict[str, Any], rows: str, tmp_path: Path) -> None:
    before = threading.active_count()
    with WritingServer() as writer:
        source = OnPolicy(1.0, writer=server(writer), max_staleness=1, **GREEDY)
        train(tmp_path, rows, source, **more)
        assert writer.generated()
    assert threading.active_count() <= before + 1
    assert ("fast_dev_run" in more) != (tmp_path / "served").exists()


class Stop(L.Callback):
    """Stop after the first step, as a signal does."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        trainer.should_stop = True


def test_a_stop_leaves_answers_unread(rows: str, tmp_path: Path) -> None:
    with WritingServer(delay=0.2) as writer:
        source = OnPolicy(1.0, writer=server(writer), max_staleness=1, **GREEDY)
        train(tmp_path, rows, source, callbacks=[Stop()], max_steps=3)
        assert len(writer.reloaded) == 1 and len(writer.generated()) <= 8


# --------------------------------------------------------------------------------------------------------------- ranks
@pytest.mark.slow
def test_two_ranks_train_as_one_process(rows: str, tmp_path: Path) -> None:
    common = [
        "--data.train",
        rows,
        "--model.student_kwargs.dtype",
        "float32",
        "--model.teacher_kwargs.dtype",
        "float32",
    ]
    common += ["--model.optimizer", "SGD", "--model.optimizer.lr", "0.3", "--trainer.max_steps", "3"]
    common += [
        "--model.responses",
        "OnPolicy",
        "--model.responses.share",
        "1.0",
        "--model.responses.max_new_tokens",
        "6",
    ]
    common += ["--model.responses.temperature", "0.0", "--seed_everything", "1"]
    assert finished(tmp_path / "here", [*common, "--data.batch_size", "4"])
    with WritingServer() as writer:
        served = ["--model.responses.writer", "Server", "--model.responses.writer.url", writer.url]
        served += ["--model.responses.writer.reload_command", json.dumps(writer.reload_command())]
        two = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "2"]
        assert finished(tmp_path / "served", [*common, *served, *two])
        assert len(writer.reloaded) == 3 and len(writer.generated()) == 12
    there, found = runs.student(tmp_path / "here"), runs.student(tmp_path / "served")
    assert_same_student(there, found, atol=1e-5)


def finished(root: Path, words: list[str]) -> bool:
    status, _, errors = runs.finish([*runs.little(root), *words])
    assert status == 0, errors[-3000:]
    return True


# -------------------------------------------------------------------------------------------------------- bad arguments
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda s: OnPolicy(max_staleness=-1, writer=s), ["max_staleness", "-1", "0"]),
        (lambda s: OnPolicy(max_staleness=1.5, writer=s), ["max_staleness", "whole number", "1.5"]),
        (lambda s: OnPolicy(max_staleness=2), ["max_staleness", "writer=Server", "2"]),
        (lambda s: OnPolicy(writer="http://localhost"), ["writer", "Server", "http://localhost"]),
        (lambda s: AdaptiveReplay(max_staleness=True, writer=s), ["max_staleness", "True"]),
        (
            lambda s: DistillationModule(
                "asset:student",
                "asset:teacher",
                label_loss=SampledReverseKL(),
                ce_weight=1.0,
                responses=OnPolicy(1.0, writer=s, max_staleness=1),
            ),
            ["max_staleness", "SampledReverseKL", "OnPolicy", "importance"],
        ),
    ],
)
def test_arguments(make: Any, words: list[str]) -> None:
    with refused(*words):
        make(Server("http://127.0.0.1:9"))


def test_what_a_server_cannot_do_is_refused_before_the_first_step(rows: str, tmp_path: Path) -> None:
    with WritingServer() as writer:
        with refused("temperature", "0.01", "0.005"):
            train(tmp_path, rows, OnPolicy(1.0, writer=server(writer), max_new_tokens=6, temperature=0.005))
        with refused("reload_command"):
            train(tmp_path, rows, OnPolicy(1.0, writer=server(writer, reload_command=None), **GREEDY))
        assert not writer.bodies
    with WritingServer(max_model_len=6) as writer, refused("max_length", "6"):
        train(tmp_path, rows, OnPolicy(1.0, writer=server(writer), max_new_tokens=6))


# -------------------------------------------------------------------------------------------------------------- outages
def test_an_outage_is_outlasted_or_named(rows: str, tmp_path: Path) -> None:
    failing = {"left": 3, "always": 0}

    def fault(number: int, path: str, body: Any) -> Any:
        if path == "/v1/completions" and body.get("return_token_ids") and (failing["left"] > 0 or failing["always"]):
            failing["left"] -= 1
            return 503, b"loading"
        return None

    there, _ = train(tmp_path / "here", rows, OnPolicy(1.0, **GREEDY), max_steps=2)
    with WritingServer(fault=fault) as writer:
        source = OnPolicy(1.0, writer=server(writer, patience=20.0), **GREEDY)
        served, _ = train(tmp_path / "served", rows, source, max_steps=2)
        assert_same_student(there, served, atol=1e-5)
        failing["always"] = 1
        with refused("server", "503"):
            train(tmp_path / "cut", rows, OnPolicy(1.0, writer=server(writer), **GREEDY), max_steps=2)


def test_a_server_that_is_not_there_is_named_at_the_start(rows: str, tmp_path: Path) -> None:
    gone = Server(f"http://127.0.0.1:{stable_port()}", reload_command="true", patience=0.1)
    with refused("server", "127.0.0.1"):
        train(tmp_path, rows, OnPolicy(1.0, writer=gone, **GREEDY))


# ---------------------------------------------------------------------------------------------------------------- parts
def test_responses_become_tokens() -> None:
    tokens, live = as_tokens([[5, 2], [7, 8, 9]], torch.tensor([True, False, True]))
    assert tokens.tolist() == [[5, 2, 0], [0, 0, 0], [7, 8, 9]]
    assert live.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    assert as_tokens([], torch.tensor([False]))[1].tolist() == [[False]]


def test_a_writer_needs_a_run() -> None:
    writer = ServedWriter(Server("http://127.0.0.1:9"), 0)
    with refused("not connected"):
        writer.take([Request(0, 0, (1,), Sampling(2), 0)], 0)
