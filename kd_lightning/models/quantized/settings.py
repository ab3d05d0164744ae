"""`quantization_config` of `teacher_kwargs` and `student_kwargs`: checked, and converted by transformers' classes."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, Literal

Method = Literal["bitsandbytes", "torchao"]
NAME = "quantization_config"
INSTALL = 'pip install "kd_lightning[quantized]"'
COMMON_4_BIT = ("bnb_4bit_quant_type", "bnb_4bit_compute_dtype", "bnb_4bit_use_double_quant", "llm_int8_skip_modules")
KEYS: dict[str, tuple[str, ...]] = {
    "load_in_4bit": ("quant_method", "load_in_4bit", *COMMON_4_BIT),
    "load_in_8bit": ("quant_method", "load_in_8bit", "llm_int8_threshold", "llm_int8_skip_modules"),
    "quant_type": ("quant_method", "quant_type", "modules_to_not_convert"),
}
TORCHAO_TYPES = {
    "int8_weight_only": "Int8WeightOnlyConfig",
    "int8_dynamic_activation_int8_weight": "Int8DynamicActivationInt8WeightConfig",
}
TYPES_4_BIT = ("nf4", "fp4")


def check_quantization(given: object, role: str) -> None:
    """Check a `quantization_config`, and that its package is installed. Nothing is loaded.

    Args:
        given: what the user has set.
        role: `student` or `teacher`, for the message.

    Raises:
        ValueError: it is no mapping, has unknown keys or values, or a package is missing.
    """
    where = f"{role}_kwargs.{NAME}"
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} must be a mapping, such as {{load_in_4bit: true}}, got {given!r}")
    kind, method = _kind(given, where)
    if unknown := sorted(str(key) for key in given.keys() - set(KEYS[kind])):
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; with {kind} the keys are {', '.join(KEYS[kind])}")
    if given.get("quant_method", method) != method:
        raise ValueError(f"{where}: quant_method must be {method!r} with {kind}, got {given['quant_method']!r}")
    kinds = {"bnb_4bit_quant_type": TYPES_4_BIT, "bnb_4bit_use_double_quant": (True, False)}
    for key, allowed in kinds.items():
        if key in given and given[key] not in allowed:
            raise ValueError(f"{where}.{key} must be one of {', '.join(map(str, allowed))}, got {given[key]!r}")
    skip = KEYS[kind][-1]
    names = given.get(skip)
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{where}.{skip} must be a list of names of modules, such as [down_proj], got {names!r}")
    check_installed(method, f"{where} needs the package {{}}")
    try:
        hf_settings(given)
    except (TypeError, ValueError, AttributeError, KeyError, AssertionError) as error:
        raise ValueError(f"{where} {dict(given)} is not valid: {' '.join(str(error).split())}") from None


def check_saved_quantization(saved: object, given: object, role: str, path: str) -> None:
    """Check the quantization that a model was saved with: its package is installed, and no other one is asked for.

    Args:
        saved: `quantization_config` of its config.json; None: it is not quantized.
        given: `quantization_config` of the user; None: none.
        role: `student` or `teacher`, for the message.
        path: of the model.

    Raises:
        ValueError: it is quantized and another quantization is asked for, or a package is missing.
    """
    if not isinstance(saved, Mapping):
        return
    method = saved_method(saved)
    if given is not None:
        raise ValueError(
            f"{role} '{path}' is quantized already ({method}): remove {NAME} from {role}_kwargs, or pass the model "
            "that it was made of"
        )
    if method in ("bitsandbytes", "torchao"):
        check_installed(method, f"{role} '{path}' is quantized and needs the package {{}}")


def saved_method(saved: Mapping[str, Any]) -> str:
    """The method of a quantized model's config.json; old files of bitsandbytes do not name it."""
    found = saved.get("quant_method") or "bitsandbytes"
    return str(found.value if isinstance(found, Enum) else found)


def check_installed(method: str, text: str) -> None:
    """Check that a package is installed; bitsandbytes' messages of every layer are silenced, docs/scale.md has them.

    Args:
        method: bitsandbytes or torchao.
        text: begin of the message, with a place for the name of the package.

    Raises:
        ValueError: it is not.
    """
    needed = [method, "accelerate"] if method == "bitsandbytes" else [method]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{text.format(' and '.join(missing))}, which is not installed: {INSTALL}")
    if method == "bitsandbytes":
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def hf_settings(given: Mapping[str, Any], kept: Sequence[str] = ()) -> Any:
    """The object of transformers: a `BitsAndBytesConfig` or a `TorchAoConfig`.

    Args:
        given: settings that `check_quantization` accepts.
        kept: modules to leave out in addition to those given, such as the LM head: transformers drops its own list of
            them if one is given.
    """
    from transformers.quantizers.auto import AutoQuantizationConfig

    _, method = _kind(given, NAME)
    settings = {**given, "quant_method": method}
    skip = "modules_to_not_convert" if method == "torchao" else "llm_int8_skip_modules"
    if settings.get(skip) is not None:
        settings[skip] = [*settings[skip], *kept]
    if method == "torchao":
        settings["quant_type"] = {"default": _torchao_type(given["quant_type"])}
    elif "llm_int8_threshold" in settings:
        settings["llm_int8_threshold"] = float(settings["llm_int8_threshold"])
    return AutoQuantizationConfig.from_dict(settings)


def quantization_of(given: Any) -> Any | None:
    """The object of transformers from a mapping, or from the configuration of a quantized model; None if it is plain.

    Args:
        given: a mapping that `check_quantization` accepts, or the configuration of a model.
    """
    if isinstance(given, Mapping):
        return hf_settings(given)
    saved = getattr(given, "quantization_config", None)  # only of a quantized model
    if not isinstance(saved, Mapping) or saved_method(saved) not in ("bitsandbytes", "torchao"):
        return None
    from transformers.quantizers.auto import AutoQuantizationConfig

    return AutoQuantizationConfig.from_dict(dict(saved))


def _kind(given: Mapping[str, Any], where: str) -> tuple[str, Method]:
    """The key that chooses the quantization, and the method that it belongs to."""
    found = [key for key in KEYS if given.get(key) not in (None, False)]
    if len(found) != 1:
        choices = "load_in_4bit: true or load_in_8bit: true (bitsandbytes), or quant_type: int8_weight_only (torchao)"
        raise ValueError(f"{where} must have exactly one of {choices}, got {dict(given)}")
    if found[0] != "quant_type" and given[found[0]] is not True:
        raise ValueError(f"{where}.{found[0]} must be true or false, got {given[found[0]]!r}")
    return found[0], "torchao" if found[0] == "quant_type" else "bitsandbytes"


def _torchao_type(given: object) -> dict[str, Any]:
    """The form in which torchao saves the settings of a type, from its name or from that form (config.json has it)."""
    found = given.get("default", given) if isinstance(given, Mapping) else {"_type": TORCHAO_TYPES.get(str(given))}
    if not isinstance(found, Mapping) or found.get("_type") not in TORCHAO_TYPES.values():
        raise ValueError(f"quant_type must be one of {', '.join(TORCHAO_TYPES)}, got {given!r}")
    if "_data" in found:
        return dict(found)
    from torchao import quantization
    from torchao.core.config import config_to_dict

    return dict(config_to_dict(getattr(quantization, str(found["_type"]))()))
