"""Adapters on experts from before transformers made parameters of them: each expert has layers of its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoConfig

from adapters_store.parsing.adapter_files import WEIGHTS_FILE

PREFIX = "base_model.model."
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
OF_EXPERTS = ["gate_proj", "up_proj", "down_proj"]


def save_old_experts(base: Path, folder: Path, *, seed: int, **fields: Any) -> Path:
    """Random A and B for q_proj, the routers and every layer of every expert, where `target_modules` names them."""
    config = LoraConfig(**({"task_type": "CAUSAL_LM", "inference_mode": True} | fields))
    config.save_pretrained(folder)
    shape = AutoConfig.from_pretrained(base, local_files_only=True)
    hidden, inner = shape.hidden_size, shape.moe_intermediate_size
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}

    def add(path: str, inputs: int, outputs: int) -> None:
        name, targets = path.rpartition(".")[2], config.target_modules
        if re.fullmatch(targets, path) if isinstance(targets, str) else name in targets:
            rank = config.rank_pattern.get(name, config.r)
            for side, size in (("A", (rank, inputs)), ("B", (outputs, rank))):
                tensors[f"{PREFIX}{path}.lora_{side}.weight"] = torch.randn(size, generator=generator) * 0.1

    for layer in range(shape.num_hidden_layers):
        add(f"model.layers.{layer}.self_attn.q_proj", hidden, shape.num_attention_heads * shape.head_dim)
        add(f"model.layers.{layer}.mlp.gate", hidden, shape.num_experts)
        for expert in range(shape.num_experts):
            for name in OF_EXPERTS:
                sizes = (inner, hidden) if name == "down_proj" else (hidden, inner)
                add(f"model.layers.{layer}.mlp.experts.{expert}.{name}", *sizes)
    save_file(tensors, folder / WEIGHTS_FILE)
    return folder
