"""What a GGUF file of the llama architecture says about its model, in transformers' words. Knows names, no values.

What llama.cpp would compute otherwise than transformers' LlamaForCausalLM is refused by its key, never dropped: scaled
or partial rotary embeddings, experts, windows, biases.
"""

from __future__ import annotations

import re
from typing import Any

from adapters_store.base.converted.header import Header
from adapters_store.parsing.strict_json import shown

ARCHITECTURE = "llama"
TOKENS = "tokenizer.ggml.tokens"
MAX_LAYERS = 1024
_HEADS, _KV_HEADS = "llama.attention.head_count", "llama.attention.head_count_kv"
_CONFIG = {
    "llama.context_length": "max_position_embeddings",
    "llama.embedding_length": "hidden_size",
    "llama.block_count": "num_hidden_layers",
    "llama.feed_forward_length": "intermediate_size",
    _HEADS: "num_attention_heads",
    _KV_HEADS: "num_key_value_heads",
}
_EPS, _THETA = "llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base"
_HEAD_SIZES = ("llama.rope.dimension_count", "llama.attention.key_length", "llama.attention.value_length")
_KNOWN = {*_CONFIG, _EPS, _THETA, *_HEAD_SIZES, "llama.vocab_size", "llama.rope.scaling.type"}
_IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OF_LAYER = re.compile(rf"blk\.(0|[1-9]\d{{0,3}})\.({'|'.join(_INNER)})\.weight")
_ROPE_FACTORS = "rope_freqs.weight"


def refuse_other_kinds(header: Header) -> None:
    """Raises UnsupportedBase for another architecture, and for a file that is not one whole model."""
    found = header.metadata.get("general.architecture")
    if found != ARCHITECTURE:
        raise header.refuse(f"a GGUF file of the architecture {shown(found)}; only {ARCHITECTURE!r} is read from GGUF")
    kind = header.metadata.get("general.type", "model")
    if kind != "model":
        raise header.refuse(f"general.type is {shown(kind)}, not 'model'; a base is needed here")
    parts = header.metadata.get("split.count", 0)
    if parts not in (0, 1):
        raise header.refuse(f"one of {shown(parts)} parts; join them with `llama-gguf-split --merge`")


def config_of(header: Header) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM. Raises UnsupportedBase."""
    given = header.metadata
    for key in given:
        if key.startswith(f"{ARCHITECTURE}.") and key not in _KNOWN:
            raise header.refuse(f"{shown(key)} is {shown(given[key], 40)}, which is not read from GGUF")
    scaling = given.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise header.refuse(f"llama.rope.scaling.type is {shown(scaling)}; scaled positions are not read from GGUF")
    given = {_KV_HEADS: given.get(_HEADS), **given}
    config: dict[str, Any] = {name: _whole(header, given, key) for key, name in _CONFIG.items()}
    if config["num_hidden_layers"] > MAX_LAYERS:
        raise header.refuse(f"llama.block_count is {config['num_hidden_layers']}, at most {MAX_LAYERS} are read")
    config["head_dim"] = _head_size(header, config)
    ids = {name: given.get(f"tokenizer.ggml.{key}_token_id") for key, name in _IDS.items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        **config,
        **{name: value for name, value in ids.items() if isinstance(value, int)},
        "rms_norm_eps": _real(header, _EPS, 1e-6),
        "rope_parameters": {"rope_type": "default", "rope_theta": _real(header, _THETA, 10_000.0)},
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in header.tensors),
        "vocab_size": len(tokens_of(header)),
    }


def tokens_of(header: Header) -> list[str]:
    """Raises UnsupportedBase without a vocabulary."""
    tokens = header.metadata.get(TOKENS)
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise header.refuse(f"no vocabulary in it ({TOKENS})")
    return tokens


def names_of(header: Header, config: dict[str, Any]) -> dict[str, str]:
    """A tensor's name in the file -> its name in transformers' model. Raises UnsupportedBase if one has none."""
    names = {tensor.name: _name_of(tensor.name) for tensor in header.tensors}
    unknown = sorted(name for name, found in names.items() if found is None)
    if _ROPE_FACTORS in unknown:
        reason = f"{_ROPE_FACTORS} scales its positions (Llama 3.1 and later), which is not read from GGUF"
        raise header.refuse(f"{reason}; take the repository that it was converted from")
    if unknown:
        raise header.refuse(f"the tensor {shown(unknown[0])} is none of a {ARCHITECTURE} model without biases")
    expected = 2 + (not config["tie_word_embeddings"]) + len(_INNER) * config["num_hidden_layers"]
    if len(names) != expected:
        raise header.refuse(f"{len(names)} tensors, {expected} are needed for llama.block_count")
    return {name: found for name, found in names.items() if found is not None}


def _name_of(name: str) -> str | None:
    inner = _OF_LAYER.fullmatch(name)
    return f"model.layers.{inner[1]}.{_INNER[inner[2]]}.weight" if inner else _OUTER.get(name)


def _head_size(header: Header, config: dict[str, Any]) -> int:
    """All three keys may be missing; those that are there must agree: no part of a head goes without its position."""
    sizes = {key: header.metadata[key] for key in _HEAD_SIZES if key in header.metadata}
    own = sizes.get("llama.attention.key_length", config["hidden_size"] // config["num_attention_heads"])
    for key, size in sizes.items():
        if not isinstance(size, int) or size != own or size < 1:
            raise header.refuse(f"{key} is {shown(size)}, but heads have {shown(own)}")
    return int(own)


def _whole(header: Header, given: dict[str, Any], key: str) -> int:
    value = given.get(key)
    if not isinstance(value, int) or not 1 <= value < 1 << 24:
        raise header.refuse(f"{key} must be a whole number from 1 to {(1 << 24) - 1}, got {shown(value)}")
    return value


def _real(header: Header, key: str, default: float) -> float:
    value = header.metadata.get(key, default)
    if not isinstance(value, float | int) or not 0 < value < 1e12:
        raise header.refuse(f"{key} must be a number above 0, got {shown(value)}")
    return float(value)
