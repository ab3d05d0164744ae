"""Code beside a model, tokenizer or configuration never runs, and nobody is asked whether it may."""

from __future__ import annotations

import ast
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from architectures import tiny
from kd_lightning.assets import resolve
from kd_lightning.data.tokenization import load_tokenizer
from kd_lightning.models.loading import causal_lm_from_config, check_tokenizers, load_causal_lm
from kd_lightning.models.pretrained import Kind, RemoteCodeError, from_pretrained
from locations import ROOT
from refusals import refused

CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
Path({mark!r}).touch()
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model, PreTrainedTokenizerFast as Tokenizer
def generate(model, *args, **kwargs): ...
"""
TOKENIZERS: list[Any] = [{"AutoTokenizer": [None, "code.Tokenizer"]}, {"AutoTokenizer": ["code.Tokenizer", None]}]
TOKENIZERS += [["code.Tokenizer", None], {"AutoTokenizer": [None, "somebody/elsewhere--code.Tokenizer"]}]


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the code would write; whoever asks is answered with yes."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "ran"


@pytest.fixture
def folder(tmp_path: Path, ran: Path) -> Path:
    """A model and its tokenizer, with code beside them."""
    tiny("llama").save_pretrained(tmp_path / "model")
    load_tokenizer("asset:student").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "code.py").write_text(CODE.format(mark=str(ran)))
    return tmp_path / "model"


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("auto_map", TOKENIZERS, ids=str)
@pytest.mark.parametrize(
    "load",
    [load_tokenizer, lambda path: check_tokenizers(path, load_tokenizer("asset:student"))],
    ids=["the student's", "the teacher's"],
)
def test_a_tokenizer_with_code(load: Callable[[str], object], auto_map: Any, folder: Path, ran: Path) -> None:
    change(folder / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Tokenizer")
    with pytest.raises(ValueError, match=r"tokenizer.* needs code from its own repository .*never run") as error:
        load(str(folder))
    assert "\n" not in str(error.value)
    assert not ran.exists()


def test_a_known_class_is_used_where_there_is_code_for_it(folder: Path, ran: Path) -> None:
    change(folder / "config.json", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    load_causal_lm(str(folder))
    causal_lm_from_config(str(folder))
    assert not ran.exists()


@pytest.mark.parametrize("load", [load_causal_lm, causal_lm_from_config])
def test_a_model_with_code(load: Callable[[str], object], folder: Path, ran: Path) -> None:
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    change(folder / "config.json", auto_map=auto_map, model_type="of its own")
    with pytest.raises(ValueError, match="needs code from its own repository"):
        load(str(folder))
    assert not ran.exists()


def test_generation_with_code(folder: Path, ran: Path) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "code.py").rename(folder / "custom_generate" / "generate.py")
    model = load_causal_lm(str(folder))
    assert "generate" not in vars(model)
    assert not hasattr(from_pretrained("generation_config", str(folder)), "trust_remote_code")
    assert not ran.exists()


@pytest.mark.parametrize("kind", ["config", "tokenizer", "model", "generation_config"])
@pytest.mark.parametrize("value", [True, None, "yes"])
def test_nothing_asks_for_it(kind: Kind, value: object) -> None:
    with pytest.raises(RemoteCodeError, match="trust_remote_code"):
        from_pretrained(kind, resolve("asset:student"), trust_remote_code=value)


def test_generate_refuses_in_one_line(
    folder: Path, ran: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change(folder / "tokenizer_config.json", auto_map=TOKENIZERS[0], tokenizer_class="Tokenizer")
    words = ["generate", "--model", str(folder), "--data", "asset:test", "--output", str(tmp_path / "out.jsonl")]
    refused([*words, "--device", "cpu"], ["tokenizer", "needs code from its own repository"], capfd)
    assert not ran.exists()


def test_one_function_calls_from_pretrained() -> None:
    calls = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "kd_lightning").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("from_pretrained", "get_class_from_dynamic_module")
    ]
    assert calls == ["kd_lightning/models/pretrained.py"]
