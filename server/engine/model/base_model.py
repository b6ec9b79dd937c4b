"""Loads the frozen base with its adapters' hooks in place. Knows devices and precisions; knows no requests."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from adapters_store.base.description import BaseDescription
from adapters_store.base.families import UnsupportedBase, family_of
from adapters_store.base.files import DTYPES, describe_base, load_config
from adapters_store.base.nf4 import is_stored_in_nf4
from adapters_store.base.row_rope import RowRope, choose_rope_by_row, rope_switches
from adapters_store.base.weights import load_causal
from server.engine.model.attention_hook import register_paged_attention
from server.engine.model.lora_layers import AdapterEmbedding, LoraState, MakeGroup, wrap_model


@dataclass(frozen=True)
class BaseModel:
    """The resident base: the wrapped transformers model, and the state its layers share.

    rope: for a rotation that depends on a sequence's length (LongRoPE). The runner gives it each row's length before
    every forward.
    """

    model: torch.nn.Module
    config: PretrainedConfig
    description: BaseDescription
    lora: LoraState
    device: torch.device
    dtype: torch.dtype
    quantized: bool
    rope: RowRope | None = None

    @property
    def rope_switches(self) -> tuple[int, ...]:
        """Lengths beyond which a sequence's keys change, rising."""
        return rope_switches(self.config)

    @property
    def max_model_len(self) -> int:
        return int(self.config.max_position_embeddings)

    @property
    def num_embeddings(self) -> int:
        """Token ids that have an embedding row."""
        return int(self.model.get_input_embeddings().num_embeddings)  # type: ignore[operator]

    @property
    def num_kv_heads(self) -> int:
        return int(getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads)

    @property
    def head_dim(self) -> int:
        own = getattr(self.config, "head_dim", None)
        return int(own or self.config.hidden_size // self.config.num_attention_heads)


def pick_device(wanted: str) -> torch.device:
    """`auto`: the GPU if there is one. Asking for cuda without a GPU is an error, not a silent CPU."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UnsupportedBase(
            "--device cuda: torch sees no CUDA device; use --device cpu or install a CUDA build of torch"
        )
    return torch.device("cuda" if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()) else "cpu")


def load_base(
    path: Path, *, dtype: str = "auto", quantize: str | None = None, device: str = "auto", name: str | None = None
) -> BaseModel:
    """Load a local folder. quantize "nf4": bitsandbytes NF4 with double quantisation; a base stored in NF4 is
    loaded unchanged. Raises UnsupportedBase."""
    description = describe_base(path, dtype=dtype, name=name)
    target, torch_dtype = pick_device(device), DTYPES[description.dtype]
    attention = register_paged_attention()
    model = load_causal(path, torch_dtype, target, nf4=quantize == "nf4", attn_implementation=attention)
    model.eval().requires_grad_(False)
    description = replace(description, nf4=quantize == "nf4" and not is_stored_in_nf4(load_config(path)))
    return wrap_base(model, description, target, torch_dtype)


def wrap_base(
    model: Any,
    description: BaseDescription,
    device: torch.device,
    dtype: torch.dtype,
    *,
    layers: BaseDescription | None = None,
    make_group: MakeGroup | None = None,
) -> BaseModel:
    """Put the adapters' hooks into a loaded model. layers: the shapes of its layers, if they are not the base's."""
    lora = wrap_model(model, layers or description, make_group)
    embedding = family_of(description.architecture).embedding
    model.set_submodule(embedding, AdapterEmbedding(model.get_submodule(embedding), lora))
    quantized = bool(getattr(model, "is_loaded_in_4bit", False))
    return BaseModel(model, model.config, description, lora, device, dtype, quantized, choose_rope_by_row(model))
