"""Tiny causal language models of the kinds that transformers has, and what stands behind their heads."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 80
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}
HEADS = {"head_dim": 8}
SEQ2SEQ = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 32}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
LINEAR = {
    **HEADS,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}

# What each needs beside COMMON to be tiny. Factors of the logits are not the default, also where the code ignores them.
CUT: dict[str, dict[str, Any]] = {
    "arcee": {},
    "bamba": MAMBA,
    "bart": SEQ2SEQ,
    "bert-generation": {"is_decoder": True},
    "biogpt": {},
    "bloom": {},
    "codegen": {"rotary_dim": 4},
    "cohere": {"logit_scale": 0.37},
    "cohere2": {"logit_scale": 3.0},
    "ctrl": {"dff": 32},
    "deepseek_v2": {**LATENT, "first_k_dense_replace": 1},
    "ernie4_5": {},
    "exaone4": {},
    "falcon": {},
    "falcon_h1": {"mamba_d_ssm": 32, **MAMBA, "mamba_n_heads": 4, "lm_head_multiplier": 0.6},
    "falcon_mamba": {"state_size": 4},
    "gemma": HEADS,
    "gemma2": {**HEADS, "final_logit_softcapping": 1.5},
    "gemma3_text": {**HEADS, "final_logit_softcapping": 1.5},
    "glm": HEADS,
    "glm4_moe": HEADS,
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {},
    "gpt_oss": HEADS,
    "gptj": {"rotary_dim": 4},
    "granite": {"logits_scaling": 1.7},
    "granitemoe": {"logits_scaling": 0.6},
    "granitemoehybrid": {**MAMBA, "logits_scaling": 1.7, "shared_intermediate_size": 16},
    "helium": HEADS,
    "hunyuan_v1_dense": HEADS,
    "hyperclovax": {"logits_scaling": 1.7},
    "jamba": {"mamba_d_state": 4},
    "lfm2": {},
    "llama": {},
    "llama4_text": {**HEADS, "intermediate_size_mlp": 32},
    "mamba": {"state_size": 4},
    "mamba2": {**HEADS, "num_heads": 8, "state_size": 8},
    "minicpm3": {**LATENT, "dim_model_base": 16},
    "minimax": {},
    "mistral": {},
    "mixtral": {},
    "mpt": {"logit_scale": 0.5},
    "nanochat": {"final_logit_softcapping": 2.0},
    "nemotron": HEADS,
    "olmo": {},
    "olmo2": {},
    "olmoe": {},
    "openai-gpt": {},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 16},
    "qwen3": HEADS,
    "qwen3_5_text": LINEAR,
    "qwen3_moe": HEADS,
    "qwen3_next": LINEAR,
    "recurrent_gemma": {**HEADS, "lru_width": 32, "logits_soft_cap": 1.5},
    "rwkv": {"attention_hidden_size": 32},
    "seed_oss": HEADS,
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": {**HEADS, "final_logit_softcapping": 2.0},
    "xglm": {},
    "xlm": {},
    "xlstm": {"num_heads": 4, "num_blocks": 2, "output_logit_soft_cap": 1.5},
}
SCALE = {
    "cohere": 0.37,
    "cohere2": 3.0,
    "falcon_h1": 0.6,
    "granite": 1 / 1.7,
    "granitemoe": 1 / 0.6,
    "granitemoehybrid": 1 / 1.7,
    "hyperclovax": 1.7,  # multiplies by what the others of that name divide by
    "minicpm3": 0.5,  # before the matrix
}
SOFTCAP = {
    "gemma2": 1.5,
    "gemma3_text": 1.5,
    "nanochat": 2.0,
    "recurrent_gemma": 1.5,
    "vaultgemma": 2.0,
    "xlstm": 1.5,
}
BIASED = {"bert-generation", "codegen", "ctrl", "gptj", "phi", "xlm"}

# No cut: why, in a word of the error.
UNCUT: dict[str, tuple[dict[str, Any], str]] = {
    "bert": ({"is_decoder": True}, "more than a matrix"),
    "big_bird": ({"is_decoder": True}, "more than a matrix"),
    "dory": ({}, "more parameters"),  # a factor for every token, learnt
    "electra": ({"is_decoder": True, "embedding_size": 16}, "by its LM head alone"),
    "modernbert-decoder": ({}, "cannot be called by itself"),
    "rembert": (
        {"is_decoder": True, "input_embedding_size": 32, "output_embedding_size": 32},
        "more than a matrix",
    ),
    "roberta": ({"is_decoder": True}, "more than a matrix"),
}


def tiny(model_type: str, **changes: Any) -> PreTrainedModel:
    """A tiny model in eval mode; every parameter is moved off its initial value, so that a missing bias shows."""
    extra = CUT.get(model_type) or UNCUT.get(model_type, ({}, ""))[0]
    config = CONFIG_MAPPING[model_type](**{**COMMON, **extra, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()
