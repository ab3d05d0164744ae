"""Loading of models: all parameters are loaded, and every error is one line that names the problem."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from architectures import tiny
from kd_lightning.models import loading as models
from kd_lightning.models.loading import ModelNotFoundError, check_tokenizers, load_causal_lm

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model saved in bf16."""
    tiny("llama", tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def notices(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(models, "rank_zero_info", found.append)
    return found


def change(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def refused(*fragments: str, name: object, **arguments: Any) -> str:
    """The error, which is one line and contains every fragment."""
    with pytest.raises(ValueError) as error:
        load_causal_lm(str(name), **arguments)
    line = str(error.value)
    assert "\n" not in line
    assert len(line) < 400
    for fragment in fragments:
        assert fragment in line
    return line


# ------------------------------------------------------------------------------------------------------ what is read
def test_a_student_is_read_in_fp32_and_a_teacher_as_it_was_saved(folder: Path) -> None:
    saved = load_file(folder / "model.safetensors")
    student = load_causal_lm(str(folder), role="student")
    teacher = load_causal_lm(str(folder), role="teacher")
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    for model in (student, teacher):
        assert not model.training
        assert all(torch.equal(model.state_dict()[name].to(torch.bfloat16), saved[name]) for name in saved)


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("kwargs", [{"dtype": "float16"}, {"torch_dtype": "float16"}, {"dtype": torch.float16}])
def test_the_user_decides_the_dtype(folder: Path, role: models.Role, kwargs: dict[str, Any]) -> None:
    before = dict(kwargs)
    model = load_causal_lm(str(folder), role=role, kwargs=kwargs)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert kwargs == before


def test_arguments_reach_the_model(folder: Path) -> None:
    for init in ("pretrained", "random"):
        model = load_causal_lm(str(folder), init=init, kwargs={"attn_implementation": "eager"})
        assert model.config._attn_implementation == "eager"


def test_bundled_models_have_names() -> None:
    assert load_causal_lm("asset:student").config.vocab_size == 2048


def test_a_random_start_follows_the_generator_and_needs_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "max_new_tokens": 5}))
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(load_causal_lm(str(folder), init="random"))
    one, same, other = (model.lm_head.weight for model in drawn)
    assert one.dtype == torch.float32
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert drawn[0].generation_config.eos_token_id == [2, 7]


def test_loading_prints_nothing_and_restores_the_log_settings(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    change(folder, lambda weights: weights.update({"model.layers.7.mlp.up_proj.weight": torch.ones(2, 2)}))
    load_causal_lm(str(folder), role="teacher", kwargs={"torch_dtype": "float32"})
    load_causal_lm(str(folder), init="random")
    out, err = capfd.readouterr()
    assert out == ""
    assert all("saved weights are not used" in line for line in err.splitlines())
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_unused_weights_are_reported(folder: Path, notices: list[str]) -> None:
    change(folder, lambda weights: weights.update({"model.layers.7.mlp.up_proj.weight": torch.ones(2, 2)}))
    load_causal_lm(str(folder))
    assert len(notices) == 1
    assert "model.layers.7.mlp.up_proj.weight" in notices[0]


# ---------------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_name_that_does_not_exist(tmp_path: Path, role: models.Role) -> None:
    for name in (
        str(tmp_path / "nothing"),
        "./nothing",
        "../no/thing/here",
        "~/no such",
        "no-such-model",
        "org/none",
        "",
    ):
        line = refused(role, name, name=name, role=role)
        assert "no such folder" in line
        with pytest.raises(ModelNotFoundError):
            load_causal_lm(name, role=role)


def test_a_file_and_a_folder_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused("student", "is a file", name=tmp_path / "file")
    refused("student", "no config.json", str(tmp_path), name=tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    refused("PEFT adapter", name=tmp_path)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused("student", str(folder), "student_init random", name=folder)
    line = refused("teacher", str(folder), "no weights", name=folder, role="teacher")
    assert "student_init" not in line


def test_pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"code")
    refused("pytorch_model.bin", "only safetensors", name=folder)


@pytest.mark.parametrize("content", [b"", b"\x00" * 4, b"no safetensors at all", None])
def test_broken_weights(folder: Path, content: bytes | None) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    refused("student", str(folder), "cannot read the weights", name=folder)


def test_a_shard_that_is_missing(folder: Path) -> None:
    tiny("llama").save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    refused("student", str(folder), name=folder)


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize(("value", "said"), [(float("nan"), "NaN"), (float("inf"), "inf"), (-float("inf"), "inf")])
def test_weights_that_are_not_finite(folder: Path, role: models.Role, value: float, said: str) -> None:
    change(folder, lambda weights: weights[NAME][0, 0].fill_(value))
    refused(role, NAME, said, name=folder, role=role)


def test_weights_that_would_be_random(folder: Path) -> None:
    change(folder, lambda weights: weights.pop(NAME))
    refused(NAME, "missing in its files", "random", name=folder)
    change(folder, lambda weights: weights.update({NAME: torch.ones(3, 32)}))
    refused(NAME, "another shape", name=folder)


def test_a_configuration_that_does_not_fit(folder: Path) -> None:
    change_config(folder, num_hidden_layers=3)
    refused("model.layers.2.", "more", name=folder)


@pytest.mark.parametrize(
    ("values", "fragments"),
    [
        ({"model_type": "lama"}, ["config.json", "lama"]),
        ({"model_type": None}, ["config.json"]),
        ({"model_type": "t5"}, ["t5", "not a causal language model"]),
        ({"hidden_size": "wide"}, ["config.json", "hidden_size", "int"]),
        ({"hidden_act": "nope"}, ["cannot be built", "nope"]),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}, ["config.json"]),
    ],
)
@pytest.mark.parametrize("init", ["pretrained", "random"])
def test_a_bad_configuration(folder: Path, values: dict[str, Any], fragments: list[str], init: str) -> None:
    change_config(folder, **values)
    refused("student", str(folder), *fragments, name=folder, init=init)


