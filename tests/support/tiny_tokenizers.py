"""Small tokenizers of the two common kinds, trained on a few words: what the tests of the data read with."""

from __future__ import annotations

import functools

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "The quick brown fox jumps over the lazy dog. What is the answer? The answer is forty two.",
    "Tell me a story about a little town by the sea, where nobody ever said a word too much.",
    'system user assistant tool model get weather {"name": "weather", "arguments": {"city": "Paris"}} sunny rain',
] * 4


@functools.cache
def _backend(kind: str, specials: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind == "metaspace", unk_token="<unk>"))
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "byte_level" else []
    extra = [f"<0x{byte:02X}>" for byte in range(256)] if kind == "metaspace" else []
    if kind == "byte_level":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, special_tokens=["<unk>", *extra], show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_special_tokens(list(specials))
    return str(tokenizer.to_str())


def tiny(
    specials: tuple[str, ...] = ("<s>", "</s>"),
    bos: str | None = "<s>",
    eos: str | None = "</s>",
    pad: str | None = None,
    kind: str = "byte_level",
    template: str | None = None,
    adds_bos: bool = False,
) -> PreTrainedTokenizerFast:
    """A tokenizer of a few hundred tokens.

    Args:
        specials: the special tokens, all of them.
        bos: the one of them that begins a text.
        eos: the one of them that ends a text.
        pad: the one of them that pads.
        kind: `byte_level` (as GPT-2, Qwen, Llama 3) or `metaspace` (as Llama 2, Mistral, Gemma).
        template: the chat template.
        adds_bos: whether it puts `bos` before every text by itself.
    """
    backend = Tokenizer.from_str(_backend(kind, specials))
    if adds_bos:
        first = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])
        backend.post_processor = first
    named = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, **{name: token for name, token in named.items() if token is not None}
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_unigram(
    specials: tuple[str, ...] = ("<s>", "</s>"),
    bos: str | None = "<s>",
    eos: str | None = "</s>",
    template: str | None = None,
) -> PreTrainedTokenizerFast:
    """A Unigram tokenizer with `▁` and bytes for unknown characters, as SentencePiece trains them.

    Args:
        specials: the special tokens, all of them.
        bos: the one of them that begins a text.
        eos: the one of them that ends a text.
        template: the chat template.
    """
    words = sorted({f"▁{word}" for text in TEXT for word in text.split()} | {"▁", "▁▁", "ing", "swer", "▁the▁"})
    letters = sorted({letter for text in TEXT for letter in text} - {" "})
    pieces = [("<unk>", 0.0), *((word, -5.0 - n / 100) for n, word in enumerate(words))]
    pieces += [(letter, -9.0) for letter in letters if letter not in words]
    pieces += [(f"<0x{byte:02X}>", -12.0) for byte in range(256)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([*specials, "<unk>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer
