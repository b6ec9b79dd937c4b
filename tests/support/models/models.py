"""Tiny random bases that keep each family's traits (windows, soft caps, biases, tied heads), and adapters for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Starcoder2Config,
)
from transformers.pytorch_utils import Conv1D

from adapters_store.base.nf4 import keep_nf4_weights_plain

VOCAB = 160
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}

SWITCH = 24  # tokens after which LongRoPE's other factors apply: most tests' sequences are of both kinds
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.02, 1.05, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 5.0, 8.0, 12.0],
    "original_max_position_embeddings": SWITCH,
}
WITHOUT_HEAD_DIM = {key: value for key, value in SIZES.items() if key != "head_dim"}
TWO_LAYERS: dict[str, Any] = {**SIZES, "num_hidden_layers": 2}
ALL_HEADS = {key: value for key, value in TWO_LAYERS.items() if key not in ("head_dim", "num_key_value_heads")}
HALF_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
FAMILY_CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=24),
    "qwen2": lambda: Qwen2Config(**WITHOUT_HEAD_DIM, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SIZES),
    "gemma2": lambda: Gemma2Config(**SIZES, sliding_window=24, query_pre_attn_scalar=16),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, sliding_window=24, query_pre_attn_scalar=16),
    "phi3": lambda: Phi3Config(**WITHOUT_HEAD_DIM, sliding_window=40),
    "phi3-longrope": lambda: Phi3Config(
        **WITHOUT_HEAD_DIM, original_max_position_embeddings=SWITCH, rope_parameters=dict(LONGROPE)
    ),
}
FAMILY_NAMES = tuple(FAMILY_CONFIGS)
# Families that are data alone: their exactness is tested, not every part of the product with each of them.
MORE_FAMILY_CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "gemma": lambda: GemmaConfig(**TWO_LAYERS),
    "granite": lambda: GraniteConfig(
        **TWO_LAYERS,
        attention_bias=True,
        embedding_multiplier=3.0,
        logits_scaling=2.5,
        residual_multiplier=0.4,
        attention_multiplier=0.2,
    ),
    "olmo2": lambda: Olmo2Config(**TWO_LAYERS),
    "glm4": lambda: Glm4Config(**TWO_LAYERS, attention_bias=True, rope_parameters=dict(HALF_ROPE)),
    "starcoder2": lambda: Starcoder2Config(**TWO_LAYERS, sliding_window=24),
    "phi": lambda: PhiConfig(**TWO_LAYERS, rope_parameters=dict(HALF_ROPE), qk_layernorm=True),
    "qwen3-moe": lambda: Qwen3MoeConfig(
        **TWO_LAYERS, num_experts=8, num_experts_per_tok=4, moe_intermediate_size=32, norm_topk_prob=True
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB,
        n_positions=1024,
        n_embd=64,
        n_layer=2,
        n_head=4,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        scale_attn_by_inverse_layer_idx=True,
    ),
    "gpt-neox": lambda: GPTNeoXConfig(**ALL_HEADS, rope_parameters=dict(HALF_ROPE)),
    "gpt-neox-serial": lambda: GPTNeoXConfig(
        **ALL_HEADS, rope_parameters=dict(HALF_ROPE), use_parallel_residual=False, attention_bias=False
    ),
}
MORE_FAMILY_NAMES = tuple(MORE_FAMILY_CONFIGS)


def config_of(family: str) -> PretrainedConfig:
    """The config of a family of either table."""
    return (FAMILY_CONFIGS | MORE_FAMILY_CONFIGS)[family]()


def save_base(folder: Path, family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Path:
    """A random base of the family on disk; biases and norms are random too, so that dropping one shows."""
    torch.manual_seed(seed)
    config = config_of(family)
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
    model.to(dtype).save_pretrained(folder)
    return folder


def linear_names(model: torch.nn.Module) -> list[str]:
    """Distinct last parts of the decoder layers' linear modules."""
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and ("layers." in name or ".h." in name)
    }
    return sorted(names)


def adapter_configs(names: list[str]) -> dict[str, LoraConfig]:
    """One of each kind we serve. names: the base's linear layers."""
    first, last = names[0], names[-1]
    return {
        "plain": LoraConfig(r=4, lora_alpha=8, target_modules=names),
        "rslora": LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules=names),
        "patterns": LoraConfig(
            r=4, lora_alpha=8, target_modules=names, rank_pattern={first: 2, last: 7}, alpha_pattern={last: 5}
        ),
        "subset": LoraConfig(r=3, lora_alpha=6, target_modules=[first]),
        "one": LoraConfig(r=1, lora_alpha=1, target_modules=names),
        "rank16": LoraConfig(r=16, lora_alpha=32, target_modules=names),
    }


def save_adapter(base: Path, folder: Path, config: LoraConfig, *, seed: int, scale: float = 0.1) -> Path:
    """A PEFT adapter with random A and B, saved by PEFT."""
    model = AutoModelForCausalLM.from_pretrained(base, local_files_only=True)
    peft_model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    peft_model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def save_adapters(base: Path, folder: Path, *, scale: float = 0.1) -> dict[str, Path]:
    """Every kind of `adapter_configs`, by kind."""
    model = AutoModelForCausalLM.from_pretrained(base, local_files_only=True)
    configs = adapter_configs(linear_names(model))
    return {
        kind: save_adapter(base, folder / kind, config, seed=seed, scale=scale)
        for seed, (kind, config) in enumerate(configs.items())
    }


def peft_model(
    base: Path, adapter: Path | None, *, dtype: torch.dtype = torch.float32, nf4: Any = None
) -> torch.nn.Module:
    """The oracle: transformers, with PEFT's one adapter or none. nf4: a quantization config for the base."""
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, quantization_config=nf4, local_files_only=True, attn_implementation="eager"
    )
    if nf4 is not None:
        keep_nf4_weights_plain(model)
    return (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()
