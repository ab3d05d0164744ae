"""Responses that a server writes in a run: those of the models in this process, pass by pass, resumably."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor

import runs
from generated_runs import contrastive, seqkd
from kd_lightning import DistillationModule, LoRA, Server
from kd_lightning.callbacks.regenerate import Regeneration
from kd_lightning.cli.program import main
from kd_lightning.data import ContrastiveDataModule, PromptDataModule
from refusals import refused
from tiny_fits import assert_same_student, weights
from writing_server import WritingServer

ROWS = 8
SGD = functools.partial(torch.optim.SGD, lr=3.0)
FP32 = {"dtype": "float32"}
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.0, "keep_unfinished": True, "batch_size": 1}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(runs.little_data(tmp_path_factory.mktemp("rows"), rows=ROWS))


class Ages(L.Callback):
    """Keeps `train/staleness` of each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        self.seen.append(float(trainer.callback_metrics.get("train/staleness", torch.tensor(-1.0))))


class KeepFiles(L.Callback):
    """Keeps the lines of each file of responses, before the next pass deletes it."""

    def __init__(self, side: str) -> None:
        self.side, self.lines = side, dict[str, list[dict[str, Any]]]()

    def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        for path in Path(trainer.default_root_dir).glob(f"responses/{self.side}-pass-*.jsonl"):
            self.lines[path.name[: len(self.side) + 10]] = read(path)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def train(
    root: Path, rows: str, server: Server | None, passes: int = 2, seed: int = 1, **module: Any
) -> tuple[dict[str, Tensor], dict[str, list[dict[str, Any]]], list[float]]:
    """Pairs whose second responses are the student's of each pass."""
    L.seed_everything(seed, verbose=False)
    data = ContrastiveDataModule(rows, tokenizer="asset:student", batch_size=4, max_length=96, responses="generate")
    ages, files = Ages(), KeepFiles("student")
    teacher = Regeneration("teacher", "once", **GREEDY)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=root,
        max_epochs=passes,
        callbacks=[teacher, Regeneration("student", server=server, **GREEDY), ages, files],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    pair = DistillationModule(
        "asset:student", "asset:teacher", student_kwargs=FP32, teacher_kwargs=FP32, **{"optimizer": SGD, **module}
    )
    trainer.fit(pair, datamodule=data)
    return weights(pair), files.lines, ages.seen


def texts(files: dict[str, list[dict[str, Any]]]) -> dict[str, list[tuple[int, str, str]]]:
    return {
        name: sorted((line["row_id"], line["finish_reason"], line["response"]) for line in lines)
        for name, lines in files.items()
    }


@pytest.mark.parametrize("kind", ["adapters", "all weights"])
def test_each_pass_is_written_by_the_weights_of_its_step(kind: str, rows: str, tmp_path: Path) -> None:
    passes = 2
    module: dict[str, Any] = {"lora": LoRA(r=4)} if kind == "adapters" else {}
    module["optimizer"] = functools.partial(torch.optim.SGD, lr=3.0 if kind == "adapters" else 0.3)
    there, expected, none = train(tmp_path / "here", rows, None, passes, **module)
    with WritingServer() as writer:
        command = writer.reload_command() if kind == "all weights" else None
        server = Server(writer.url, reload_command=command, requests=3, patience=1.0)
        served, files, ages = train(tmp_path / "served", rows, server, passes, **module)
        names = [body["model"] for body in writer.generated()]
    assert texts(files) == texts(expected)
    first, second = texts(files).values()
    assert first != second
    assert_same_student(there, served, atol=1e-6)
    written = {name: {line["model"].rpartition("-")[0] for line in lines} for name, lines in files.items()}
    assert written == {f"student-pass-000{n}": {f"student-{2 * n}"} for n in range(passes)}
    if kind == "adapters":
        assert [name.rpartition("-")[0] for name in names] == [
            f"student-{2 * n}" for n in range(passes) for _ in range(ROWS)
        ]
    else:
        folders = [Path(folder).name.rpartition("-")[0] for folder in writer.reloaded]
        assert folders == ["student-0", "student-2"]
    assert ages == [0, 1] * passes
    assert set(none) == {-1}
    assert writer.most <= 3
    assert server.last_published == 2


