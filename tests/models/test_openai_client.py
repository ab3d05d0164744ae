"""Answers that no healthy server gives: endless, slow, huge, redirected, echoing, and nonsense."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from kd_lightning.generation.response_file import Response
from kd_lightning.generation.server_generator import parse_response
from kd_lightning.models import api_key, http_exchange
from kd_lightning.models import openai_client as client
from kd_lightning.reporting.redaction import redact_config, redact_text
from raw_server import answer, raw_server

KEY = "Zq7/not-a.real+key"
GOOD = {"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}], "usage": {"completion_tokens": 3}}


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(client, "LONGEST_WAIT", 0.05)
    monkeypatch.setattr(client, "LEAST_SECONDS", 1.0)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    yield


def ask(url: str, patience: float = 0.3, timeout: float = 60.0) -> Response:
    asking = client.OpenAIClient(url, patience, timeout)
    return asking.request("chat/completions", {"messages": []}, parse_response, "row 7")


def failure(url: str, **options: float) -> str:
    with pytest.raises(ValueError, match="server") as error:
        ask(url, **options)
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    return text


def send(*parts: bytes, pause: float = 0.0) -> Any:
    def write(connection: socket.socket, head: str) -> None:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)

    return write


# ---------------------------------------------------------------------------------------------------------- deadlines
SLOW = {
    "body": [b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", *[b" "] * 1000],
    "chunks": [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", *[b"1\r\n \r\n"] * 1000],
    "no length": [b"HTTP/1.0 200 OK\r\n\r\n", *[b" "] * 1000],
    "status line": [b"HTTP/1.1 200 OK", *[b"!"] * 1000],
    "headers": [b"HTTP/1.1 200 OK\r\n", *[b"X: y\r\n"] * 50, *[b"z"] * 1000],
    "error body": [b"HTTP/1.1 500 Oops\r\nContent-Length: 100000\r\n\r\n", *[b" "] * 1000],
}


@pytest.mark.parametrize("parts", SLOW.values(), ids=SLOW.keys())
def test_an_answer_that_trickles_is_given_up(parts: list[bytes]) -> None:
    start = time.monotonic()
    with raw_server(send(*parts, pause=0.05)) as url:
        assert "does not answer: row 7 failed for" in failure(url)
    assert time.monotonic() - start < 6


def test_a_server_that_sends_nothing_is_given_up() -> None:
    start = time.monotonic()
    with raw_server(send(b"", pause=30)) as url:
        assert "does not answer" in failure(url, timeout=0.5)
    assert time.monotonic() - start < 6


def test_a_list_of_models_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "QUICK_SECONDS", 0.5)
    start = time.monotonic()
    with raw_server(send(b"", pause=30)) as url:
        for address in (url, url.replace("http:", "https:")):  # the second gets no TLS either
            with pytest.raises(ValueError, match="does not answer: the list of models failed"):
                client.OpenAIClient(address, 0.2).models()
    assert time.monotonic() - start < 6


def test_an_answer_without_tls() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def write() -> None:
            with listening.accept()[0] as connection:
                connection.recv(65536)
                connection.sendall(answer(b"{}"))

        threading.Thread(target=write, daemon=True).start()
        text = failure(f"https://127.0.0.1:{listening.getsockname()[1]}", patience=0.0)
    assert "does not answer" in text and "SSL" in text


def test_a_slow_start_is_not_a_slow_answer() -> None:
    def write(connection: socket.socket, head: str) -> None:
        time.sleep(1.5)  # longer than an answer may trickle: the model generates
        connection.sendall(answer(json.dumps(GOOD).encode()))

    with raw_server(write) as url:
        assert ask(url) == Response("hi", "eos", 3)


def test_other_threads_cancel_a_slow_answer() -> None:
    with raw_server(send(b"", pause=30)) as url:
        asking = client.OpenAIClient(url, 60)
        threading.Timer(0.3, asking.close).start()
        start = time.monotonic()
        with pytest.raises(ValueError, match="row 7 was canceled"):
            asking.request("chat/completions", {}, parse_response, "row 7")
        assert time.monotonic() - start < 5


@pytest.mark.parametrize("length", [True, False])
def test_an_endless_answer_is_refused(length: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_exchange, "MAX_BYTES", 1 << 20)
    headers = b"HTTP/1.1 200 OK\r\n" + (b"Content-Length: 999999999\r\n" if length else b"") + b"\r\n"
    with raw_server(send(headers, *[b" " * 65536] * 100)) as url:
        assert "row 7: the answer has more than 1 MiB" in failure(url)


# ----------------------------------------------------------------------------------------------------------- redirects
@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
@pytest.mark.parametrize(
    "target", ["http://other.example/v1/x?key=hunter2", "https://me:hunter2@other.example/", "/else"]
)
def test_a_redirect_of_a_prompt_is_refused(status: str, target: str) -> None:
    asked = []

    def write(connection: socket.socket, head: str) -> None:
        asked.append(head.splitlines()[0])
        connection.sendall(answer(b"", status, f"Location: {target}\r\n"))

    with raw_server(write) as url:
        text = failure(url)
    assert text.startswith(f"server {url}/v1 refused row 7: HTTP {status[:3]}: it redirects to ")
    assert "hunter2" not in text and ("other.example" in text or f"{url}/else" in text)
    assert asked == ["POST /v1/chat/completions HTTP/1.1"]


def test_a_redirect_of_the_list_of_models_is_followed_without_the_key() -> None:
    heads = []

    def write(connection: socket.socket, head: str) -> None:
        heads.append(head)
        first = "/v1/models" in head.splitlines()[0]
        body = b"" if first else b'{"data": [{"id": "parrot"}]}'
        connection.sendall(answer(body, "302 Found" if first else "200 OK", "Location: /other\r\n" if first else ""))

    with raw_server(write) as url:
        assert client.OpenAIClient(url).models() == ["parrot"]
    assert [KEY in head for head in heads] == [True, False]


def test_a_redirect_in_a_circle_ends() -> None:
    with (
        raw_server(send(answer(b"", "302 Found", "Location: /v1/models\r\n"))) as url,
        pytest.raises(ValueError) as error,
    ):
        client.OpenAIClient(url, 0.2).models()
    assert "HTTP 302" in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------- secrets
@pytest.mark.parametrize("status", ["400 Bad", "401 Unauthorized", "500 Oops", "200 OK"])
@pytest.mark.parametrize("form", ["{}", '{{"headers": {{"authorization": "Bearer {}"}}}}', "Authorization%3A {}"])
def test_an_echoed_key_is_masked(status: str, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    with raw_server(send(answer(form.format(KEY).encode(), status))) as url:
        text = failure(url) + capsys.readouterr().err
    assert KEY not in text and "***" in text


def test_a_short_key_is_masked_in_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k3y!")
    with raw_server(send(answer(b"your key k3y! is wrong", "403 Forbidden"))) as url:
        assert "your key *** is wrong" in failure(url)


def test_a_key_in_a_response_is_masked() -> None:
    body = json.dumps({"choices": [{"text": f"the header was Bearer {KEY}", "finish_reason": "stop"}]})
    with raw_server(send(answer(body.encode()))) as url:
        assert ask(url).text == "the header was Bearer ***"


@pytest.mark.parametrize(
    "url",
    [
        "http://me:hunter2@host/v1",
        "http://hunter2@host/v1",
        "https://host/v1?key=hunter2",
        "https://host?api_key=hunter2",
        "https://host/v1#hunter2",
        "ftp://me:hunter2@host",
        "me:hunter2@host:8000/v1",
        "http://me:hunter2@host:port/v1",
        "http://me:hunter2@/v1",
    ],
)
def test_an_address_with_a_secret_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(ValueError, match=r"^server must be an address") as error:
        client.OpenAIClient(url)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("key", ["two\nlines", "schlüssel", "a\x00b"])
def test_a_key_that_no_header_can_hold(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_key.os, "environ", {"OPENAI_API_KEY": key})
    with pytest.raises(ValueError, match=r"\(OPENAI_API_KEY\) must be one line") as error:
        client.OpenAIClient("http://host")
    assert key not in str(error.value)


def test_the_key_of_a_named_variable_is_sent_and_masked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own, heads = "Pq-own+key/42x", []
    monkeypatch.setenv("TEAM_SERVER", own)

    def write(connection: socket.socket, head: str) -> None:
        heads.append(head)
        connection.sendall(answer(f"no: {own}".encode(), "401 Unauthorized"))

    with raw_server(write) as url, pytest.raises(ValueError, match="variable TEAM_SERVER") as error:
        client.OpenAIClient(url, 0.2, api_key_env="TEAM_SERVER").models()
    assert f"Bearer {own}" in heads[0] and KEY not in heads[0]
    assert own not in str(error.value) + redact_text(f"a log with {own}")


@pytest.mark.parametrize(
    "given",
    [
        "sk-short",
        "sk_live_4eC39HqLyjWD",
        "hf_AbCdEfGh12345678",
        "0f1e2d3c4b5a69788796a5b4c3d2e1f0",
        "q7 x9",
        "",
        "my-key",
    ],
)
def test_a_key_in_place_of_a_name_is_refused_without_showing_it(given: str) -> None:
    with pytest.raises(ValueError, match=r"^api_key_env must be the name of an environment variable") as error:
        client.OpenAIClient("http://host", api_key_env=given)
    assert not given or given not in str(error.value)
    assert not given or given not in str(redact_config({"api_key_env": given}))


@pytest.mark.parametrize("given", ["NO_SUCH_VARIABLE", "no_such_variable1"])
def test_a_named_variable_must_be_set(given: str) -> None:
    with pytest.raises(ValueError, match=r"^api_key_env names an environment variable that is not set") as error:
        client.OpenAIClient("http://host", api_key_env=given)
    assert ("NO_SUCH_VARIABLE" in str(error.value)) == (given == "NO_SUCH_VARIABLE")
    assert redact_config({"api_key_env": given}) == {"api_key_env": given}


# ------------------------------------------------------------------------------------------------------------ nonsense
def changed(**changes: Any) -> dict[str, Any]:
    return {**GOOD, **changes}


def choice(**changes: Any) -> dict[str, Any]:
    return changed(choices=[{**GOOD["choices"][0], **changes}])  # type: ignore[index]


NONSENSE = {
    "deep": b"[" * 200_000,
    "deep objects": b'{"a":' * 100_000,
    "deep in a field": b'{"choices": [{"text": "a", "finish_reason": "stop", "x": ' + b"[" * 100_000,
    "many digits": b'{"usage": {"completion_tokens": ' + b"9" * 5000 + b"}}",
    "half of it": b'{"choices": [{"te',
    "nothing": b"",
    "null": b"null",
    "text": b'"choices"',
    "number": b"7",
    "BOM and page": b"\xef\xbb\xbf<html>",
    **{
        f"tokens {tokens}": json.dumps(GOOD)
        .replace('"completion_tokens": 3', f'"completion_tokens": {tokens}')
        .encode()
        for tokens in ("Infinity", "-Infinity", "NaN", "1e999", "-1", '"3"', "true", "[3]", "1e300")
    },
    **{
        f"{body}"[:60]: json.dumps(body).encode()
        for body in (
            changed(choices=[]),
            changed(choices=None),
            changed(choices={}),
            changed(choices="text"),
            changed(choices=[None]),
            changed(choices=[3]),
            changed(choices=["text"]),
            changed(choices=[[]]),
            changed(choices=[{}]),
            changed(usage=[3]),
            changed(usage="3"),
            changed(usage=7),
            choice(message=None),
            choice(message="hi"),
            choice(message=[]),
            choice(message={"content": 3}),
            choice(message={"content": {"text": "hi"}}),
            choice(message={"content": [{"type": "text", "text": "hi"}]}),
            choice(finish_reason=3),
            choice(finish_reason=["stop"]),
            choice(finish_reason={}),
        )
    },
}


@pytest.mark.parametrize("body", NONSENSE.values(), ids=NONSENSE.keys())
def test_nonsense_is_refused_in_one_line(body: bytes) -> None:
    asked = []

    def write(connection: socket.socket, head: str) -> None:
        asked.append(head)
        connection.sendall(answer(body))

    with raw_server(write) as url:
        assert f"server {url}/v1, row 7: invalid answer: " in failure(url, patience=20)
    assert len(asked) == client.MAX_INVALID


@pytest.mark.parametrize(
    ("body", "response"),
    [
        (choice(finish_reason=None), Response("hi", "unknown", 3)),
        (choice(finish_reason=""), Response("hi", "unknown", 3)),
        (changed(choices=[{"text": "hi"}]), Response("hi", "unknown", 3)),
        (choice(finish_reason="content_filter"), Response("hi", "content_filter", 3)),
        (choice(message={"content": None, "tool_calls": []}), Response("", "eos", 3)),
        (changed(usage=None), Response("hi", "eos", 0)),
        (changed(usage={"completion_tokens": None}), Response("hi", "eos", 0)),
        (changed(usage={"completion_tokens": 4.0}), Response("hi", "eos", 4)),
        (choice(message={"content": "half \ud800"}), Response("half ?", "eos", 3)),
    ],
)
def test_what_a_server_may_leave_out(body: Any, response: Response) -> None:
    assert parse_response(json.loads(json.dumps(body))) == response


@pytest.mark.parametrize(
    "body", [b'{"data": null}', b'{"data": [{"id": 3}]}', b'{"data": [3]}', b"[" * 100_000, b'{"data": 3}']
)
def test_a_list_of_models_that_is_none(body: bytes) -> None:
    with raw_server(send(answer(body))) as url, pytest.raises(ValueError, match="invalid answer"):
        client.OpenAIClient(url, 5).models()


def test_random_answers_are_read_or_refused() -> None:
    """Whatever JSON a server sends, `parse` raises what `request` expects."""
    draw = random.Random(17)
    words = ["choices", "message", "content", "text", "finish_reason", "usage", "completion_tokens", "role"]

    def value(depth: int) -> Any:
        kind = draw.randrange(10 if depth else 7)
        if kind > 7:
            return [value(depth - 1) for _ in range(draw.randrange(3))]
        if kind > 5:
            return {draw.choice(words): value(depth - 1) for _ in range(draw.randrange(4))} if depth else {}
        return draw.choice([None, True, -1, 0, 7, 1e300, float("nan"), float("-inf"), "", "hi", "\ud800\x00", 2**70])

    read = 0
    for _ in range(20_000):
        body = json.loads(json.dumps(GOOD))
        for _ in range(draw.randrange(1, 3)):
            place = draw.choice([body, body["choices"][0], body["choices"][0]["message"], body["usage"]])
            place[draw.choice([*place, draw.choice(words)])] = value(3)
            if not (isinstance(body["choices"], list) and body["choices"] and isinstance(body["choices"][0], dict)):
                break
            if not isinstance(body["choices"][0].get("message"), dict) or not isinstance(body["usage"], dict):
                break
        try:
            found = parse_response(body)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, ArithmeticError):
            continue
        read += 1
        assert isinstance(found.tokens, int) and found.tokens >= 0
        assert found.finish_reason not in ("", "None")
        (found.text + found.finish_reason).encode()
    assert read > 2000
