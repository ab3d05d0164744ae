"""The one adapter to Hugging Face objects: attributes that only some models, configurations and tokenizers have.

`PreTrainedModel`, `PreTrainedConfig` and tokenizers declare few of the attributes that models of single families set,
and PEFT's models wrap the model that has them. Each function below asks for one of them, with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:  # importing transformers takes seconds
    from jinja2 import Environment, Template
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


# -------------------------------------------------------------------------------------------------------------- models
def name_or_path(model: object) -> str | None:
    """Folder or hub name that an object was loaded from; None if it was built from a configuration.

    Models keep an empty string when they were not loaded; a custom `nn.Module` has no such attribute.
    """
    found = getattr(model, "name_or_path", None)
    return found if isinstance(found, str) and found else None


def is_wrapped(model: nn.Module) -> bool:
    """Whether DDP, FSDP1, DataParallel or Fabric wraps a model; Fabric's wrapper passes on all attributes."""
    from lightning.fabric.wrappers import is_wrapped as is_fabric_module
    from torch.nn.parallel import DataParallel, DistributedDataParallel

    kinds = (DataParallel, DistributedDataParallel)
    return isinstance(model, kinds) or type(model).__name__ == "FullyShardedDataParallel" or is_fabric_module(model)


def has_output_embeddings(model: nn.Module) -> bool:
    """Whether a model says which layer makes its logits: a custom `nn.Module` does not."""
    return callable(getattr(model, "get_output_embeddings", None)) and output_embeddings(model) is not None


def is_peft_model(model: nn.Module) -> bool:
    """Whether a model is wrapped by PEFT. Asked without an import of `peft`, which takes a second."""
    return hasattr(model, "get_base_model")


def base_model(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model itself: the one inside of PEFT's wrapper if there is one."""
    found: PreTrainedModel = model.get_base_model() if is_peft_model(model) else model  # type: ignore[operator,assignment]
    return found


def decoder(model: PreTrainedModel) -> nn.Module:
    """The backbone of a causal LM; the model itself if it has none.

    Llama 4 returns itself from `get_decoder`: its backbone is called `model`.
    """
    body: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    return getattr(model, "model", model) if body is model else body


def output_embeddings(model: nn.Module) -> nn.Module:
    """The layer that makes the logits, also of a model wrapped by PEFT. `transformers` leaves the method untyped."""
    found: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    return found


def input_embeddings(model: nn.Module) -> nn.Module:
    """The layer that embeds the tokens, also of a model wrapped by PEFT. `transformers` leaves the method untyped."""
    found: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    return found


def weight_and_bias(layer: nn.Module | None) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of an LM head, None for what it does not have: `get_output_embeddings` may return any module."""
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    return (weight if isinstance(weight, Tensor) else None), (bias if isinstance(bias, Tensor) else None)


def is_adapted(layer: nn.Module | None) -> bool:
    """Whether PEFT has wrapped a layer: by an adapter, or because it trains it in full (`modules_to_save`)."""
    return hasattr(layer, "base_layer") or hasattr(layer, "original_module")


def num_embeddings(layer: nn.Module) -> int | None:
    """Number of tokens in an input embedding; None for a custom layer without that attribute."""
    found = getattr(layer, "num_embeddings", None)
    return found if isinstance(found, int) else None


def eos_token_ids(model: PreTrainedModel) -> list[int]:
    """Tokens that end a response: none, one (an int in the generation config) or several (a list there)."""
    eos = getattr(model.generation_config, "eos_token_id", None)  # a model that cannot generate has no config
    return [] if eos is None else [int(token) for token in (eos if isinstance(eos, (list, tuple)) else [eos])]


def attends_without_mask(model: nn.Module) -> bool:
    """Whether attention is computed by a kernel that reads positions instead of a mask: flash or flex attention.

    The name of the implementation is a private attribute of the configuration; a custom `nn.Module` has none.
    """
    name = str(getattr(getattr(model, "config", None), "_attn_implementation", None))
    return "flash" in name or "flex" in name


def padding_id(model: PreTrainedModel, pad: int | None) -> int:
    """The token id of padding: `pad` if the model has an embedding for it, else the end of sequence or 0.

    Padding is masked, but it is looked up: a padding token that was added to the tokenizer may have no embedding.
    """
    known = hasattr(model, "get_input_embeddings")  # not declared by a custom `nn.Module`
    rows = (num_embeddings(input_embeddings(model)) if known else None) or 1 << 62
    return next(token for token in (pad, *eos_token_ids(model), 0) if token is not None and 0 <= token < rows)


def enable_activation_checkpointing(model: PreTrainedModel, argument: str = "activation_checkpointing") -> None:
    """Activation checkpointing: recompute the layers in backward.

    Args:
        model: the model.
        argument: that the user has set, for the message.

    Raises:
        ValueError: the model does not support it.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):  # a custom `nn.Module` declares nothing
        raise ValueError(f"{argument} is not supported by {type(model).__name__}: set {argument}=False")
    model.activation_checkpointing_enable({"use_reentrant": False})


