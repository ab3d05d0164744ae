"""A cut model computes what the whole one computes without the layers and neurons that were cut."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from architectures import CUT, tiny
from kd_lightning.models.pruning.cut import cut_layers
from kd_lightning.models.pruning.layers import block_influence, evenly_spaced, layers_of, most_influential
from kd_lightning.models.pruning.width import cut_mlp, mlps_of, neuron_activity

LAYERS = 4
REFUSED = {
    "jamba": "does not fit its weights",  # which layers are attention follows from a period
    "llama4_text": "does not fit its weights",
    "minicpm3": "depends on its position",  # divides by the root of the number of layers
    "openai-gpt": "does not run without some of its layers",
    "recurrent_gemma": "does not fit its weights",
    "rwkv": "does not fit its weights",
    "xlm": "one list of its 4 layers",
    "xlstm": "one list of its 4 layers",
}


def deep(model_type: str, **changes: Any) -> PreTrainedModel:
    """A tiny model with four layers."""
    extra: dict[str, Any] = {"decoder_layers": LAYERS} if "decoder_layers" in CUT[model_type] else {}
    if model_type == "gpt_neo":
        extra = {"attention_types": [[["global", "local"], LAYERS // 2]]}
    torch.manual_seed(0)
    return tiny(model_type, num_hidden_layers=LAYERS, **extra, **changes)


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return found


@pytest.mark.parametrize("model_type", sorted(set(CUT) - set(REFUSED)))
def test_all_layers_are_the_model_bit_for_bit_and_one_layer_can_be_cut(model_type: str) -> None:
    model = deep(model_type)
    whole = cut_layers(model, range(LAYERS))
    state = model.state_dict()
    assert whole.state_dict().keys() == state.keys()
    assert all(torch.equal(x, state[key]) for key, x in whole.state_dict().items())
    ids = torch.arange(3, 13).view(1, -1)
    assert torch.equal(logits(whole, ids), logits(model, ids))
    cut = cut_layers(model, [1, 3])
    assert len(layers_of(cut)[1]) == 2
    rebuilt = type(cut)(copy.deepcopy(cut.config)).eval()  # the configuration alone says what the model is
    rebuilt.load_state_dict(cut.state_dict())
    assert torch.equal(logits(rebuilt, ids), logits(cut, ids))


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_architectures_that_cannot_be_cut_are_refused(model_type: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[model_type]):
        cut_layers(deep(model_type), [1, 2])


@pytest.mark.parametrize("kept", [[0], [3], [0, 3], [1, 2, 3]])
def test_a_cut_llama_is_its_layers_one_after_the_other(kept: list[int]) -> None:
    model = deep("llama")
    ids = torch.arange(3, 13).view(1, -1)
    x = model.model.embed_tokens(ids)
    positions = torch.arange(ids.shape[1]).unsqueeze(0)
    rotary = model.model.rotary_emb(x, positions)
    mask = torch.full((1, 1, 10, 10), -torch.inf).triu(1)
    with torch.no_grad():
        for index in kept:
            layer = model.model.layers[index]
            x = layer(x, attention_mask=mask, position_embeddings=rotary, position_ids=positions)
        expected = model.lm_head(model.model.norm(x))
    torch.testing.assert_close(logits(cut_layers(model, kept), ids), expected, rtol=1e-5, atol=1e-6)


def test_the_types_of_the_layers_follow() -> None:
    model = deep(
        "gemma3_text", layer_types=["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    )
    assert cut_layers(model, [0, 2]).config.layer_types == ["sliding_attention", "full_attention"]
    assert model.config.num_hidden_layers == LAYERS
    assert len(model.config.layer_types) == LAYERS


@pytest.mark.parametrize(
    ("count", "kept", "expected"),
    [
        (12, 1, [0]),
        (12, 2, [0, 11]),
        (12, 4, [0, 4, 7, 11]),
        (5, 5, [0, 1, 2, 3, 4]),
        (1, 1, [0]),
        (30, 3, [0, 14, 29]),
    ],
)
def test_evenly_spaced_layers_keep_the_first_and_the_last(count: int, kept: int, expected: list[int]) -> None:
    assert evenly_spaced(count, kept) == expected


def test_evenly_spaced_layers_are_distinct() -> None:
    for count in range(1, 40):
        for kept in range(1, count + 1):
            found = evenly_spaced(count, kept)
            assert len(set(found)) == kept
            assert found == sorted(found)


@pytest.mark.parametrize("kept", [[], [4], [-1, 2], [2, 1], [1, 1]])
def test_layers_out_of_range_are_refused(kept: list[int]) -> None:
    with pytest.raises(ValueError, match=r"layers must be increasing indices in \[0, 4\)"):
        cut_layers(deep("llama"), kept)


@pytest.mark.parametrize("kept", [0, 5, -2])
def test_numbers_of_layers_out_of_range_are_refused(kept: int) -> None:
    with pytest.raises(ValueError, match=r"layers must be in \[1, 4\]"):
        evenly_spaced(4, kept)
    with pytest.raises(ValueError, match=r"layers must be in \[1, 4\]"):
        most_influential([0.1, 0.2, 0.3, 0.4], kept)


def test_influence_equals_a_slow_loop_and_padding_does_not_count() -> None:
    model = deep("qwen3")
    batch = {"input_ids": torch.randint(3, 80, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    batch["attention_mask"][1, 4:] = 0
    with torch.no_grad():
        states = model.model(**batch, output_hidden_states=True, use_cache=False).hidden_states
        # the last of `hidden_states` is normalized: the output of the last layer is read by a hook
        last: list[torch.Tensor] = []
        handle = model.model.layers[-1].register_forward_hook(lambda m, a, o: last.append(o))
        model.model(**batch, use_cache=False)
        handle.remove()
    states = (*states[:-1], last[0])
    tokens = [(b, t) for b in range(3) for t in range(7) if batch["attention_mask"][b, t]]
    expected = []
    for before, after in itertools.pairwise(states):
        cosines = [float(torch.nn.functional.cosine_similarity(before[b, t], after[b, t], dim=0)) for b, t in tokens]
        expected.append(1 - sum(cosines) / len(cosines))
    halves = [{name: x[:1] for name, x in batch.items()}, {name: x[1:] for name, x in batch.items()}]
    for batches in ([batch], halves):
        assert block_influence(model, batches) == pytest.approx(expected, abs=1e-6)


def test_a_layer_that_changes_nothing_has_no_influence_and_is_cut_first() -> None:
    model = deep("llama")
    with torch.no_grad():
        for name, parameter in model.model.layers[2].named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
    batch = {"input_ids": torch.randint(3, 80, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    influence = block_influence(model, [batch])
    assert influence[2] == pytest.approx(0, abs=1e-6)
    kept = most_influential(influence, 3)
    assert kept == [0, 1, 3]
    torch.testing.assert_close(logits(cut_layers(model, kept), batch["input_ids"]), logits(model, batch["input_ids"]))


@pytest.mark.parametrize(
    "model_type", ["llama", "qwen3", "gemma3_text", "opt", "gpt_neox", "phi", "olmo2", "starcoder2"]
)
def test_neurons_that_are_never_active_can_be_cut(model_type: str) -> None:
    wide = {"ffn_dim": 48} if model_type == "opt" else {}
    model = deep(model_type, intermediate_size=48, **wide)
    if model_type == "opt":  # its configuration names the width otherwise
        with pytest.raises(ValueError, match="width of OPTForCausalLM cannot be pruned"):
            cut_mlp(model, [torch.rand(48)] * LAYERS, 24)
        return
    dead = torch.arange(48) % 3 == 1
    with torch.no_grad():
        for mlp in mlps_of(model):
            model.get_submodule(mlp.down).weight[:, dead] = 0
    activity = [(~dead).double()] * LAYERS
    ids = torch.arange(3, 13).view(1, -1)
    torch.testing.assert_close(logits(cut_mlp(model, activity, 32), ids), logits(model, ids), rtol=1e-5, atol=1e-5)
    whole = cut_mlp(model, activity, 48)
    assert all(torch.equal(x, model.state_dict()[key]) for key, x in whole.state_dict().items())


def test_activity_equals_a_slow_mean() -> None:
    model = deep("llama", intermediate_size=40)
    batch = {"input_ids": torch.randint(3, 80, (2, 5)), "attention_mask": torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])}
    seen: list[torch.Tensor] = []
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        model(**batch, use_cache=False)
    handle.remove()
    expected = (seen[0][0].abs().sum(0) + seen[0][1, :3].abs().sum(0)) / 8
    torch.testing.assert_close(neuron_activity(model, [batch])[1].float(), expected, rtol=1e-5, atol=1e-6)


def test_experts_have_no_width_that_can_be_cut() -> None:
    with pytest.raises(ValueError, match="must have one MLP of plain matrices"):
        mlps_of(deep("mixtral"))
