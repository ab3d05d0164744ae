"""`kd-lightning generate --server`: requests, retries, and errors in one line."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import runs
from fake_server import Answer, FakeServer, chat
from json_lines import read
from kd_lightning.assets import resolve
from kd_lightning.cli.program import main
from kd_lightning.data.conversation import Conversation
from kd_lightning.generation.server_generator import ServerGenerator
from kd_lightning.models import openai_client as client
from kd_lightning.models.generate import Sampling
from refusals import refused

ROWS = 12


def arguments(data: Path, output: Path, url: str, *more: str) -> list[str]:
    start = ["generate", "--server", url, "--data", str(data), "--output", str(output), "--progress", "false"]
    return [*start, "--batch_size", "4", "--seed", "5", "--max_new_tokens", "9", "--temperature", "0.7", *more]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.little_data(tmp_path_factory.mktemp("data"), ROWS)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """No long waits between retries."""
    monkeypatch.setattr(client, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(client, "LONGEST_WAIT", 0.05)
    monkeypatch.setattr(client, "FIRST_PATIENCE", 0.3)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def expected(data: Path) -> list[str]:
    return [
        f"{row['instruction']}\n{row['input']}!" if row["input"] else f"{row['instruction']}!" for row in read(data)
    ]


# ------------------------------------------------------------------------------------------------------------- asked
def test_parallel_requests_are_written_in_order(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    four = threading.Barrier(4, timeout=60)

    def fault(number: int, path: str, body: Any) -> Answer | None:
        if body is not None:
            four.wait()  # no answer before four requests have arrived
        return None

    with FakeServer(fault) as fake:
        assert main(arguments(data, output, fake.url)) == 0
    rows = read(output)
    assert [row["response"] for row in rows] == expected(data)
    assert {row["model"] for row in rows} == {"parrot (server)"}
    assert {row["finish_reason"] for row in rows} == {"eos"}
    assert rows[0]["sampling"] == {"max_new_tokens": 9, "temperature": 0.7, "top_p": 1.0, "seed": 5}
    assert fake.most == 4
    body = fake.bodies[0]
    assert (body["model"], body["max_tokens"], body["temperature"], body["top_p"]) == ("parrot", 9, 0.7, 1.0)
    assert len({body["seed"] for body in fake.bodies}) == ROWS
    assert all("Authorization" not in headers for headers in fake.headers)


def test_the_same_requests_wherever_it_was_interrupted(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with FakeServer() as fake:
        assert main(arguments(data, output, f"{fake.url}/v1/", "--batch_size", "1")) == 0
        complete, asked = output.read_bytes(), list(fake.bodies)
        output.write_bytes(b"".join(complete.splitlines(keepends=True)[:7]) + complete.splitlines()[7][:-4])
        fake.bodies.clear()
        assert main(arguments(data, output, fake.url, "--batch_size", "2")) == 0
    assert output.read_bytes() == complete
    key = lambda body: body["seed"]  # noqa: E731
    assert sorted(fake.bodies, key=key) == sorted(asked[7:], key=key)


def test_plain_prompts_tools_and_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    tool = {"type": "function", "function": {"name": "f"}}
    rows = [{"prompt": "Once"}, {"messages": [{"role": "user", "content": "hi"}], "tools": [tool]}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with FakeServer() as fake:
        assert main(arguments(tmp_path / "data.jsonl", tmp_path / "out.jsonl", fake.url, "--model", "other")) == 0
    found = read(tmp_path / "out.jsonl")
    assert [(row["response"], row["finish_reason"]) for row in found] == [("on: Once", "length"), ("hi!", "eos")]
    bodies = sorted(fake.bodies, key=lambda body: "tools" in body)
    assert bodies[1]["tools"] == [tool]
    assert "messages" not in bodies[0]
    assert {body["model"] for body in bodies} == {"other"}
    assert {headers["Authorization"] for headers in fake.headers} == {"Bearer secret"}


def test_a_key_of_a_named_variable(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TEAM_SERVER", "Pq-own+key/42x")
    with FakeServer() as fake:
        assert main(arguments(data, tmp_path / "out.jsonl", fake.url, "--api_key_env", "TEAM_SERVER")) == 0
    assert {headers["Authorization"] for headers in fake.headers} == {"Bearer Pq-own+key/42x"}
    assert "Pq-own+key/42x" not in (tmp_path / "out.jsonl").read_text(encoding="utf-8") + "".join(capfd.readouterr())
    words = arguments(data, tmp_path / "other.jsonl", "http://localhost:1")
    refused([*words, "--api_key_env", "NOT_SET"], ["api_key_env", "not set (NOT_SET)"], capfd)
    assert "sk-12" not in refused([*words, "--api_key_env", "sk-12"], ["api_key_env must be the name"], capfd)


def test_empty_responses(data: Path, tmp_path: Path, capfd: Any) -> None:
    def fault(number: int, path: str, body: Any) -> Answer | None:
        return [chat(None, "tool_calls"), chat("", "stop"), chat("and \ud800", "length")][number % 3] if body else None

    with FakeServer(fault) as fake:
        assert main(arguments(data, tmp_path / "out.jsonl", fake.url)) == 0
    assert "12 responses, 8 empty, 4 cut at max_new_tokens" in capfd.readouterr().err
    assert {row["response"] for row in read(tmp_path / "out.jsonl")} == {"", "and ?"}


# ---------------------------------------------------------------------------------------------------------- survived
@pytest.mark.parametrize(
    "trouble", [(503, b"busy"), (429, b""), (500, b"oops"), (0, b""), (200, b"<html>"), (200, b'{"choices": []}')]
)
def test_transient_errors(trouble: Answer, data: Path, tmp_path: Path, capfd: Any) -> None:
    asked: Counter[int] = Counter()

    def fault(number: int, path: str, body: Any) -> Answer | None:
        """Every third row is answered by the last retry."""
        if body is None or body["messages"][-1]["content"] + "!" not in expected(data)[::3]:
            return None
        asked[body["seed"]] += 1
        return trouble if asked[body["seed"]] < client.MAX_INVALID else None

    with FakeServer(fault) as fake:
        assert main(arguments(data, tmp_path / "out.jsonl", fake.url)) == 0
    assert [row["response"] for row in read(tmp_path / "out.jsonl")] == expected(data)
    assert list(asked.values()) == [client.MAX_INVALID] * 4
    assert capfd.readouterr().err.count("retrying for up to 180 s") == 1


def test_an_outage_of_the_server(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    first = FakeServer(delay=0.05)
    codes: list[int] = []
    with first:
        run = threading.Thread(target=lambda: codes.append(main(arguments(data, output, first.url))))
        run.start()
        while len(first.bodies) < 5:
            time.sleep(0.005)
    time.sleep(0.5)  # no server listens on the port
    assert run.is_alive()
    with FakeServer(port=first.port):
        run.join(30)
    assert codes == [0]
    assert [row["response"] for row in read(output)] == expected(data)


def test_waits_between_retries_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with FakeServer() as fake:
        server = ServerGenerator(client.OpenAIClient(fake.url, 100), None, Sampling(1, 0.0))
    clock, waits = [0.0], []

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        clock[0] += seconds
        return False

    monkeypatch.setattr(server.client._closed, "wait", wait)
    monkeypatch.setattr(client.time, "monotonic", lambda: clock[0])
    with pytest.raises(ValueError, match=r"does not answer: row 1 failed for 100 s .*refused"):
        server.respond(Conversation(prompt="a"), 0)
    assert waits[:6] == [0.5, 1.0, 2.0, 4.0, 8.0, 15.0]
    assert sum(waits) == 100


# -------------------------------------------------------------------------------------------------------------- ended
def test_no_server(data: Path, tmp_path: Path, capfd: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = f"http://127.0.0.1:{port}/v1"
    capfd.readouterr()
    assert main(arguments(data, tmp_path / "out.jsonl", line)) == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith(f"kd-lightning: error: server {line} does not answer")
    assert not (tmp_path / "out.jsonl").exists()


ENDS: dict[str, tuple[Answer, list[str]]] = {
    "refused": ((400, b'{"error": "too long"}'), ["refused row", "HTTP 400", "too long"]),
    "not let in": ((401, b""), ["refused row", "HTTP 401"]),
    "a page": ((200, b"<html>hello</html>"), ["invalid answer", "<html>hello</html>"]),
    "another answer": ((200, b'{"choices": [{"message": {"content": 3}}]}'), ["invalid answer"]),
    "not UTF-8": ((200, b"\xff\xfe"), ["invalid answer"]),
    "never again": ((503, b"closed"), ["does not answer", "HTTP 503", "closed"]),
}


@pytest.mark.parametrize("case", ENDS.values(), ids=ENDS.keys())
def test_permanent_errors(case: Any, data: Path, tmp_path: Path, capfd: Any) -> None:
    trouble, said = case

    def fault(number: int, path: str, body: Any) -> Answer | None:
        return trouble if body is not None and body["messages"][-1]["content"] + "!" == expected(data)[6] else None

    output = tmp_path / "out.jsonl"
    with FakeServer(fault) as fake:
        more = ("--patience", "0.4", "--batch_size", "1")
        refused(arguments(data, output, fake.url, *more), [fake.url, *said], capfd)
    assert [row["response"] for row in read(output)] == expected(data)[:6]  # finished responses are kept
    with FakeServer() as fake:
        assert main(arguments(data, output, fake.url)) == 0
    assert [row["response"] for row in read(output)] == expected(data)


def test_a_server_of_several_models_needs_a_name(data: Path, tmp_path: Path, capfd: Any) -> None:
    def fault(number: int, path: str, body: Any) -> Answer | None:
        return (200, b'{"data": [{"id": "a"}, {"id": "b"}]}') if path == "/v1/models" else None

    with FakeServer(fault) as fake:
        refused(arguments(data, tmp_path / "out.jsonl", fake.url), ["model", "a, b"], capfd)


def test_ends_of_responses_are_sent_and_named(data: Path, tmp_path: Path) -> None:
    reasons: list[Any] = ["###", 7, None]  # a stop string, a token, and a server that does not say

    def fault(number: int, path: str, body: Any) -> Answer | None:
        if not body:
            return None
        choice = {"message": {"content": "x"}, "finish_reason": "stop", "stop_reason": reasons[number % 3]}
        return 200, json.dumps({"choices": [choice]}).encode()

    output = tmp_path / "out.jsonl"
    with FakeServer(fault) as fake:
        words = ["--stop", "###", "--stop", "[1]", "--min_new_tokens", "3", "--batch_size", "1", "--model", "m"]
        assert main(arguments(data, output, fake.url, *words)) == 0
    assert all((body["stop"], body["min_tokens"]) == (["###", "[1]"], 3) for body in fake.bodies)
    assert [row["finish_reason"] for row in read(output)[:3]] == ["stop", "eos", "eos"]
    assert read(output)[0]["sampling"]["stop"] == ["###", "[1]"]
    with FakeServer() as fake:
        assert main(arguments(data, tmp_path / "other.jsonl", fake.url)) == 0
    assert not {"stop", "min_tokens"} & {name for body in fake.bodies for name in body}


def test_other_settings_are_refused(data: Path, tmp_path: Path, capfd: Any) -> None:
    output = tmp_path / "out.jsonl"
    with FakeServer() as fake:
        assert main(arguments(data, output, fake.url)) == 0
        refused(arguments(data, output, fake.url, "--top_p", "0.5"), ["top_p 1.0, not 0.5"], capfd)
        refused(arguments(data, output, fake.url, "--model", "other"), ["another model", "parrot", "other"], capfd)


# --------------------------------------------------------------------------------------------------------- a real one
def listening(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_a_real_server(data: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    name = resolve("asset:teacher")
    flags = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    command = [sys.executable, str(program), "serve", name, *flags]
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "HF_HOME": str(tmp_path)}
    )
    try:
        end = time.monotonic() + 300
        while not listening(port):
            assert process.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.2)
        served, own = tmp_path / "served.jsonl", tmp_path / "own.jsonl"
        greedy = ("--temperature", "0", "--batch_size", "1", "--max_new_tokens", "16")
        assert main(arguments(data, served, f"http://127.0.0.1:{port}", "--model", name, *greedy)) == 0
        start = ["generate", "--model", name, "--data", str(data), "--output", str(own), "--dtype", "float32"]
        assert main([*start, "--progress", "false", *greedy]) == 0
        assert [row["response"] for row in read(served)] == [row["response"] for row in read(own)]
        sampled = ("--batch_size", "3", "--temperature", "1.0")
        assert (
            main(arguments(data, tmp_path / "sampled.jsonl", f"http://127.0.0.1:{port}", "--model", name, *sampled))
            == 0
        )
        assert len(read(tmp_path / "sampled.jsonl")) == ROWS
    finally:
        process.terminate()
        process.wait(30)
        log.close()
