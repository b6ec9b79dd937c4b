"""A tiny base and adapter files for it, sound or hostile, written without the code under test."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adapters_store.base.description import BaseDescription, LinearShape

HIDDEN, INTERMEDIATE, KEY_VALUE, NUM_LAYERS = 32, 48, 16, 2
LAYER_SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, KEY_VALUE),
    "self_attn.v_proj": (HIDDEN, KEY_VALUE),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INTERMEDIATE),
    "mlp.up_proj": (HIDDEN, INTERMEDIATE),
    "mlp.down_proj": (INTERMEDIATE, HIDDEN),
}
INPUT_GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
PREFIX = "base_model.model."

Tensors = dict[str, np.ndarray[Any, Any]]


def tiny_base(*, dtype: str = "float32", digest: str = "sha256:" + "b" * 64) -> BaseDescription:
    """The linear layers of a two-layer Llama (the lm_head left out)."""
    layers = [f"model.layers.{layer}." for layer in range(NUM_LAYERS)]
    modules = {layer + name: LinearShape(*shape) for layer in layers for name, shape in LAYER_SHAPES.items()}
    groups = tuple(tuple(layer + name for name in group) for layer in layers for group in INPUT_GROUPS)
    return BaseDescription(digest, "tiny", "LlamaForCausalLM", dtype, modules, groups)


def config_bytes(**changes: object) -> bytes:
    """An adapter_config.json as PEFT 0.21 writes it, r 4, alpha 8, on q_proj and v_proj; `changes` replace fields."""
    body: dict[str, object] = dict(PEFT_DEFAULTS)
    body.update(changes)
    return json.dumps(body, indent=2, sort_keys=True).encode()


PEFT_DEFAULTS: Mapping[str, object] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": "somewhere/else",
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.05,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 4,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["q_proj", "v_proj"],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}


def lora_tensors(
    base: BaseDescription, *, ends: tuple[str, ...] = ("q_proj", "v_proj"), rank: int = 4, seed: int = 0
) -> Tensors:
    """Random float32 A and B for every module of the base whose name ends so."""
    random = np.random.default_rng(seed)
    tensors: Tensors = {}
    for name, shape in base.modules.items():
        if name.endswith(ends):
            tensors[f"{PREFIX}{name}.lora_A.weight"] = random.standard_normal((rank, shape.in_features), np.float32)
            tensors[f"{PREFIX}{name}.lora_B.weight"] = random.standard_normal((shape.out_features, rank), np.float32)
    return tensors


_DTYPES = {"float32": "F32", "float16": "F16", "uint16": "BF16", "float64": "F64", "int32": "I32"}


def header_of(tensors: Tensors) -> dict[str, Any]:
    """The safetensors header of these tensors in this order; uint16 arrays stand for bfloat16."""
    header: dict[str, Any] = {}
    position = 0
    for name, array in tensors.items():
        end = position + array.nbytes
        header[name] = {"dtype": _DTYPES[array.dtype.name], "shape": list(array.shape), "data_offsets": [position, end]}
        position = end
    return header


def data_of(tensors: Tensors) -> bytes:
    return b"".join(array.tobytes() for array in tensors.values())


def file_bytes(header: Mapping[str, Any] | bytes, data: bytes) -> bytes:
    """A .safetensors file of any header, also one that no library would write."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def safetensors_bytes(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> bytes:
    header = {"__metadata__": dict(metadata or {"format": "pt"}), **header_of(tensors)}
    return file_bytes(header, data_of(tensors))


def write(path: Path, data: bytes) -> Path:
    path.unlink(missing_ok=True)  # ext4 flushes a file that is overwritten, and a thousand of those take seconds
    path.write_bytes(data)
    return path
