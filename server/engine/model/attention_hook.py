"""Gives transformers' models our paged attention through its attention interface. Knows one layer at a time."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface

from adapters_store.base.families import UnsupportedBase
from lora_kernels.attention.batch import AttentionRule, LayerCache, PagedBatch
from lora_kernels.attention.launcher import paged_attention
from server.engine.model.rope import take_rotation

IMPLEMENTATION = "multilora_paged"


def _paged_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    paged_batch: PagedBatch,
    kv_caches: list[LayerCache],
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query: [1, q_heads, T, D], key and value: [1, kv_heads, T, D]; returns [1, T, q_heads, D].

    The batch and the caches travel as keywords of `model(...)`; the mask is always None (the paged batch replaces it).
    Raises UnsupportedBase for a base whose layers disagree with its config.json.
    """
    rule = AttentionRule(scale=scaling, window=sliding_window or 0, softcap=softcap or 0.0)
    cache = kv_caches[module.layer_idx]  # type: ignore[index]
    if key.shape[1::2] != cache.keys.shape[1::2]:  # a kernel would write past the cache
        wanted, given = tuple(cache.keys.shape[1::2]), tuple(key.shape[1::2])
        message = f"config.json says {wanted} for heads and size of keys, {type(module).__name__} makes {given}"
        raise UnsupportedBase(message)
    rotation = take_rotation(module, query, key)
    out = paged_attention(query[0], key[0], value[0], cache, batch=paged_batch, rule=rule, rotation=rotation)
    return out[None], None


def register_paged_attention() -> str:
    """Register the implementation with transformers and return its name. Calling it twice is harmless."""
    AttentionInterface.register(IMPLEMENTATION, _paged_attention_forward)
    return IMPLEMENTATION
