"""`kd-lightning prune`: what is written, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from kd_lightning.assets import resolve
from kd_lightning.cli import main
from kd_lightning.models.loading import load_causal_lm


def test_all_layers_are_the_model_with_its_tokenizer_and_template(tmp_path: Path) -> None:
    assert main(["prune", "--model", "asset:student", "--layers", "2", "--output", str(tmp_path / "two")]) == 0
    whole = load_causal_lm("asset:student", role="model")
    count = whole.config.num_hidden_layers
    assert main(["prune", "--model", "asset:student", "--layers", str(count), "--output", str(tmp_path / "all")]) == 0
    same = load_causal_lm(str(tmp_path / "all"), role="model")
    assert same.dtype == whole.dtype
    assert all(torch.equal(x, whole.state_dict()[key]) for key, x in same.state_dict().items())
    names = ("asset:student", str(tmp_path / "all"))
    before, after = (AutoTokenizer.from_pretrained(resolve(name)) for name in names)
    assert after.get_vocab() == before.get_vocab()
    assert after.chat_template == before.chat_template
    assert same.generation_config.eos_token_id == whole.generation_config.eos_token_id


def test_layers_by_influence_and_narrow_mlps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["prune", "--model", "asset:teacher", "--data", "asset:validation", "--rows", "9", "--layers", "2"]
    assert main([*words, "--mlp_width", "64", "--output", str(tmp_path / "small")]) == 0
    found = capsys.readouterr().err
    assert "layer 0: influence" in found
    assert "million parameters" in found
    small = load_causal_lm(str(tmp_path / "small"), role="model")
    assert small.config.num_hidden_layers == 2
    assert small.config.intermediate_size == 64


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--layers", "999"], r"layers must be in \[1, "),
        (["--layers", "0"], r"layers must be in \[1, "),
        (["--layers", "1,0"], "layers must be increasing"),
        (["--layers", "first"], "layers must be a number or a list"),
        (["--mlp_width", "64"], "mlp_width needs --data"),
        ([], "pass --layers, --mlp_width, or both"),
        (["--layers", "1", "--rows", "0"], "rows must be at least 1"),
    ],
)
def test_bad_arguments_are_one_line(
    words: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "cut"
    assert main(["prune", "--model", "asset:student", "--output", str(output), *words]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert re.search(text, lines[0])
    assert not output.exists()


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    assert main(["prune", "--model", "asset:student", "--layers", "1", "--output", str(tmp_path / "mine")]) == 1
    assert "exists: choose another name" in capsys.readouterr().err
    assert list((tmp_path / "mine").iterdir()) == []
