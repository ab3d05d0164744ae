"""What is a secret and what is not."""

from __future__ import annotations

import logging
import random
import time
import warnings
from typing import Any

import pytest

from kd_lightning.reporting import redaction
from kd_lightning.reporting.redaction import MASK, is_secret, masked_names, redact_config, redact_text, secret_names

SECRET = "Zq7-not.a_real+Key9"


@pytest.mark.parametrize(
    "name",
    "token api_key apiKey API_KEY hf_token hub-token use_auth_token password db_password PGPASSWORD passwd passphrase "
    "secret client_secret aws_secret_access_key aws_session_token Authorization x-api-key cookie private_key "
    "neptune_api_token my_service_token credentials".split(),
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name, SECRET)
    for text in (f"{name}={SECRET}", f"{{'{name}': '{SECRET}'}}", f'{{"{name}": "{SECRET}"}}', f"--{name} {SECRET}"):
        assert SECRET not in redact_text(text) and MASK in redact_text(text)


@pytest.mark.parametrize(
    "name",
    "pad_token eos_token bos_token_id max_tokens min_new_tokens batch_tokens tokenizer teacher_tokenizer "
    "split_special_tokens additional_special_tokens image_token token_weight token_mean key keys monkey author "
    "passing compass keyboard secretary".split(),
)
def test_ordinary_names(name: str) -> None:
    config = {"model": {name: "asset:student-7b", "other": [{name: "<pad>"}]}}
    assert redact_config(config) == config and not list(secret_names(config))
    for text in (f"{name}='asset:student-7b'", f"--{name} 4096", f"{{'{name}': 'abcd1234'}}", f"{name}: abcd1234"):
        assert redact_text(text) == text


@pytest.mark.parametrize(
    "text",
    [
        f"https://me:{SECRET}@host.example/v1",
        f"http://{SECRET}@host:8000",
        f"http://host/v1?a=1&key={SECRET}&b=2",
        f"http://host/v1?api_key={SECRET}",
        f"http://host/v1?access_token={SECRET}#x",
        f"Authorization: Bearer {SECRET}",
        f"bad header 'bearer {SECRET}'",
        f"Got value: Namespace(url='x', api_key='{SECRET}')",
        f'{{\\"token\\": \\"{SECRET}\\"}}',
        f"cfg=token={SECRET}",
    ],
)
def test_secrets_in_messages(text: str) -> None:
    found = redact_text(f"before {text} after")
    assert SECRET not in found and MASK in found
    assert found.startswith("before ") and found.endswith(" after")


@pytest.mark.parametrize(
    "text",
    [
        "http://localhost:8000/v1 does not answer",
        "the token: the first one",
        "token 5 is '<a>' for the teacher and '<b>' for the student",
        "pass --data.batch_tokens 4096, or --data.tokenizer asset:student",
        "{'token': None, 'use_token': True}",
        "models/hf_adapter.py, line 3",
        "mail me@host.example",
    ],
)
def test_ordinary_messages(text: str) -> None:
    assert redact_text(text) == text


def test_a_configuration_keeps_its_form() -> None:
    config: dict[str, Any] = {
        "trainer": {"logger": [{"class_path": "L", "init_args": {"api_key": SECRET, "offline": None}}]},
        "model": {"teacher_kwargs": {"headers": {"Authorization": SECRET}, "use_auth_token": True}, "lr": 1e-4},
        "data": {"train": f"https://u:{SECRET}@h/x.jsonl", "template": "{% set token = 'abc' %}", "password": 12345},
    }
    found = redact_config(config)
    assert SECRET not in repr(found) and "12345" not in repr(found)
    assert found["trainer"]["logger"][0] == {"class_path": "L", "init_args": {"api_key": MASK, "offline": None}}
    assert found["model"] == {
        "teacher_kwargs": {"headers": {"Authorization": MASK}, "use_auth_token": True},
        "lr": 1e-4,
    }
    assert found["data"]["template"] == config["data"]["template"]
    assert list(masked_names(config)) == []
    assert list(masked_names(found)) == [
        "trainer.logger.0.init_args.api_key",
        "model.teacher_kwargs.headers.Authorization",
        "data.train",
        "data.password",
    ]
    assert list(secret_names(config)) == [
        "trainer.logger.0.init_args.api_key",
        "model.teacher_kwargs.headers.Authorization",
        "data.password",
    ]


def test_secrets_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SERVICE_API_KEY", "plain words inside")
    monkeypatch.setenv("SHORT_TOKEN", "model")
    assert redact_text("echo: plain words inside!") == f"echo: {MASK}!"
    assert redact_text("the model") == "the model"


def test_logs_warnings_and_tracebacks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(redaction.sys, "excepthook", redaction.sys.excepthook)
    before = logging.getLogRecordFactory()
    try:
        redaction.redact_messages()
        redaction.redact_messages()
        record = logging.getLogRecordFactory()("a", 20, "f", 1, "token=%s \x1b[2J", (SECRET,), None)
        texts = [record.getMessage(), warnings.formatwarning(f"key api_key={SECRET}\x1b", UserWarning, "f", 1)]
        try:
            raise RuntimeError(f"password='{SECRET}' \x07")
        except RuntimeError as error:
            redaction.sys.excepthook(RuntimeError, error, error.__traceback__)
    finally:
        logging.setLogRecordFactory(before)
    texts.append(capsys.readouterr().err)
    for text in texts:
        assert SECRET not in text and MASK in text and not set("\x1b\x07") & set(text)
    assert "Traceback" in texts[-1]


def test_bounded_time() -> None:
    draw = random.Random(3)
    parts = [
        "a.",
        "token",
        "=",
        "'",
        '"',
        "\\",
        "://",
        "@",
        ":",
        "bearer ",
        "--",
        " ",
        "sk-",
        "eyJ",
        "?",
        "&",
        "hf_",
        "key",
    ]
    texts = [part * (20_000 // len(part)) for part in parts]
    texts += ["".join(draw.choices(draw.sample(parts, 3), k=20_000)) for _ in range(10)]
    start = time.process_time()
    for text in texts:
        redact_text(text)
    assert time.process_time() - start < 8
