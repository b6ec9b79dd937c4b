"""Tiny random models of text and pictures whose text side is served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Gemma3Config, PretrainedConfig, Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig

from support.models.models import TWO_LAYERS
from support.models.tokenizer_zoo import byte_level, wrapped

TEXT: dict[str, Any] = {**TWO_LAYERS, "vocab_size": 512}
EYE: dict[str, Any] = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 64, "intermediate_size": 16}


def axes(*sections: int) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}


CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "Gemma3ForConditionalGeneration": lambda: Gemma3Config(
        text_config={**TEXT, "sliding_window": 24, "query_pre_attn_scalar": 16},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
    ),
    "Qwen2VLForConditionalGeneration": lambda: Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": axes(2, 3, 3)},
        vision_config={"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 64},
    ),
    "Qwen2_5_VLForConditionalGeneration": lambda: Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": axes(2, 3, 3)}, vision_config={**EYE, "fullatt_block_indexes": [0]}
    ),
    "Qwen3VLForConditionalGeneration": lambda: Qwen3VLConfig(
        text_config={**TEXT, "rope_parameters": axes(3, 3, 2)},
        vision_config={**EYE, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    ),
}


def save_whole(folder: Path, architecture: str) -> Path:
    torch.manual_seed(0)
    config = CONFIGS[architecture]()
    model = getattr(transformers, architecture)(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
    model.save_pretrained(folder)
    wrapped(byte_level()).save_pretrained(folder)
    return folder
