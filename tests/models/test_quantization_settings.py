"""`quantization_config`: refused in one line before anything is loaded; the two packages need not be installed."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from kd_lightning import DistillationModule, HFTeacher
from kd_lightning.models.quantized import settings
from kd_lightning.models.quantized.settings import check_quantization, check_saved_quantization, hf_settings

ALL_FOUR = ("load_in_4bit", "load_in_8bit", "quant_type", "exactly one of")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("nf4", ("teacher_kwargs.quantization_config must be a mapping", "{load_in_4bit: true}", "'nf4'")),
        ({}, ALL_FOUR),
        ({"load_in_4bit": False}, ALL_FOUR),
        ({"load_in_4bit": True, "load_in_8bit": True}, ALL_FOUR),
        ({"load_in_4bit": "yes"}, ("load_in_4bit must be true or false", "'yes'")),
        ({"load_in_4bit": True, "bnb_4bit_type": "nf4"}, ("unknown key 'bnb_4bit_type'", "bnb_4bit_quant_type")),
        ({"load_in_4bit": True, "llm_int8_threshold": 0.0}, ("unknown key 'llm_int8_threshold'",)),
        ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, ("unknown key 'llm_int8_has_fp16_weight'",)),
        ({"load_in_4bit": True, "quant_method": "torchao"}, ("must be 'bitsandbytes'", "'torchao'")),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, ("must be one of nf4, fp4", "'int4'")),
        ({"load_in_4bit": True, "llm_int8_skip_modules": "down_proj"}, ("list of names", "'down_proj'")),
        ({"quant_type": "int8_weight_only", "include_input_output_embeddings": True}, ("unknown key 'include_input",)),
    ],
)
def test_a_wrong_setting_is_refused_with_what_is_allowed(given: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        HFTeacher("asset:teacher", {"quantization_config": given})
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("given", "package"),
    [({"load_in_4bit": True}, "bitsandbytes"), ({"quant_type": "int8_weight_only"}, "torchao")],
    ids=["bitsandbytes", "torchao"],
)
def test_a_missing_package_is_named_with_how_to_install_it(
    given: dict[str, Any], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: None if name == package else name)
    words = (
        rf'student_kwargs.quantization_config needs the package {package}, .*pip install "kd_lightning\[quantized\]"'
    )
    with pytest.raises(ValueError, match=words):
        DistillationModule("asset:student", "asset:teacher", student_kwargs={"quantization_config": given})
    with pytest.raises(ValueError, match=rf"teacher 'NAME' is quantized and needs the package {package}"):
        check_saved_quantization({"quant_method": package}, None, "teacher", "NAME")


def test_a_model_that_is_quantized_by_another_method_is_left_to_transformers() -> None:
    check_saved_quantization({"quant_method": "gptq", "bits": 4}, None, "teacher", "NAME")
    check_saved_quantization(None, {"load_in_4bit": True}, "teacher", "NAME")
    with pytest.raises(ValueError, match=r"quantized already \(gptq\): remove quantization_config from teacher_kwargs"):
        check_saved_quantization({"quant_method": "gptq"}, {"load_in_4bit": True}, "teacher", "NAME")


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.filterwarnings("ignore")
def test_settings_become_those_of_transformers() -> None:
    given = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
    check_quantization(given, "teacher")
    found = hf_settings({**given, "llm_int8_skip_modules": ["down_proj"]}, ["lm_head"]).to_dict()
    assert found["bnb_4bit_quant_type"] == "nf4" and found["bnb_4bit_compute_dtype"] == "bfloat16"
    assert found["llm_int8_skip_modules"] == ["down_proj", "lm_head"]
    with pytest.raises(ValueError, match=r"quant_type must be one of int8_weight_only, .*got 'int4'"):
        check_quantization({"quant_type": "int4"}, "teacher")
