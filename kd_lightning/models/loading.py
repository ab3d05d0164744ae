"""Causal language models and tokenizers from folders or hub names, checked, with errors in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import transformers as hf
from huggingface_hub.errors import StrictDataclassError
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError
from torch import nn
from transformers.utils import logging

from kd_lightning.assets import resolve

Role = Literal["student", "teacher", "model"]  # the last where there is one alone
auto: Any = hf  # its factories are not typed
hf_log: Any = logging
RESERVED = (
    "trust_remote_code",
    "use_safetensors",
    "weights_only",
    "output_loading_info",
    "ignore_mismatched_sizes",
    "device_map",
)
FILES = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "force_download")  # which are meant
REFUSALS = (TypeError, ValueError, KeyError, AttributeError, ImportError, StrictDataclassError)  # when one is built
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")


class ModelNotFoundError(ValueError):
    """A name is neither a folder here nor a model that the hub gives out."""


def load_causal_lm(
    name: str,
    *,
    init: str = "pretrained",
    kwargs: Mapping[str, Any] | None = None,
    role: Role = "student",
) -> hf.PreTrainedModel:
    """A causal language model, on the CPU and in eval mode, all of whose parameters are finite and were really read.

    Args:
        name: a folder, a hub name, or `asset:teacher`, `asset:student`.
        init: `pretrained`, or `random` to start from the configuration alone (torch's generator decides the numbers).
        kwargs: arguments of `from_pretrained` (`dtype`, `attn_implementation`, `revision` …). Without `dtype` a student
            is read as fp32 and a teacher as what it was saved in.
        role: `student`, `teacher` or `model`: named in errors, decides the default dtype.

    Raises:
        ModelNotFoundError: no such folder, or no such model on the hub.
        ValueError: no or a broken configuration; no causal language model; no weights, pickled weights, broken weights;
            weights that leave a parameter unset or are not finite; an argument that is refused.
    """
    if init not in ("pretrained", "random"):
        raise ValueError(f"{role}_init must be 'pretrained' or 'random', got {init!r}")
    options = checked_kwargs(kwargs, role)
    options.setdefault("dtype", torch.float32 if role == "student" or init == "random" else "auto")
    place = resolve_model(name, role)
    _check_config(place, role, options)
    if init == "pretrained":
        _check_weights(Path(place), role)
    try:
        with _quiet():
            model = _pretrained(place, role, options) if init == "pretrained" else _random(place, options)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{role} '{place}': its weights cannot be read: {_line(error)}") from None
    except REFUSALS as error:
        given = f" with {role}_kwargs {dict(kwargs)}" if kwargs else ""
        raise ValueError(f"{role} '{place}'{given} cannot be built: {_line(error)}") from None
    model.train(False)
    check_finite(model, role)
    check_causal(model, role)
    return model


def causal_lm_from_config(name: str, *, kwargs: Mapping[str, Any] | None = None, role: Role = "student") -> Any:
    """A causal language model as its configuration alone describes it, in eval mode; no weights are read or checked.

    Args:
        name: as for `load_causal_lm`; the folder needs no weights.
        kwargs: as for `load_causal_lm`; the default dtype of a teacher is its configuration's.
        role: as for `load_causal_lm`.

    Raises:
        ModelNotFoundError: no such folder, or no such model on the hub.
        ValueError: no or a broken configuration; no causal language model; an argument that is refused.
    """
    options = checked_kwargs(kwargs, role)
    options.setdefault("dtype", torch.float32 if role == "student" else "auto")
    place = resolve_model(name, role)
    _check_config(place, role, options)
    try:
        with _quiet():
            return _random(place, options).train(False)
    except REFUSALS as error:
        raise ValueError(f"{role} '{place}' cannot be built: {_line(error)}") from None


def checked_kwargs(kwargs: Mapping[str, Any] | None, role: Role) -> dict[str, Any]:
    """A copy of what the user passes on to `from_pretrained`, with `dtype` as torch's.

    Raises:
        ValueError: an argument that is not the user's to set, or an unknown dtype.
    """
    options = dict(kwargs or {})
    for key in RESERVED:
        if key in options:
            reason = "code that comes with a model is never run" if key == "trust_remote_code" else "it is set already"
            raise ValueError(f"{role}_kwargs must not hold {key!r}: {reason}")
    if "torch_dtype" in options:
        options.setdefault("dtype", options.pop("torch_dtype"))
    dtype = options.get("dtype")
    if isinstance(dtype, str) and dtype != "auto":
        options["dtype"] = dtype = getattr(torch, dtype, dtype)
    if dtype is not None and dtype != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"{role}_kwargs: dtype must be 'auto' or one such as 'float32' or 'bfloat16', got {dtype!r}")
    return options


def resolve_model(name: str, role: Role) -> str:
    """The folder that a name stands for, or the hub name as it is.

    Raises:
        ModelNotFoundError: it looks like a path and there is nothing, or like nothing at all.
        ValueError: it is a file, or a folder without a configuration.
    """
    place = resolve(name)
    folder = Path(place).expanduser()
    if place and folder.is_dir():
        if (folder / "config.json").is_file():
            return str(folder)
        adapter = (folder / "adapter_config.json").is_file()
        reason = (
            "it holds a PEFT adapter, which must be merged into its model first" if adapter else "no config.json in it"
        )
        raise ValueError(f"{role} '{name}' is no folder of a Hugging Face model: {reason}")
    if place and folder.exists():
        raise ValueError(f"{role} '{name}' is a file; it must be the folder of a Hugging Face model")
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", place):
        raise ModelNotFoundError(f"{role} '{name}': there is no such folder")
    return place


def check_finite(model: nn.Module, role: Role) -> None:
    """Look at every parameter.

    Raises:
        ValueError: one holds NaN or inf; the first is named.
    """
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            bad = "NaN" if torch.isnan(parameter).any() else "inf"
            raise ValueError(f"{role}: the weights of '{name}' hold {bad}")


def check_causal(model: hf.PreTrainedModel, role: Role) -> None:
    """See that a token changes nothing before it: an encoder read as a language model would be told its answers.

    Raises:
        ValueError: it does.
    """
    ids = torch.arange(8).repeat(2, 1).to(model.device)
    ids[1, -1] = 0
    with torch.no_grad():
        one, other = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1].float()
    if (one - other).norm() > max(1e-4, 4 * torch.finfo(model.dtype).eps) * one.norm():
        raise ValueError(
            f"{role}: {type(model).__name__} looks at later tokens, so it is no causal language model "
            f"(some become one with {role}_kwargs is_decoder: true)"
        )


def check_tokenizers(teacher: str, tokenizer: Any) -> None:
    """Compare the teacher's vocabulary with the student's, id by id, as far as both go.

    Padding at the end may differ. A teacher without tokenizer files is taken on trust, with a notice; one that is
    nowhere is left to `load_causal_lm`, which says so.

    Args:
        teacher: folder, hub name or `asset:` name of the teacher.
        tokenizer: the student's.

    Raises:
        ValueError: an id stands for different tokens, and the first is named; the teacher's tokenizer is broken.
    """
    try:
        place = resolve_model(teacher, "teacher")
        _check_config(place, "teacher", {})
    except ModelNotFoundError:
        return
    folder = Path(place)
    own: Any = None
    if not folder.is_dir() or any(path for files in TOKENIZER_FILES for path in folder.glob(files)):
        try:
            with _quiet():
                own = auto.AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        except (OSError, *REFUSALS) as error:
            if folder.is_dir():
                raise ValueError(f"teacher '{teacher}': its tokenizer cannot be read: {_line(error)}") from None
    if own is None:
        rank_zero_info(f"teacher '{teacher}' has no tokenizer of its own: the student's is taken on trust")
        return
    theirs, ours = own.get_vocab(), tokenizer.get_vocab()
    if theirs == ours:
        return
    by_id = {i: token for token, i in theirs.items()}
    for token, i in sorted(ours.items(), key=lambda item: item[1]):
        if by_id.get(i, token) != token:
            raise ValueError(
                f"teacher and student must read the same tokens: token {i} is {by_id[i]!r} to teacher '{teacher}' "
                f"and {token!r} to the student"
            )


def _check_config(place: str, role: Role, options: dict[str, Any]) -> None:
    """See that there is the configuration of a causal language model."""
    where = {name: options[name] for name in FILES if name in options}
    try:
        with _quiet():
            config = auto.AutoConfig.from_pretrained(place, trust_remote_code=False, **where)
    except (OSError, *REFUSALS) as error:
        if Path(place).is_dir():
            raise ValueError(f"{role} '{place}': config.json cannot be read: {_line(error)}") from None
        reason = "no such folder, and the Hugging Face hub does not give it (misspelt, private, or no network)"
        raise ModelNotFoundError(f"{role} '{place}': {reason}") from None
    if type(config) not in auto.AutoModelForCausalLM._model_mapping:
        raise ValueError(f"{role} '{place}' is of type {config.model_type!r}, which is no causal language model")


def _check_weights(folder: Path, role: Role) -> None:
    """See that a folder, where it is one, has weights that are safe to open."""
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"{role} '{folder}' has its weights in {pickles[0]}, which can run code when opened: only safetensors are "
            "read (open it where you trust it and `save_pretrained` it)"
        )
    hint = ": give --model.student_init random to start from its configuration alone" if role == "student" else ""
    raise ValueError(f"{role} '{folder}' has no weights (model.safetensors){hint}")


def _pretrained(place: str, role: Role, options: dict[str, Any]) -> hf.PreTrainedModel:
    """The model with its saved weights, every one of them."""
    loaded: tuple[hf.PreTrainedModel, dict[str, Any]] = auto.AutoModelForCausalLM.from_pretrained(
        place,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are named below
        **options,
    )
    model, report = loaded
    missing, reshaped = sorted(report["missing_keys"]), sorted(key[0] for key in report["mismatched_keys"])
    if missing or reshaped:
        why = "are not in its files" if missing else "have another shape in its files"
        count = len(missing) + len(reshaped)
        more = f" and {count - 1} more" if count > 1 else ""
        raise ValueError(f"weights of '{(missing + reshaped)[0]}'{more} {why} and would be random")
    if report["unexpected_keys"]:
        first = min(report["unexpected_keys"])
        rank_zero_info(f"{role} '{place}': {len(report['unexpected_keys'])} saved weights have no place ('{first}' …)")
    return model


def _random(place: str, options: dict[str, Any]) -> hf.PreTrainedModel:
    """The model as its configuration draws it, with the generation settings that lie beside it."""
    options = dict(options)
    dtype = options.pop("dtype")
    config, rest = auto.AutoConfig.from_pretrained(place, trust_remote_code=False, return_unused_kwargs=True, **options)
    rest = {name: value for name, value in rest.items() if name not in FILES}
    dtype = (config.dtype or torch.float32) if dtype == "auto" else dtype
    model: hf.PreTrainedModel = auto.AutoModelForCausalLM.from_config(
        config, trust_remote_code=False, dtype=dtype, **rest
    )
    if (Path(place) / "generation_config.json").is_file():
        model.generation_config = hf.GenerationConfig.from_pretrained(place)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no warnings of transformers: what matters in them is checked here and said as an error."""
    verbosity, bars = hf_log.get_verbosity(), hf_log.is_progress_bar_enabled()
    hf_log.set_verbosity_error()
    hf_log.disable_progress_bar()
    try:
        yield
    finally:
        hf_log.set_verbosity(verbosity)
        if bars:
            hf_log.enable_progress_bar()


def _line(error: BaseException) -> str:
    """An error of others in one line: the first, and the next where that one only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    text = f"{type(error).__name__} {text}" if isinstance(error, KeyError) or not text else text
    return text if len(text) <= 240 else text[:239] + "…"
