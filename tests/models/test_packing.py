"""Rows without padding: where tokens are, and which architectures keep packed rows apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from architectures import CUT, tiny
from kd_lightning.models.backbone import body_and_head, hidden_states, logits
from kd_lightning.models.hf_adapter import attends_without_mask
from kd_lightning.models.packing.check import check_packing
from kd_lightning.models.packing.layout import PackedLayout, place_rows

REFUSED = {
    # recurrent and hybrid models carry a state from one row to the next
    *("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "mamba", "mamba2", "minimax"),
    *("qwen3_5_text", "qwen3_next", "recurrent_gemma", "rwkv", "xlstm"),
    # attention masks that do not depend on positions
    *("bart", "bert-generation", "biogpt", "bloom", "gpt_oss", "mpt", "openai-gpt", "opt", "xglm", "xlm"),
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sliding window": ("mistral", {"sliding_window": 3}),
    "sliding and full": ("gemma2", {"sliding_window": 3}),
    "chunks": ("llama4_text", {"attention_chunk_size": 4}),
    "alibi": ("falcon", {"alibi": True}),  # a row's offset moves all its keys by the same number
}


def mask_of(*lengths: int) -> Tensor:
    return (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()


def ids_of(mask: Tensor) -> Tensor:
    return torch.randint(3, 70, mask.shape, generator=torch.Generator().manual_seed(0)) * mask


def body_of(model: Any) -> Any:
    try:
        return body_and_head(model)[0]
    except ValueError:
        return None


def test_rows_share_sequences_and_positions_restart() -> None:
    mask = mask_of(2, 6, 3, 1)
    layout = PackedLayout(mask)
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 0]]
    ids = torch.arange(1, 25).view(4, 6) * mask
    assert layout.pack(ids).tolist() == [[7, 8, 9, 10, 11, 12], [13, 14, 15, 1, 2, 19]]
    assert torch.equal(layout.unpack(layout.pack(ids).unsqueeze(-1)).squeeze(-1), ids)
    alone = PackedLayout(mask, one_sequence=True)
    assert alone.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 1, 0]]
    assert torch.equal(alone.unpack(alone.pack(ids).unsqueeze(-1)).squeeze(-1), ids)


def test_what_is_left_of_a_sequence_has_positions_of_its_own() -> None:
    assert PackedLayout(mask_of(5, 2)).position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]]


def test_rows_may_be_padded_anywhere_and_be_empty() -> None:
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]])
    layout = PackedLayout(mask)
    ids = torch.arange(1, 13).view(3, 4) * mask
    assert torch.equal(layout.unpack(layout.pack(ids).unsqueeze(-1)).squeeze(-1), ids)
    assert layout.position_ids.tolist() == [[0, 1], [0, 1]]


def test_first_fit_decreasing() -> None:
    starts, used = place_rows([4, 7, 3, 3, 6], 10)
    assert used == [10, 10, 3] and starts == [16, 0, 7, 20, 10]


@pytest.mark.parametrize("model_type", sorted(set(CUT) - REFUSED))
def test_architectures_that_keep_packed_rows_apart(model_type: str) -> None:
    torch.manual_seed(0)
    model = tiny(model_type)
    body, mask = body_of(model), mask_of(7, 3, 12, 1, 5)
    check_packing(model, body, "student")
    ids = ids_of(mask)
    part, function = (model, logits) if body is None else (body, hidden_states)
    with torch.no_grad():
        padded, packed = (function(part, ids, mask, packed) for packed in (False, True))
    torch.testing.assert_close(packed[mask.bool()], padded[mask.bool()], rtol=1e-4, atol=2e-5)
    assert not packed[~mask.bool()].any()


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_architectures_that_do_not_are_refused(model_type: str) -> None:
    torch.manual_seed(0)
    model = tiny(model_type)
    text = f"packing must be false for the teacher {type(model).__name__}: .*set data.packing to false"
    with pytest.raises(ValueError, match=text):
        check_packing(model, body_of(model), "teacher")


@pytest.mark.parametrize("variant", VARIANTS)
def test_windows_chunks_and_alibi(variant: str) -> None:
    torch.manual_seed(0)
    model_type, changes = VARIANTS[variant]
    model = tiny(model_type, **changes)
    check_packing(model, body_of(model), "student")
    mask = mask_of(9, 4, 6)
    with torch.no_grad():
        padded, packed = (logits(model, ids_of(mask), mask, packed)[mask.bool()] for packed in (False, True))
    torch.testing.assert_close(packed, padded, rtol=1e-4, atol=2e-5)


def test_layers_with_a_convolution_are_refused() -> None:
    model = tiny("lfm2", layer_types=["conv", "full_attention"])
    with pytest.raises(ValueError, match="packed rows change each other's outputs, by up to 0"):
        check_packing(model, body_of(model), "student")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_dtypes_and_attention(attention: str, dtype: torch.dtype) -> None:
    model = tiny("llama").to(dtype)
    model.set_attn_implementation(attention)
    assert not attends_without_mask(model)
    check_packing(model, body_of(model), "student")


@pytest.mark.parametrize(("name", "expected"), [("flash_attention_2", True), ("flex_attention", True), ("sdpa", False)])
def test_attention_by_positions_reads_one_sequence(name: str, expected: bool) -> None:
    model = tiny("llama")
    model.config._attn_implementation_internal = name
    assert attends_without_mask(model) is expected
    assert not attends_without_mask(torch.nn.Linear(2, 2))


def test_one_sequence_equals_padded_rows() -> None:
    model, mask = tiny("qwen3"), mask_of(7, 3, 12)
    layout = PackedLayout(mask, one_sequence=True)
    with torch.no_grad():
        found = model(input_ids=layout.pack(ids_of(mask)), position_ids=layout.position_ids, use_cache=False).logits
        padded = logits(model, ids_of(mask), mask)
    torch.testing.assert_close(layout.unpack(found)[mask.bool()], padded[mask.bool()], rtol=1e-4, atol=2e-5)


def test_a_model_without_position_ids_is_refused() -> None:
    class NoPositions(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny("llama").model

        def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
            return self.model(input_ids=input_ids, attention_mask=attention_mask)

    model = tiny("llama")
    with pytest.raises(ValueError, match="LlamaForCausalLM: it takes no position_ids"):
        check_packing(model, NoPositions(), "student")


def test_a_batch_without_tokens_is_read_as_it_is() -> None:
    model, ids = tiny("llama"), torch.full((2, 3), 4)
    with torch.no_grad():
        found = [logits(model, ids, mask, packed=True) for mask in (torch.zeros_like(ids), None)]
    assert found[0].shape == found[1].shape == (2, 3, 80)
