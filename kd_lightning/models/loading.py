"""Loads causal language models from folders or hub names, with checks and one-line errors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from huggingface_hub.errors import StrictDataclassError
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError
from transformers.utils import logging

from kd_lightning.assets import resolve
from kd_lightning.models.model_checks import Role, check_causal, check_finite, text_model_class
from kd_lightning.models.pretrained import checked_kwargs, from_pretrained
from kd_lightning.models.quantized.layers import check_head, check_widths, prepare_layers
from kd_lightning.models.quantized.settings import (
    check_saved_quantization,
    hf_settings,
    quantization_of,
)
from kd_lightning.models.quantized.sizes import kept_modules, use_quantized_shapes
from kd_lightning.models.weight_files import check_weight_files

auto: Any = hf  # the factories of transformers are not typed
hf_log: Any = logging
FILE_OPTIONS = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "force_download")
BUILD_ERRORS = (TypeError, ValueError, KeyError, AttributeError, ImportError, StrictDataclassError)
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")


class ModelNotFoundError(ValueError):
    """A name is neither an existing folder nor a model of the hub."""


def load_causal_lm(
    name: str,
    *,
    init: str = "pretrained",
    kwargs: Mapping[str, Any] | None = None,
    role: Role = "student",
) -> hf.PreTrainedModel:
    """Load a causal language model to the CPU, in eval mode. All of its parameters are loaded and finite.

    bitsandbytes loads quantized models to the current GPU if there is one.

    Args:
        name: a folder, a hub name, or `asset:teacher`, `asset:student`.
        init: `pretrained`, or `random` to start from the configuration with torch's random generator.
        kwargs: arguments of `from_pretrained` (`dtype`, `attn_implementation`, `revision`, `quantization_config` as a
            mapping …). The default dtype is fp32 for a student and the dtype of the files for a teacher.
        role: `student`, `teacher` or `model`: named in errors, determines the default dtype.

    Raises:
        ModelNotFoundError: no such folder, or no such model on the hub.
        ValueError: a missing or invalid configuration; not a causal language model; missing, pickled or corrupt
            weights; weights that leave a parameter unset or are not finite; an argument that is not allowed; a package
            of a quantization is missing, or the LM head is quantized.
    """
    if init not in ("pretrained", "random"):
        raise ValueError(f"{role}_init must be 'pretrained' or 'random', got {init!r}")
    options = checked_kwargs(kwargs, role)
    if init == "random" and "quantization_config" in options:
        raise ValueError(f"{role}_kwargs must not contain 'quantization_config' with random weights: remove it")
    options.setdefault("dtype", torch.float32 if role == "student" or init == "random" else "auto")
    path = resolve_model(name, role)
    _check_config(path, role, options)
    if init == "pretrained":
        check_weight_files(Path(path), role, str(options.get("subfolder") or ""))
    try:
        with _quiet():
            model = _pretrained(path, role, options) if init == "pretrained" else _random(path, options)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{role} '{path}': cannot read the weights: {error_line(error)}") from None
    except BUILD_ERRORS as error:
        given = f" with {role}_kwargs {dict(kwargs)}" if kwargs else ""
        raise ValueError(f"{role} '{path}'{given} cannot be built: {error_line(error)}") from None
    model.train(False)
    prepare_layers(model)
    check_head(model, role)
    check_widths(model, role)
    check_finite(model, role)
    check_causal(model, role)
    prepare_layers(model)  # after a pass
    return model


def causal_lm_from_config(
    name: str, *, kwargs: Mapping[str, Any] | None = None, role: Role = "student"
) -> hf.PreTrainedModel:
    """Build a causal language model from its configuration, in eval mode; weights are neither read nor checked.

    Args:
        name: as for `load_causal_lm`; the folder needs no weights.
        kwargs: as for `load_causal_lm`; the default dtype of a teacher is that of its configuration.
        role: as for `load_causal_lm`.

    Raises:
        ModelNotFoundError: no such folder, or no such model on the hub.
        ValueError: a missing or invalid configuration; not a causal language model; an argument that is not allowed.
    """
    options = checked_kwargs(kwargs, role)
    options.setdefault("dtype", torch.float32 if role == "student" else "auto")
    path = resolve_model(name, role)
    config, given = _check_config(path, role, options), options.pop("quantization_config", None)
    try:
        with _quiet():
            model = _random(path, options)
            if quantization := quantization_of(config if given is None else given):
                use_quantized_shapes(model, quantization)
    except BUILD_ERRORS as error:
        raise ValueError(f"{role} '{path}' cannot be built: {error_line(error)}") from None
    model.train(False)
    return model


def resolve_model(name: str, role: Role) -> str:
    """The folder of a model, or its hub name unchanged.

    Raises:
        ModelNotFoundError: the name is a path that does not exist, or neither a path nor a hub name.
        ValueError: it is a file, or a folder without a configuration.
    """
    path = resolve(name)
    folder = Path(path)
    if path and folder.is_dir():
        if (folder / "config.json").is_file():
            return str(folder)
        adapter = (folder / "adapter_config.json").is_file()
        reason = "it has a PEFT adapter, merge it into its base model first" if adapter else "it has no config.json"
        raise ValueError(f"{role} '{name}' is not the folder of a Hugging Face model: {reason}")
    if path and folder.exists():
        raise ValueError(f"{role} '{name}' is a file: pass the folder of a Hugging Face model")
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path):
        raise ModelNotFoundError(f"{role} '{name}': no such folder")
    return path


def check_tokenizers(teacher: str, tokenizer: hf.PreTrainedTokenizerBase) -> None:
    """Check that every token id has the same meaning for teacher and student.

    Padding at the end of a vocabulary may differ. The tokenizer of a teacher without tokenizer files is not checked,
    with a notice. A teacher that does not exist raises in `load_causal_lm`.

    Args:
        teacher: folder, hub name or `asset:` name of the teacher.
        tokenizer: the student's.

    Raises:
        ValueError: an id has different tokens (the message names the first), or the teacher's tokenizer is corrupt.
    """
    try:
        _check_config(resolve_model(teacher, "teacher"), "teacher", {})
    except ModelNotFoundError:
        return
    teachers = teacher_tokenizer_of(teacher)
    if teachers is None:
        rank_zero_info(f"teacher '{teacher}' has no tokenizer: whether it has the student's tokens is not checked")
        return
    theirs, ours = teachers.get_vocab(), tokenizer.get_vocab()
    if theirs == ours:
        return
    by_id = {i: token for token, i in theirs.items()}
    for token, i in sorted(ours.items(), key=lambda item: item[1]):
        if by_id.get(i, token) != token:
            raise ValueError(
                f"teacher and student must read the same tokens: token {i} is {by_id[i]!r} for teacher '{teacher}' "
                f"and {token!r} for the student"
            )


def teacher_tokenizer_of(teacher: str) -> hf.PreTrainedTokenizerBase | None:
    """The tokenizer of a teacher; None if it has no tokenizer files, or does not exist.

    Args:
        teacher: folder, hub name or `asset:` name of the teacher.

    Raises:
        ValueError: the tokenizer is corrupt.
    """
    try:
        path = resolve_model(teacher, "teacher")
    except ModelNotFoundError:
        return None
    folder = Path(path)
    if not has_tokenizer_files(path):
        return None
    try:
        with _quiet():
            found: hf.PreTrainedTokenizerBase = from_pretrained("tokenizer", path)
    except (OSError, *BUILD_ERRORS) as error:
        if folder.is_dir():
            raise ValueError(f"teacher '{teacher}': cannot read its tokenizer: {error_line(error)}") from None
        return None
    return found


def has_tokenizer_files(model: str) -> bool:
    """Whether the folder of a model has files of a tokenizer; True for everything that is no folder.

    Args:
        model: folder, hub name or `asset:` name.
    """
    folder = Path(resolve(model))
    return not folder.is_dir() or any(path for files in TOKENIZER_FILES for path in folder.glob(files))


def _check_config(path: str, role: Role, options: dict[str, Any]) -> hf.PreTrainedConfig:
    """The configuration of a causal language model; checks that it is one."""
    where = {name: options[name] for name in FILE_OPTIONS if name in options}
    try:
        with _quiet():
            config = from_pretrained("config", path, **where)
    except (OSError, *BUILD_ERRORS) as error:
        if Path(path).is_dir():
            raise ValueError(f"{role} '{path}': cannot read config.json: {error_line(error)}") from None
        reason = "no such folder, and not available on the Hugging Face hub (misspelled, private, or no network)"
        raise ModelNotFoundError(f"{role} '{path}': {reason}") from None
    saved = getattr(config, "quantization_config", None)  # only of a quantized model
    check_saved_quantization(saved, options.get("quantization_config"), role, path)
    if type(config) not in auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        text = text_model_class(config, auto.MODEL_FOR_CAUSAL_LM_MAPPING)
        inside = "" if text is None else f": save its text model alone ({text}) and pass that, or pass the loaded model"
        raise ValueError(
            f"{role} '{path}' has model type {config.model_type!r}, which is not a causal language model{inside}"
        )
    return config  # type: ignore[no-any-return]


def _pretrained(path: str, role: Role, options: dict[str, Any]) -> hf.PreTrainedModel:
    """The model with its saved weights; every parameter is loaded."""
    if "quantization_config" in options:
        with torch.device("meta"):
            shell = _random(path, {name: value for name, value in options.items() if name != "quantization_config"})
        options = {**options, "quantization_config": hf_settings(options["quantization_config"], kept_modules(shell))}
    loaded: tuple[hf.PreTrainedModel, dict[str, Any]] = from_pretrained(
        "model",
        path,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below
        **options,
    )
    model, report = loaded
    missing, reshaped = sorted(report["missing_keys"]), sorted(key[0] for key in report["mismatched_keys"])
    if missing or reshaped:
        why = "are missing in its files" if missing else "have another shape in its files"
        count = len(missing) + len(reshaped)
        more = f" and {count - 1} more" if count > 1 else ""
        raise ValueError(f"weights of '{(missing + reshaped)[0]}'{more} {why} and would be random")
    if report["unexpected_keys"]:
        first = min(report["unexpected_keys"])
        rank_zero_info(f"{role} '{path}': {len(report['unexpected_keys'])} saved weights are not used ('{first}' …)")
    return model


def _random(path: str, options: dict[str, Any]) -> hf.PreTrainedModel:
    """The model with random weights, and with the generation config of its folder."""
    options = dict(options)
    dtype = options.pop("dtype")
    config, rest = from_pretrained("config", path, return_unused_kwargs=True, **options)
    rest = {name: value for name, value in rest.items() if name not in FILE_OPTIONS}
    vars(config).pop("quantization_config", None)  # random weights are plain
    dtype = (config.dtype or torch.float32) if dtype == "auto" else dtype
    model: hf.PreTrainedModel = auto.AutoModelForCausalLM.from_config(
        config, trust_remote_code=False, dtype=dtype, **rest
    )
    if (Path(path) / "generation_config.json").is_file():
        model.generation_config = from_pretrained("generation_config", path)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence progress bars and warnings of transformers: this module checks and reports what matters."""
    verbosity, bars = hf_log.get_verbosity(), hf_log.is_progress_bar_enabled()
    hf_log.set_verbosity_error()
    hf_log.disable_progress_bar()
    try:
        yield
    finally:
        hf_log.set_verbosity(verbosity)
        if bars:
            hf_log.enable_progress_bar()


def error_line(error: BaseException) -> str:
    """The first line of an error of a library; also the second, if the first ends with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    text = f"{type(error).__name__} {text}" if isinstance(error, KeyError) or not text else text
    return text if len(text) <= 240 else text[:239] + "…"
