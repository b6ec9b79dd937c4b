"""An adapter as PEFT saves it, with random values in all that it trains."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from adapters_store.format.chat_fields import DTYPE_FIELD
from adapters_store.parsing.adapter_files import CONFIG_FILE


def save(base: Path, folder: Path, config: LoraConfig, seed: int) -> Path:
    """Random A, B and rows of its own, and magnitudes a quarter off the norms at most; the whole base weights beside
    LoRA on the embedding are not written. Returns the folder."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, local_files_only=True), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(0.75 + 0.5 * torch.rand(parameter.shape, generator=generator))
            elif "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def as_int8(folder: Path) -> Path:
    """The same adapter, opted in."""
    config = folder / CONFIG_FILE
    config.write_text(json.dumps(json.loads(config.read_text()) | {DTYPE_FIELD: "int8"}))
    return folder
