"""A writer behind a server: it writes what the student in this process would, and what goes wrong is one line."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import stirred
from kd_lightning import LoRA, Server
from kd_lightning.data.tokenization import load_tokenizer
from kd_lightning.models.generate import Sampling, generate
from kd_lightning.models.hf_adapter import eos_token_ids
from kd_lightning.models.loading import load_causal_lm
from kd_lightning.models.lora import add_adapters
from kd_lightning.serving.publication import run_command
from writing_server import FP32, WritingServer

TOKENIZER = load_tokenizer("asset:student")
TEXTS = ["apple\nn. ", "How do rivers run?", "The opposite of warm is", "a word for a large house"]
PROMPTS: list[list[int]] = [TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
GREEDY = Sampling(12, 0.0)


def student_of(kind: str) -> Any:
    torch.manual_seed(0)
    model = load_causal_lm("asset:student", kwargs=FP32, role="student")
    return add_adapters(model, LoRA(r=4)) if kind == "adapters" else model


def learn(student: Any, seed: int = 0) -> None:
    """The same student after some steps."""
    torch.manual_seed(seed)
    if any("lora_" in name for name, _ in student.named_parameters()):
        stirred(student, 0.3)
        return
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))


def server_of(server: WritingServer, kind: str, **more: Any) -> Server:
    command = None if kind == "adapters" else server.reload_command()
    return Server(server.url, **{"reload_command": command, "patience": 1.0, **more})


def in_process(student: Any, prompt: list[int], sampling: Sampling = GREEDY, seed: int = 0) -> list[int]:
    ids = torch.tensor([prompt])
    tokens = generate(student, ids, torch.ones_like(ids), sampling, seed=seed)[0].tolist()
    ends = [n for n, token in enumerate(tokens) if token in eos_token_ids(student)]
    return tokens[: ends[0] + 1] if ends else tokens


def written(server: Server, sampling: Sampling = GREEDY) -> list[list[int]]:
    found = dict(server.generate(PROMPTS, sampling, list(range(len(PROMPTS)))))
    return [found[number].ids for number in range(len(PROMPTS))]


@pytest.mark.parametrize("kind", ["adapters", "all weights"])
def test_the_tokens_are_those_of_the_student_in_process(kind: str, tmp_path: Path) -> None:
    student = student_of(kind)
    with WritingServer() as there:
        server = server_of(there, kind)
        server.connect(TOKENIZER, student)
        before = None
        for step in (0, 3, 7):
            server.publish(student, step, tmp_path, PROMPTS[1])
            assert server.last_published == step
            assert server.written_by.startswith(f"student-{step}-")
            greedy = written(server)
            assert greedy == [in_process(student, prompt) for prompt in PROMPTS]
            assert greedy != before
            before = greedy
            learn(student, step)
        sampled = Sampling(8, 1.0, 0.9)
        learn(student)
        server.publish(student, 8, tmp_path, PROMPTS[1])
        assert written(server, sampled) == [in_process(student, p, sampled, n) for n, p in enumerate(PROMPTS)]
        names = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "served").iterdir())
        assert names == (["student-7", "student-8"] if kind == "adapters" else ["student-8"])
        assert [name.rpartition("-")[0] for name in there.unloaded] == (
            ["student-0", "student-3"] if kind == "adapters" else []
        )
        assert len({body["model"] for body in there.generated()}) == (4 if kind == "adapters" else 1)


def test_a_published_step_is_not_published_again_and_a_resumed_run_takes_what_is_loaded(tmp_path: Path) -> None:
    student = student_of("adapters")
    learn(student)
    with WritingServer() as there:
        for _ in range(2):  # the second one is that of a resumed run
            server = server_of(there, "adapters")
            server.connect(TOKENIZER, student)
            for _ in range(2):
                server.publish(student, 5, tmp_path, PROMPTS[0])
        assert sum("lora_path" in body for body in there.bodies) == 1
        assert written(server) == [in_process(student, prompt) for prompt in PROMPTS]


def test_other_folders_stay(tmp_path: Path) -> None:
    student = student_of("all weights")
    folder = tmp_path / "shared"
    (folder / "student-0-mine").mkdir(parents=True)
    with WritingServer() as there:
        server = server_of(there, "all weights", adapter_folder=str(folder), adapter_name="w")
        server.connect(TOKENIZER, student)
        for step in (0, 1):
            server.publish(student, step, tmp_path / "run", PROMPTS[0])
            learn(student)
    assert sorted(path.name.rpartition("-")[0] for path in folder.iterdir()) == ["student-0", "w-1"]
    assert not (tmp_path / "run").exists()
    saved = {path.name for path in next(folder.glob("w-1-*")).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= saved


# ------------------------------------------------------------------------------------------------------ what is refused
def test_a_student_whose_weights_all_learn_needs_a_command(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pass reload_command, .*\{folder\}, or train adapters \(--model.lora.r 16\)"):
        Server("http://localhost:9").connect(TOKENIZER, student_of("all weights"))


REFUSALS = {
    "no endpoint": ({"adapters": False}, r"refused adapter student-1-\w+: HTTP 404 .*: start vLLM with VLLM_ALLOW_RUN"),
    "it refuses": (
        {"fault": lambda n, path, body: (400, b"rank 4 > max_lora_rank 2") if "load_lora" in path else None},
        r"refused adapter student-1-\w+: HTTP 400 rank 4 > max_lora_rank 2: start vLLM with VLLM_ALLOW_RUNTIME_L",
    ),
    "it does not see the folder": (
        {"fault": lambda n, path, body: body and body.update(lora_path="/nowhere")},
        r"HTTP 404 Loading lora student-1-\w+ failed: .*: start vLLM .* read the adapter's folder at the same path",
    ),
    "it answers and does nothing": (
        {"fault": lambda n, path, body: (200, b"ok") if "load_lora" in path else None},
        r"has accepted adapter student-1-\w+, but does not serve a model of that name",
    ),
    "it ignores the load": (
        {"ignore": "adapters"},
        r"model 'student-1-\w+', answers with other weights than the student's at step 1: .* differ by .* nats per tok",
    ),
    "it has no log-probabilities": (
        {
            "fault": lambda n, path, body: (
                (400, b"no") if body and ("prompt_logprobs" in body or "echo" in body) else None
            )
        },
        r"gives no log-probabilities of a prompt",
    ),
}


@pytest.mark.parametrize("case", REFUSALS.values(), ids=REFUSALS.keys())
def test_what_a_server_does_wrong_with_an_adapter_is_one_line(case: Any, tmp_path: Path) -> None:
    settings, message = case
    student = student_of("adapters")
    learn(student)
    with WritingServer(**settings) as there:
        server = server_of(there, "adapters")
        server.connect(TOKENIZER, student)
        with pytest.raises(ValueError, match=message) as error:
            server.publish(student, 1, tmp_path, PROMPTS[0])
    assert "\n" not in str(error.value)
    assert server.last_published is None


def test_a_server_that_keeps_the_weights_of_the_step_before(tmp_path: Path) -> None:
    student = student_of("all weights")
    with WritingServer(ignore="reload") as there:
        server = server_of(there, "all weights")
        server.connect(TOKENIZER, student)
        server.publish(student, 2, tmp_path, PROMPTS[0])
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.mul_(1.003)
        with pytest.raises(ValueError, match="still answers with the weights of step 2 instead of step 4"):
            server.publish(student, 4, tmp_path, PROMPTS[0])
    assert len(list((tmp_path / "served").iterdir())) == 2  # nothing is deleted


SLEEP = "import time; print('waiting', flush=True); time.sleep(60)"
COMMANDS: dict[str, Any] = {
    "not there": (
        ["no-such-program"],
        r"reload_command \(no-such-program\) cannot be started: No such file or directory",
    ),
    "fails": (
        [
            sys.executable,
            "-c",
            "import sys; print('one'); print('out of memory: sk-abcdefghijklmnop1234'); sys.exit(3)",
        ],
        r"reload_command \(.*\) failed with status 3: out of memory: (?!.*sk-abc)",
    ),
    "hangs": ([sys.executable, "-c", SLEEP], r"has not ended after 1 s \(reload_timeout\) and was stopped: waiting"),
    "does nothing": ("true", "answers with other weights than the student's at step 1"),
}


@pytest.mark.parametrize("case", COMMANDS.values(), ids=COMMANDS.keys())
def test_a_command_that_does_not_reload_is_one_line(case: Any, tmp_path: Path) -> None:
    command, message = case
    student = student_of("all weights")
    learn(student)
    with WritingServer() as there:
        server = Server(there.url, reload_command=command, patience=1.0, reload_timeout=1.0 if "1 s" in message else 60)
        server.connect(TOKENIZER, student)
        start = time.monotonic()
        with pytest.raises(ValueError, match=message) as error:
            server.publish(student, 1, tmp_path, PROMPTS[0])
    assert time.monotonic() - start < 20
    assert "\n" not in str(error.value)


def test_a_command_may_leave_a_server_behind(tmp_path: Path) -> None:
    begin = time.monotonic()
    run_command(["sh", "-c", "echo started; sleep 30 & echo $! > " + str(tmp_path / "pid")], 20)
    assert time.monotonic() - begin < 10
    os.kill(int((tmp_path / "pid").read_text(encoding="utf-8")), signal.SIGTERM)


def test_texts_are_tokenized_again_where_a_server_gives_no_ids(tmp_path: Path, caplog: Any) -> None:
    student = student_of("adapters")
    with WritingServer(ids=False) as there, caplog.at_level("INFO"):
        server = server_of(there, "adapters")
        server.connect(TOKENIZER, student)
        server.publish(student, 0, tmp_path, PROMPTS[0])
        found = [answer for _, answer in server.generate(PROMPTS, GREEDY, [0] * 4)]
    assert not any(answer.exact for answer in found)
    for answer in found:
        end = [TOKENIZER.eos_token_id] if answer.finish_reason == "eos" else []
        assert answer.ids == TOKENIZER(answer.text, add_special_tokens=False)["input_ids"] + end
    assert caplog.text.count("gives no token ids of its responses") == 1


ANSWERS = {
    "the prompt changed": (
        lambda body: {"choices": [{"text": "", "finish_reason": "length", "prompt_token_ids": [0, *body["prompt"]]}]},
        "row 0: the server reads other tokens than the prompt's",
    ),
    "ids of other tokens": (
        lambda body: {"choices": [{"text": "words", "finish_reason": "length", "token_ids": [5, 6]}]},
        "row 0: the token ids of the server's response do not decode to its text",
    ),
    "ids that the model has not": (
        lambda body: {"choices": [{"text": "words", "finish_reason": "length", "token_ids": [5, 99999]}]},
        "row 0: invalid answer",
    ),
}


@pytest.mark.parametrize("case", ANSWERS.values(), ids=ANSWERS.keys())
def test_an_answer_of_other_tokens_is_refused(case: Any) -> None:
    answer, message = case

    def fault(number: int, path: str, body: Any) -> Any:
        return (200, json.dumps(answer(body)).encode()) if body else None

    with WritingServer(fault=fault) as there:
        server = Server(there.url, patience=3.0)
        server.connect(TOKENIZER, student_of("adapters"))
        with pytest.raises(ValueError, match=message):
            list(server.generate(PROMPTS[:1], GREEDY, [0]))


def test_what_is_sent() -> None:
    student = student_of("adapters")
    with WritingServer() as there:
        server = Server(there.url)
        server.connect(TOKENIZER, student)
        list(server.generate(PROMPTS[:1], Sampling(7, 0.5, 0.9), [2**40 + 3]))
        (body,) = there.generated()
    assert body["prompt"] == PROMPTS[0]
    assert (body["max_tokens"], body["temperature"], body["top_p"], body["seed"]) == (7, 0.5, 0.9, 3)
    assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (-1, 0.0, 1.0)
    assert body["stop_token_ids"] == eos_token_ids(student)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"requests": 0}, "requests must be at least 1, got 0"),
        ({"adapter_name": "../x"}, "adapter_name must have letters"),
        ({"reload_command": ""}, "reload_command must have a program"),
        ({"reload_command": "curl 'x"}, "reload_command is not a command"),
        ({"reload_timeout": 0}, "reload_timeout must be > 0"),
        ({"url": "localhost"}, "server must be an address"),
    ],
)
def test_arguments_that_are_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Server(**{"url": "http://localhost:9", **bad})
