"""The only calls of `from_pretrained`: code from a model repository never runs, and no prompt asks for it."""

from __future__ import annotations

from typing import Any, Literal

import transformers as hf

auto: Any = hf  # the factories of transformers are not typed
Kind = Literal["config", "tokenizer", "model", "generation_config"]
FACTORIES: dict[Kind, Any] = {
    "config": auto.AutoConfig,
    "tokenizer": auto.AutoTokenizer,
    "model": auto.AutoModelForCausalLM,
    "generation_config": auto.GenerationConfig,
}


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