def test_a_broken_configuration(folder: Path) -> None:
    (folder / "config.json").write_text("{broken")
    refused("student", str(folder), "config.json", name=folder)


@pytest.mark.parametrize("init", ["pretrained", "random"])
@pytest.mark.parametrize(
    ("kwargs", "fragments"),
    [
        ({"trust_remote_code": True}, ["student_kwargs", "trust_remote_code"]),
        ({"trust_remote_code": False}, ["trust_remote_code"]),
        ({"use_safetensors": False}, ["use_safetensors"]),
        ({"device_map": "auto"}, ["device_map"]),
        ({"dtype": "bf16"}, ["dtype", "bf16", "bfloat16"]),
        ({"dtype": "int8"}, ["dtype", "int8"]),
        ({"dtype": 16}, ["dtype", "16"]),
        ({"atn_implementation": "eager"}, ["student_kwargs", "atn_implementation"]),
        ({"attn_implementation": "fast"}, ["student_kwargs", "fast"]),
    ],
)
def test_bad_arguments(folder: Path, kwargs: dict[str, Any], fragments: list[str], init: str) -> None:
    refused(*fragments, name=folder, kwargs=kwargs, init=init)


def test_a_bad_init() -> None:
    refused("student_init", "zeros", "random", name="asset:student", init="zeros")


@pytest.mark.parametrize("init", ["pretrained", "random"])
def test_an_encoder_is_not_a_causal_language_model(tmp_path: Path, init: str) -> None:
    tiny("bert", is_decoder=False).save_pretrained(tmp_path)
    refused("student", "BertLMHeadModel", "later tokens", "is_decoder", name=tmp_path, init=init)
    assert load_causal_lm(str(tmp_path), kwargs={"is_decoder": True}, init=init).config.is_decoder


# --------------------------------------------------------------------------------------------------------- tokenizers
def tokenizer(*tokens: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({t: i for i, t in enumerate(tokens)}, tokens[0]))
    )


def teacher_with(folder: Path, *tokens: str) -> str:
    tokenizer(*tokens).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("tokens", ["abcd", "abcdef", "abc"])
def test_one_vocabulary_may_be_longer(folder: Path, tokens: str, notices: list[str]) -> None:
    check_tokenizers(teacher_with(folder, *"abcd"), tokenizer(*tokens))
    assert notices == []


def test_the_first_differing_token_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"token 2 is 'c' for teacher '.*' and 'x' for the student") as error:
        check_tokenizers(teacher_with(folder, *"abcdef"), tokenizer(*"abxyef"))
    assert "\n" not in str(error.value)


def test_a_large_vocabulary_is_compared_to_its_end(folder: Path) -> None:
    tokens = [f"t{i}" for i in range(20_000)]
    name = teacher_with(folder, *tokens)
    check_tokenizers(name, tokenizer(*tokens))
    tokens[-1] = "other"
    with pytest.raises(ValueError, match="token 19999"):
        check_tokenizers(name, tokenizer(*tokens))


def test_a_teacher_without_tokenizer_is_not_checked(folder: Path, notices: list[str]) -> None:
    check_tokenizers(str(folder), tokenizer(*"ab"))
    assert len(notices) == 1
    assert str(folder) in notices[0]


def test_a_broken_tokenizer_is_refused(folder: Path) -> None:
    name = teacher_with(folder, *"ab")
    (folder / "tokenizer.json").write_text("{broken")
    with pytest.raises(ValueError, match="cannot read its tokenizer") as error:
        check_tokenizers(name, tokenizer(*"ab"))
    assert "\n" not in str(error.value)


def test_a_missing_teacher_raises_when_it_is_loaded(tmp_path: Path, notices: list[str]) -> None:
    for name in (str(tmp_path / "nothing"), "HFTeachr", "org/none"):
        check_tokenizers(name, tokenizer(*"ab"))
    assert notices == []


def test_bundled_teacher_and_student_read_the_same(folder: Path, notices: list[str]) -> None:
    from transformers import AutoTokenizer

    from kd_lightning.assets import resolve

    shutil.rmtree(folder)
    check_tokenizers("asset:teacher", AutoTokenizer.from_pretrained(resolve("asset:student")))
    assert notices == []
