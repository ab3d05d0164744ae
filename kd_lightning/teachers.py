"""Where the teacher's distribution comes from, and the cut of a causal language model into body and head."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn import functional as F

from kd_lightning.engine import Head
from kd_lightning.models import ModelNotFoundError, check_finite, checked_kwargs, load_causal_lm
from kd_lightning.sharding import whole

# As configurations call them.
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier", "logits_mup_width_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "softcap")


# ------------------------------------------------------------------------------------------------------ body and head
def body_and_head(model: nn.Module) -> tuple[nn.Module, Head]:
    r"""Cut a causal language model where its hidden states become logits, checked against what it does itself.

    The body gives hidden states h, the head says \(\mathrm{logits} = \mathrm{cap}(\mathrm{scale} (h W^\top + b))\).
    Which factors of its configuration a model really applies is seen on a few tokens: what enters the last layer is
    compared with h, what leaves it with \(h W^\top + b\), and in its place noise goes on to the logits, so that a
    factor shows whatever the weights are.

    Args:
        model: a Hugging Face causal language model, also wrapped by PEFT.

    Returns:
        The body, called as `hidden_states(body, input_ids, attention_mask)`, and the head, which holds the model's own
        parameters: a gradient to `head.weight` is one to the model's.

    Raises:
        ValueError: no reading of the model gives its logits (layers between body and head, an encoder, an adapter on
            the head, quantised head …); its whole logits can be used instead.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    layer = base.get_output_embeddings()
    weight, bias = _matrix(model, layer)
    body: nn.Module = base.get_decoder()
    if body is base:  # Llama 4, whose decoder goes by another name than it says
        body = getattr(base, "model", base)
    if base.config.is_encoder_decoder or body is base:
        raise _no_cut(model, "it has no body that can be called alone")
    config = base.config.get_text_config(decoder=True)
    numbers = _numbers(config, SCALES)
    scales = list(dict.fromkeys([1.0, *numbers, *(1 / number for number in numbers)]))  # some multiply, some divide
    caps = [None, *(cap for cap in _numbers(config, SOFTCAPS) if cap > 0)]
    hidden, entered, noise, found = _probe(model, body, layer, max(cap or 1.0 for cap in caps) * max(map(abs, scales)))
    before = next((scale for scale in scales if _agree(scale * hidden, entered, weight.dtype)), None)
    behind = next(
        (
            (scale, cap)
            for scale, cap in itertools.product(scales, caps)
            if _agree(scale * noise if cap is None else cap * torch.tanh(scale * noise / cap), found, weight.dtype)
        ),
        None,
    )
    if before is None or behind is None or (before != 1 and bias is not None):
        raise _no_cut(model, "there is more between its body and its logits than a matrix, a factor and a soft-cap")
    return body, Head(weight, bias, scale=before * behind[0], softcap=behind[1])


