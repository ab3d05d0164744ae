"""Tiny multimodal models, whose text path leaves their vision or audio tower aside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def llava() -> PreTrainedModel:
    text, vision = hf.LlamaConfig(**TEXT), hf.CLIPVisionConfig(**VISION)
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=63, image_seq_length=4)
    )


def gemma3() -> PreTrainedModel:
    text, vision = hf.Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=16), hf.SiglipVisionConfig(**VISION)
    numbers = {"image_token_index": 63, "boi_token_index": 61, "eoi_token_index": 62, "mm_tokens_per_image": 4}
    return hf.Gemma3ForConditionalGeneration(hf.Gemma3Config(text_config=text, vision_config=vision, **numbers))


def qwen2_vl() -> PreTrainedModel:
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    numbers = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    return hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(text_config=text, vision_config=vision, **numbers))


def mllama() -> PreTrainedModel:
    """With a layer that attends to images, inside of the text model."""
    rope = {"rope_type": "default", "rope_theta": 1e4}
    text = {**TEXT, "cross_attention_layers": [1], "num_hidden_layers": 3, "rope_parameters": rope}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 32,
        "supported_aspect_ratios": [[1, 1]],
    }
    return hf.MllamaForConditionalGeneration(hf.MllamaConfig(text_config=text, vision_config=vision))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llava": llava,
    "gemma3": gemma3,
    "qwen2_vl": qwen2_vl,
    "mllama": mllama,
}


def seeded(name: str, seed: int = 0) -> PreTrainedModel:
    """The same weights in every process."""
    torch.manual_seed(seed)
    return MODELS[name]()
