"""The only calls of `from_pretrained`, and its arguments: code from a model repository never runs, no prompt asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import transformers as hf

from kd_lightning.models.model_checks import Role
from kd_lightning.models.quantized.settings import check_quantization
from kd_lightning.reporting.redaction import secret_names

auto: Any = hf  # the factories of transformers are not typed
Kind = Literal["config", "tokenizer", "model", "generation_config"]
FACTORIES: dict[Kind, Any] = {
    "config": auto.AutoConfig,
    "tokenizer": auto.AutoTokenizer,
    "model": auto.AutoModelForCausalLM,
    "generation_config": auto.GenerationConfig,
}
RESERVED = (
    "trust_remote_code",
    "use_safetensors",
    "weights_only",
    "output_loading_info",
    "ignore_mismatched_sizes",
    "device_map",
)
CHECKPOINTING = ("gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing")


class RemoteCodeError(ValueError):
    """A model, tokenizer or configuration needs code of its repository."""


def from_pretrained(kind: Kind, path: str, **options: Any) -> Any:
    """Load a configuration, tokenizer, causal language model or generation config.

    Args:
        kind: what to load.
        path: a folder or hub name.
        options: arguments of `from_pretrained`.

    Raises:
        RemoteCodeError: it needs code of its repository, or `options` ask to run it.
        ValueError: what transformers raises.
        OSError: there is no such file.
    """
    if "trust_remote_code" in options:
        raise RemoteCodeError("trust_remote_code must not be set: code of model repositories is never run")
    if kind != "generation_config":  # JSON alone: transformers would keep the argument as a setting of generation
        options["trust_remote_code"] = False  # None would ask on the terminal
    try:
        return FACTORIES[kind].from_pretrained(path, **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise RemoteCodeError(
            f"{path!r} needs code from its own repository (auto_map), which is never run: use a {kind} "
            "whose class is part of transformers"
        ) from None


def checked_kwargs(kwargs: Mapping[str, Any] | None, role: Role) -> dict[str, Any]:
    """A copy of the user's arguments of `from_pretrained`, with `dtype` as a `torch.dtype`.

    Raises:
        ValueError: an argument that the user must not set, a secret, or an unknown dtype.
    """
    options = dict(kwargs or {})
    trained = "set the module's gradient_checkpointing (--model.gradient_checkpointing true)"
    reasons = dict.fromkeys(CHECKPOINTING, trained if role == "student" else "it is not trained")
    reasons["trust_remote_code"] = "code of model repositories is never run"
    for key in (*RESERVED, *CHECKPOINTING):
        if key in options:
            raise ValueError(f"{role}_kwargs must not contain {key!r}: {reasons.get(key, 'it is set already')}")
    if found := next(secret_names(options), None):
        raise ValueError(
            f"{role}_kwargs.{found} must not be given, as secrets would be saved with the run: set the environment "
            "variable HF_TOKEN instead"
        )
    if "torch_dtype" in options:
        options.setdefault("dtype", options.pop("torch_dtype"))
    if "quantization_config" in options:
        check_quantization(options["quantization_config"], role)
    dtype = options.get("dtype")
    if isinstance(dtype, str) and dtype != "auto":
        options["dtype"] = dtype = getattr(torch, dtype, dtype)
    if dtype is not None and dtype != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(
            f"{role}_kwargs: dtype must be 'auto' or a dtype such as 'float32' or 'bfloat16', got {dtype!r}"
        )
    return options