def hidden_states(body: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Hidden states [B, T, H] of the body that `body_and_head` gave, ready for the head."""
    hidden: Tensor = body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    return hidden


def logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Logits [B, T, V] of a whole model: what is left where `body_and_head` finds no cut."""
    found: Tensor = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    return found


def head_of(model: nn.Module, reading: Head) -> Head:
    """The same reading with the parameters that the model holds now (a strategy may have put others in their place)."""
    layer: Any = model.get_output_embeddings()  # type: ignore[operator]
    return dataclasses.replace(reading, weight=layer.weight, bias=getattr(layer, "bias", None))


def factors(reading: Head) -> Head:
    """What stays of a reading while a strategy changes the parameters: scale and soft-cap, for `head_of`."""
    return dataclasses.replace(reading, weight=reading.weight.new_empty(0, 0), bias=None)


def _matrix(model: nn.Module, layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the layer that makes the logits."""
    if hasattr(layer, "base_layer") or hasattr(layer, "original_module"):
        raise _no_cut(model, "an adapter sits on its head")
    weight = getattr(layer, "weight", None)
    own = {name for name, _ in layer.named_parameters()} if isinstance(layer, nn.Module) else set()
    if own - {"weight", "bias"}:  # such as a factor that is learnt, and 1 at the start
        raise _no_cut(model, "its last layer has more parameters than weight and bias")
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise _no_cut(model, "its last layer is not a plain matrix")
    return weight, getattr(layer, "bias", None)


def _numbers(config: Any, names: tuple[str, ...]) -> list[float]:
    """What a configuration says under these names, zeros and the unset left out."""
    found = (getattr(config, name, None) for name in names)
    return [float(value) for value in found if isinstance(value, (int, float)) and value]


def _probe(model: nn.Module, body: nn.Module, layer: nn.Module, size: float) -> tuple[Tensor, ...]:
    """What is seen on a few tokens, [N, ·] each: hidden states, what enters the layer, noise put out by it, logits."""
    device = next(layer.parameters()).device
    generator = torch.Generator().manual_seed(0)  # its own: a run's random numbers stay what they were
    vocabulary = next(layer.parameters()).shape[0]
    ids = torch.randint(vocabulary, (2, 6), generator=generator).to(device)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    calls: list[tuple[Tensor, Tensor]] = []

    def put_out_noise(module: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
        if not _agree(F.linear(args[0], module.weight, module.bias), output, output.dtype):
            raise _no_cut(model, "its last layer is not a plain matrix")
        noise = size * torch.randn(output.shape, generator=generator).to(output)
        calls.append((args[0], noise))
        return noise

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    handle = layer.register_forward_hook(put_out_noise)
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            found = logits(model, ids, mask)
            hidden = hidden_states(body, ids, mask)
    except (TypeError, AttributeError) as error:
        raise _no_cut(model, f"its body cannot be called alone ({error})".replace("\n", " ")) from None
    finally:
        handle.remove()
        for module, training in modes:
            module.training = training
    if len(calls) != 1 or calls[0][0].shape != hidden.shape or calls[0][1].shape != found.shape:
        raise _no_cut(model, "its logits do not come from its hidden states by its last layer alone")
    counted = mask.bool()
    return tuple(x[counted].float() for x in (hidden, *calls[0], found))


def _agree(expected: Tensor, found: Tensor, dtype: torch.dtype) -> bool:
    """Equal up to rounding, in every row."""
    tolerance = max(1e-5, 2 * torch.finfo(dtype).eps)
    return bool(((expected - found).norm(dim=-1) <= tolerance * found.norm(dim=-1)).all())


def _no_cut(model: nn.Module, reason: str) -> ValueError:
    return ValueError(f"{type(model).__name__} cannot be cut into body and head: {reason}")


# ----------------------------------------------------------------------------------------------------------- teachers
class Teacher(ABC):
    """Where the teacher's distribution comes from. A plain object: never in a `state_dict`, a summary, or under DDP.

    Made cheaply (arguments are checked, nothing is read), filled by `load`, asked by batch. A batch is a mapping with
    `input_ids` and `attention_mask` of shape [B, T]; what comes back never carries a gradient.
    """

    @property
    @abstractmethod
    def name(self) -> str | None:
        """Folder or hub name, where its tokenizer lies; None where it has none."""

    @property
    @abstractmethod
    def head(self) -> Head | None:
        """What turns `hidden` into logits; None where only `logits` can be asked for."""

    @abstractmethod
    def load(self, device: torch.device | str = "cpu") -> None:
        """Read what is needed and put it on a device; a second call only moves it."""

    @abstractmethod
    def to(self, device: torch.device | str) -> None:
        """Move to a device; nothing happens where it is there already."""

    def shard(self, wrap: Callable[[nn.Module], nn.Module]) -> None:  # noqa: B027 - most teachers have nothing to shard
        """Let a strategy spread the parameters over ranks; called again, nothing happens.

        Args:
            wrap: shards a model where it is, and gives what its parameters are gathered by: `wrap(model)(f, *args)` is
                `f(*args)` with all of them whole.
        """

    @abstractmethod
    def hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Hidden states [B, T, H]."""

    @abstractmethod
    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits [B, T, V]."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A digest that changes with any weight: two teachers with the same one say the same."""


class HFTeacher(Teacher):
    """A Hugging Face causal language model in this process, frozen and in eval mode.

    Args:
        path: folder, hub name or `asset:` name; in Python also a loaded model, which is then frozen.
        kwargs: arguments of `from_pretrained` (`dtype`, `attn_implementation` …); without `dtype` it stays as saved.

    Raises:
        ValueError: an argument in `kwargs` is refused; on `load`, the model cannot be read.
    """

    def __init__(self, path: str, kwargs: dict[str, Any] | None = None) -> None:
        self._given: Any = path
        self.kwargs = checked_kwargs(kwargs, "teacher")
        self.model: Any = None
        self._body: nn.Module | None = None
        self._reading: Head | None = None
        self._root: nn.Module | None = None
        if kwargs and not isinstance(self._given, str):
            raise ValueError(f"teacher_kwargs {kwargs} cannot be applied to a model that is loaded already")

    @property
    def name(self) -> str | None:
        """Folder or hub name; None for a loaded model that came from nowhere."""
        return self._given if isinstance(self._given, str) else getattr(self._given, "name_or_path", None) or None

    @property
    def head(self) -> Head | None:
        """Its head; None where it cannot be cut. Where it is sharded, all ranks ask together."""
        if self._reading is None:
            return None
        head = head_of(self._loaded(), self._reading)
        return dataclasses.replace(
            head, weight=whole(head.weight), bias=None if head.bias is None else whole(head.bias)
        )

    def load(self, device: torch.device | str = "cpu") -> None:
        """Read and freeze the model, and find where to cut it."""
        if self.model is None:
            self.model = self._read().eval().requires_grad_(False)
            try:
                self._body, reading = body_and_head(self.model)
                self._reading = factors(reading)
            except ValueError as error:
                rank_zero_info(f"teacher: {error}; its whole logits are used instead")
        self.to(device)

    def _read(self) -> Any:
        if not isinstance(self._given, str):
            check_finite(self._given, "teacher")
            return self._given
        try:
            return load_causal_lm(self._given, kwargs=self.kwargs, role="teacher")
        except ModelNotFoundError as error:
            classes = ", ".join(sorted(leaf.__name__ for leaf in Teacher.__subclasses__()))
            raise ModelNotFoundError(f"{error}, and no class of that name (there is {classes})") from None

    def to(self, device: torch.device | str) -> None:
        """Move the model; one that is sharded stays where its strategy has put it."""
        model = self._loaded()
        if self._root is None and next(model.parameters()).device != torch.device(device):
            model.to(device)

    def shard(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Let a strategy spread the model over ranks."""
        if self._root is None:
            self._root = wrap(self._loaded())

    @torch.no_grad()
    def hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Hidden states [B, T, H].

        Raises:
            ValueError: it cannot be cut (`head` is None).
        """
        self._loaded()
        if self._body is None:
            raise ValueError(f"teacher '{self.name}' has no cut between body and head: ask for its logits")
        return self._run(hidden_states, self._body, batch)

    @torch.no_grad()
    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits [B, T, V]."""
        return self._run(logits, self._loaded(), batch)

    def _run(self, function: Callable[..., Tensor], part: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """`function` of a part of the model, with the parameters whole."""
        inputs = (batch["input_ids"], batch["attention_mask"])
        if self._root is None:
            return function(part, *inputs)
        found: Tensor = self._root(function, part, *inputs)
        return found

    def fingerprint(self) -> str:
        """SHA-256 over names, types and bytes of all its tensors."""
        model = self._loaded()
        digest = hashlib.sha256()
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(whole(tensor.detach()).cpu().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _loaded(self) -> Any:
        if self.model is None:
            raise ValueError("the teacher is not loaded yet: call `load(device)` first")
        return self.model