# ------------------------------------------------------------------------------------------------------ configurations
def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Configuration of the language model; a multimodal model nests it."""
    return model.config.get_text_config(decoder=True)


def config_numbers(config: PreTrainedConfig, names: tuple[str, ...]) -> list[float]:
    """Values of those entries that are numbers other than 0. Families call the same factor by different names."""
    found = (getattr(config, name, None) for name in names)
    return [float(value) for value in found if isinstance(value, (int, float)) and value]


def max_positions(model: PreTrainedModel) -> int | None:
    """The limit on tokens of a sequence; None if the configuration has none (ALiBi, recurrent models)."""
    found = getattr(text_config(model), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def number_of_layers(model: PreTrainedModel) -> int:
    """Number of layers of the decoder. Families name it `num_hidden_layers`, or map that name to their own."""
    found = getattr(text_config(model), "num_hidden_layers", None)
    return found if isinstance(found, int) else 0


def set_number_of_layers(config: PreTrainedConfig, count: int) -> None:
    """Set the number of layers of a decoder, under the name that its family gives it."""
    config.num_hidden_layers = count
    if hasattr(config, "decoder_layers"):  # the OPT-like families that were made from encoder-decoder models
        config.decoder_layers = count


# ---------------------------------------------------------------------------------------------------------- tokenizers
def has_offsets(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer gives the characters of each token: only those of the `tokenizers` library do."""
    return bool(getattr(tokenizer, "is_fast", False))


def backend_state(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Everything that decides the tokens, as text; None for a tokenizer that is written in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else str(backend.to_str())


def normalized(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text after the normalizer of a tokenizer of the `tokenizers` library; some have none."""
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    return text if normalizer is None else str(normalizer.normalize_str(text))


def is_token_of_model(tokenizer: PreTrainedTokenizerBase, number: int) -> bool:
    """Whether the model inside a tokenizer of the `tokenizers` library reads the text of this token as the token."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    found = backend.model.tokenize(backend.id_to_token(number))
    return [token.id for token in found] == [number]


# ------------------------------------------------------------------------------------------------------ chat templates
def chat_template_environment() -> Environment:
    """The Jinja environment in which transformers compiles chat templates: a private function builds it."""
    from transformers.utils import chat_template_utils

    return chat_template_utils._compile_jinja_template("").environment  # type: ignore[no-any-return]


@contextmanager
def replace_template_compiler(compile_template: Callable[[str], Template]) -> Iterator[None]:
    """While it is entered, transformers compiles chat templates with this function.

    `apply_chat_template` takes no environment: the limits on a template could only be had with a copy of all it does.
    """
    from transformers.utils import chat_template_utils

    private: Any = chat_template_utils
    original = private._compile_jinja_template
    private._compile_jinja_template = compile_template
    try:
        yield
    finally:
        private._compile_jinja_template = original