def test_a_pass_that_was_interrupted_continues_with_the_same_weights_only(rows: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    answered = []

    def dies(number: int, path: str, body: Any) -> Any:
        if body and body.get("return_token_ids"):
            answered.append(number)
            if len(answered) > 4:
                return 400, b"out of memory"
        return None

    with WritingServer(fault=dies) as writer, pytest.raises(ValueError, match=r"refused row \d: HTTP 400 out of mem"):
        train(root, rows, Server(writer.url, requests=1, patience=1.0), passes=1, lora=LoRA(r=4))
    (path,) = (root / "responses").glob("student-pass-0000*")
    done = read(path)
    assert 0 < len(done) <= 4
    with WritingServer() as writer:
        train(root, rows, Server(writer.url, requests=1, patience=1.0), passes=1, lora=LoRA(r=4))
        assert len(writer.generated()) == ROWS - len(done)
    assert read(path)[: len(done)] == done
    with WritingServer() as writer:
        train(root, rows, Server(writer.url, requests=1, patience=1.0), passes=1, seed=2, lora=LoRA(r=4))
        assert len(writer.generated()) == ROWS
    (earlier,) = (root / "responses").glob("student-pass-0000*earlier-1.jsonl")
    assert read(earlier)[: len(done)] == done
    assert {line["model"] for line in read(path)}.isdisjoint(line["model"] for line in done)


def test_a_served_teacher_writes_what_the_teacher_in_process_writes(rows: str, tmp_path: Path) -> None:
    written = []
    with WritingServer("asset:teacher") as writer:
        for name, server in (("here", None), ("served", Server(writer.url, patience=1.0))):
            data = PromptDataModule(rows, tokenizer="asset:student", batch_size=4, max_length=96)
            teacher = {} if server else {"teacher": "asset:teacher", "teacher_kwargs": FP32}
            module = DistillationModule("asset:student", ce_weight=1.0, optimizer=SGD, student_kwargs=FP32, **teacher)
            trainer = L.Trainer(
                accelerator="cpu",
                devices=1,
                default_root_dir=tmp_path / name,
                max_steps=1,
                callbacks=[Regeneration("teacher", "once", server=server, **GREEDY)],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                limit_val_batches=0,
            )
            trainer.fit(module, datamodule=data)
            (path,) = (tmp_path / name / "responses").iterdir()
            written.append(sorted((line["row_id"], line["finish_reason"], line["response"]) for line in read(path)))
        assert not writer.loaded
    assert {line["model"] for line in read(path)} == {"base (server)"}
    assert written[0] == written[1]


def test_a_server_that_reads_too_few_tokens(rows: str, tmp_path: Path) -> None:
    with (
        WritingServer(max_model_len=6) as writer,
        pytest.raises(ValueError, match="less than the 6 tokens that the serv"),
    ):
        train(tmp_path, rows, Server(writer.url), passes=1, lora=LoRA(r=4))


# ---------------------------------------------------------------------------------------------------- the command line
def arguments(root: Path, rows: str, url: str, *more: str) -> list[str]:
    side = ["--trainer.callbacks.side", "student", "--trainer.callbacks.server", "Server"]
    return seqkd(root, Path(rows), *side, "--trainer.callbacks.server.url", url, *more, steps=1)


def test_a_run_by_arguments_and_a_key_that_is_written_nowhere(
    rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "sk-0123456789abcdefghij"
    monkeypatch.setenv("WRITER_KEY", key)
    named = ["--trainer.callbacks.server.api_key_env", "WRITER_KEY", "--model.lora.r", "4"]
    with WritingServer() as writer:
        words = arguments(tmp_path / "root", rows, writer.url, *named, "--trainer.callbacks.keep_unfinished", "true")
        assert main(words) == 0
        assert len(writer.generated()) == ROWS
        assert {headers["Authorization"] for headers in writer.headers} == {f"Bearer {key}"}
    files = [path for path in (tmp_path / "root").rglob("*") if path.is_file()]
    assert any(path.name == "adapter_model.safetensors" for path in files)
    assert not [path for path in files if key.encode() in path.read_bytes()]


def test_a_student_whose_weights_all_learn_is_refused_before_the_first_step(
    rows: str, tmp_path: Path, capfd: Any
) -> None:
    with WritingServer() as writer:
        words = arguments(tmp_path / "root", rows, writer.url)
        refused(words, ["reload_command", "{folder}", "--model.lora.r"], capfd)
        assert not writer.bodies


def test_preflight_asks_for_a_way_to_give_the_server_the_weights(rows: str, tmp_path: Path, capfd: Any) -> None:
    with WritingServer() as writer:
        assert main(["preflight", *arguments(tmp_path / "root", rows, writer.url)[1:]]) == 1
        assert "pass reload_command" in capfd.readouterr().out
        assert not writer.bodies


# --------------------------------------------------------------------------------------------------------------- ranks
@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "kind"), [("ddp", "adapters"), ("fsdp2", "adapters"), ("fsdp2", "all weights")])
def test_ranks_publish_once_and_ask_for_their_own_rows(strategy: str, kind: str, rows: str, tmp_path: Path) -> None:
    """The same responses before the first pass and the second as those of one process without a server."""
    one, two = tmp_path / "one", tmp_path / "two"
    more = ["--data.shuffle", "false", *(["--model.lora.r", "4"] if kind == "adapters" else [])]
    words = [contrastive(root, Path(rows), *more, steps=3) for root in (one, two)]
    config = tmp_path / "contrastive.yaml"
    text = json.loads(config.read_text(encoding="utf-8"))
    for callback in text["trainer"]["callbacks"]:
        callback["init_args"] |= GREEDY
    config.write_text(json.dumps(text), encoding="utf-8")
    assert main([*words[0], "--data.batch_size", "4"]) == 0
    with WritingServer() as writer:
        command = writer.reload_command() if kind == "all weights" else None
        server = {"class_path": "Server", "init_args": {"url": writer.url, "reload_command": command}}
        text["trainer"]["callbacks"][1]["init_args"]["server"] = server
        config.write_text(json.dumps(text), encoding="utf-8")
        spread = ["--data.batch_size", "2", "--trainer.devices", "2", "--trainer.strategy", strategy]
        code, _, err = runs.finish([*words[1], *spread])
        assert code == 0, err
        assert len(writer.generated()) == 2 * ROWS
        published = writer.loaded if kind == "adapters" else writer.reloaded
        assert len(published) == 2
    for number in (2, 3):
        names = [root / "responses" / f"student-{number:04d}.jsonl" for root in (one, two)]
        assert names[0].read_bytes() == names[1].read_bytes()
