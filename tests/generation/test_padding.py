"""A padding token without an embedding is never looked up: in generation, rollouts, metrics and predictions."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kd_lightning.data import InstructionDataModule, left_pad
from kd_lightning.generation.batch_generator import BatchGenerator
from kd_lightning.models.generate import Sampling
from kd_lightning.models.hf_adapter import padding_id
from kd_lightning.rollout.base import RolloutContext
from kd_lightning.training.prediction import greedy_responses
from tiny_tokenizers import tiny

TEMPLATE = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


def tokenizer_and_model(pad: int | None) -> tuple[Any, Any]:
    tokenizer = tiny(template=TEMPLATE)
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **size)
    model = LlamaForCausalLM(config).eval()
    model.generation_config.pad_token_id = pad
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id >= config.vocab_size
    return tokenizer, model


@pytest.mark.parametrize("pad", [None, 100_000])
def test_responses_do_not_depend_on_the_padding_token(pad: int | None) -> None:
    tokenizer, model = tokenizer_and_model(pad)
    prompts = [tokenizer(text).input_ids for text in ("the answer is forty two", "a", "a little town by the sea")]
    together = dict(BatchGenerator(model, tokenizer, Sampling(6, 0.0)).generate(prompts, [(0, [0, 1, 2])]))
    alone = [dict(BatchGenerator(model, tokenizer, Sampling(6, 0.0)).generate([p], [(0, [0])]))[0] for p in prompts]
    assert [together[n] for n in range(3)] == alone


@pytest.mark.parametrize("pad", [None, 100_000, -1])
def test_rollouts_and_predictions(pad: int | None, tmp_path: Path) -> None:
    tokenizer, model = tokenizer_and_model(pad)
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": "the answer " * n, "output": "a town" * n} for n in range(1, 5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = InstructionDataModule(str(path), test=str(path), tokenizer=tokenizer, batch_size=4, shuffle=False)
    data.setup("fit")
    data.setup("test")
    (batch,) = data.train_dataloader()
    student: Any = SimpleNamespace(student=model, call=lambda function, *args, **kwargs: function(*args, **kwargs))
    generated = RolloutContext(student).respond(batch, Sampling(5))
    assert int(generated["input_ids"].max()) < model.config.vocab_size
    model(input_ids=generated["input_ids"], attention_mask=generated["attention_mask"])
    (prompts,) = data.predict_dataloader()
    assert greedy_responses(model, prompts, 4)[0].shape[0] == 4


def test_a_padding_token_with_an_embedding_is_used() -> None:
    tokenizer, model = tokenizer_and_model(None)
    assert padding_id(model, 3) == 3 and padding_id(model, None) == tokenizer.eos_token_id
    model.resize_token_embeddings(len(tokenizer))
    assert padding_id(model, tokenizer.pad_token_id) == tokenizer.pad_token_id
    model.generation_config.eos_token_id = None
    assert padding_id(model, None) == 0
    assert left_pad([[1], [2, 3]], 0)["attention_mask"].tolist() == [[0, 1], [1, 1]]
