"""Launchers of paged attention: store this step's keys and values, then attend from every token over its own sequence.

Legend: T tokens of the step, D head size, cache [blocks, kv_heads, block_size, D] per layer for keys and for values.
"""

from __future__ import annotations

import ctypes

import torch
from torch.nn.functional import scaled_dot_product_attention

from lora_kernels.attention.batch import AttentionRule, LayerCache, PagedBatch, Rotation
from lora_kernels.attention.reference import attention_reference
from lora_kernels.native.bindings import NativeOps, native_ops
from lora_kernels.triton_common.available import on_triton

NATIVE_MAX_HEAD_DIM = 256


def paged_attention(
    q_HTD: torch.Tensor,
    k_HTD: torch.Tensor,
    v_HTD: torch.Tensor,
    cache: LayerCache,
    *,
    batch: PagedBatch,
    rule: AttentionRule,
    rotation: Rotation | None = None,
) -> torch.Tensor:
    """Store k and v, then causal attention of every token over its own sequence.

    q_HTD: [q_heads, T, D]; k_HTD, v_HTD: [kv_heads, T, D] (any strides, D contiguous). rotation: applied to q, in
    place, and to what is stored of k; only if `rotates_while_storing` holds. Returns [T, q_heads, D].
    """
    if on_triton(q_HTD, "attention"):
        from lora_kernels.attention.triton_launch import paged_attention_triton

        return paged_attention_triton(q_HTD, k_HTD, v_HTD, cache, batch=batch, rule=rule, rotation=rotation)
    assert rotation is None, "only Triton's store rotates"
    q_heads, num_tokens, head_dim = q_HTD.shape
    out_THD = q_HTD.new_empty(num_tokens, q_heads, head_dim)
    native = _native_for(q_HTD)
    if native is None:
        _store_in_torch(k_HTD, v_HTD, cache, batch)
        to_library = list(range(batch.num_sequences))
    else:
        _run_native(native, out_THD, (q_HTD, k_HTD, v_HTD), cache, batch=batch, rule=rule)
        to_library = [] if native.takes_prompts else batch.prompt_split(takes_prompts=False).sequences
    for sequence in to_library:
        first, last = (int(bound) for bound in batch.query_starts[sequence : sequence + 2])
        out_THD[first:last] = _attend_one(q_HTD[:, first:last], cache, batch=batch, sequence=sequence, rule=rule)
    return out_THD


def rotates_while_storing(q_HTD: torch.Tensor, k_HTD: torch.Tensor, cos_TR: torch.Tensor) -> bool:
    """Whether the store of keys and values can apply the rotary embedding on its way."""
    is_ready = q_HTD.stride(2) == k_HTD.stride(2) == 1 and q_HTD.dtype is k_HTD.dtype is cos_TR.dtype
    return is_ready and on_triton(q_HTD, "attention") and on_triton(q_HTD, "elementwise")


def _native_for(q_HTD: torch.Tensor) -> NativeOps | None:
    head_dim = q_HTD.shape[2]
    if not q_HTD.is_cpu or head_dim % 16 or head_dim > NATIVE_MAX_HEAD_DIM:
        return None
    return native_ops(q_HTD.dtype)


def _run_native(
    native: NativeOps,
    out_THD: torch.Tensor,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cache: LayerCache,
    *,
    batch: PagedBatch,
    rule: AttentionRule,
) -> None:
    q, k, v = qkv
    takes_prompts = bool(native.takes_prompts)
    args_of_batch = batch.native_args(q.shape[0], k.shape[0], q.shape[2], rule, takes_prompts=takes_prompts)
    args = ctypes.addressof(args_of_batch)
    caches = (cache.keys.data_ptr(), cache.values.data_ptr())
    strides = (k.stride(1), k.stride(0), v.stride(1), v.stride(0))
    native.store_kv(args, *caches, k.data_ptr(), v.data_ptr(), *strides, batch.slot_mapping_T.data_ptr())
    if args_of_batch.num_listed or takes_prompts:
        native.paged_attention(args, out_THD.data_ptr(), q.data_ptr(), q.stride(1), q.stride(0), *caches)


def _store_in_torch(k_HTD: torch.Tensor, v_HTD: torch.Tensor, cache: LayerCache, batch: PagedBatch) -> None:
    blocks, offsets = batch.slot_mapping_T // batch.block_size, batch.slot_mapping_T % batch.block_size
    cache.keys[blocks, :, offsets] = k_HTD.transpose(0, 1)
    cache.values[blocks, :, offsets] = v_HTD.transpose(0, 1)


def _attend_one(
    query_HTD: torch.Tensor, cache: LayerCache, *, batch: PagedBatch, sequence: int, rule: AttentionRule
) -> torch.Tensor:
    """One sequence's tokens over its gathered cache, through the library. Returns [T, q_heads, D]."""
    context = int(batch.context_lens[sequence])
    key_HCD, value_HCD = (_gathered(tensor, batch, sequence, context) for tensor in (cache.keys, cache.values))
    if rule.softcap > 0:
        return _as_specified(query_HTD, key_HCD, value_HCD, rule)
    mask = _mask(query_HTD.shape[1], context, rule.window, query_HTD.device)
    out_1HTD = scaled_dot_product_attention(
        query_HTD[None],
        key_HCD[None],
        value_HCD[None],
        attn_mask=mask,
        is_causal=mask is None and context > 1,
        scale=rule.scale,
        enable_gqa=key_HCD.shape[0] != query_HTD.shape[0],
    )
    if not out_1HTD.any(dim=-1).all():  # the library answers 0 where all scores are -infinity, which is no number
        return _as_specified(query_HTD, key_HCD, value_HCD, rule)
    return out_1HTD[0].transpose(0, 1)


def _as_specified(
    query_HTD: torch.Tensor, key_HCD: torch.Tensor, value_HCD: torch.Tensor, rule: AttentionRule
) -> torch.Tensor:
    q, k, v = (tensor.transpose(0, 1) for tensor in (query_HTD, key_HCD, value_HCD))
    result = attention_reference(q, k, v, scale=rule.scale, window=rule.window, softcap=rule.softcap)
    return result.to(query_HTD.dtype)


def _gathered(cache: torch.Tensor, batch: PagedBatch, sequence: int, context: int) -> torch.Tensor:
    """The sequence's own cached rows, [kv_heads, context, D]. Old content of a recycled block is never read."""
    blocks = batch.block_tables[sequence, : -(-context // batch.block_size)]
    picked = cache[torch.from_numpy(blocks).long().to(cache.device)]
    return picked.transpose(0, 1).reshape(cache.shape[1], -1, cache.shape[3])[:, :context]


def _mask(num_queries: int, context: int, window: int, device: torch.device) -> torch.Tensor | None:
    """None if plain causal masking over equal lengths is enough."""
    if num_queries == context and not 0 < window < context:
        return None
    distance = torch.arange(context - num_queries, context, device=device)[:, None] - torch.arange(
        context, device=device
    )
    visible = distance >= 0
    return visible & (distance < window) if window > 0 else visible
