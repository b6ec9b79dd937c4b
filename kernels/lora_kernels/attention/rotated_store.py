"""Rotary embedding and the store of keys and values in one pass: q in place, k and v to their slots of the cache.

Legend: T tokens, D head size, R rotated elements of a head (2 HALF). Rounds where transformers' chain of operations
does (RoFormer, arXiv 2104.09864).
"""

# ruff: noqa: PLR0917  (a kernel is launched without keywords)

from __future__ import annotations

import triton.language as tl

from lora_kernels.triton_common.jit import device_function, kernel, rounded


@device_function
def _rotated(low: tl.tensor, high: tl.tensor, cosines: tl.tensor, sines: tl.tensor, OF_HIGH: tl.constexpr) -> tl.tensor:
    """One half of x cos + rotate_half(x) sin; cosines and sines are that half's, float32."""
    dtype = low.dtype
    low, high = low.to(tl.float32), high.to(tl.float32)
    if OF_HIGH:
        result = rounded(high * cosines, dtype).to(tl.float32) + rounded(low * sines, dtype).to(tl.float32)
    else:
        result = rounded(low * cosines, dtype).to(tl.float32) - rounded(high * sines, dtype).to(tl.float32)
    return rounded(result, dtype)


@kernel()
def rotated_store_kernel(
    key_cache_ptr: tl.tensor,
    value_cache_ptr: tl.tensor,
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    q_head_stride: tl.tensor,
    q_token_stride: tl.tensor,
    k_head_stride: tl.tensor,
    k_token_stride: tl.tensor,
    v_head_stride: tl.tensor,
    v_token_stride: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PAGE: tl.constexpr,
) -> None:
    """Grid (tokens, kv_heads): a key head, its value, and the query heads that share it. A negative slot marks padding.

    cos and sin are contiguous [T, 2 HALF]. What lies beyond 2 HALF is stored as it is.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot < 0:
        return
    h = tl.arange(0, BLOCK_H)
    is_half = h < HALF
    angles = token * (2 * HALF) + h
    low_cos = tl.load(cos_ptr + angles, mask=is_half, other=0.0).to(tl.float32)
    high_cos = tl.load(cos_ptr + angles + HALF, mask=is_half, other=0.0).to(tl.float32)
    low_sin = tl.load(sin_ptr + angles, mask=is_half, other=0.0).to(tl.float32)
    high_sin = tl.load(sin_ptr + angles + HALF, mask=is_half, other=0.0).to(tl.float32)

    g = tl.arange(0, BLOCK_G)
    queries = q_ptr + (head * GROUP + g)[:, None] * q_head_stride + token * q_token_stride + h[None, :]
    wanted = (g < GROUP)[:, None] & is_half[None, :]
    low = tl.load(queries, mask=wanted, other=0.0)
    high = tl.load(queries + HALF, mask=wanted, other=0.0)
    tl.store(queries, _rotated(low, high, low_cos[None, :], low_sin[None, :], False), mask=wanted)
    tl.store(queries + HALF, _rotated(low, high, high_cos[None, :], high_sin[None, :], True), mask=wanted)

    cell = (((slot // PAGE) * KV_HEADS + head) * PAGE + slot % PAGE) * HEAD_DIM
    keys = k_ptr + head * k_head_stride + token * k_token_stride
    low = tl.load(keys + h, mask=is_half, other=0.0)
    high = tl.load(keys + HALF + h, mask=is_half, other=0.0)
    tl.store(key_cache_ptr + cell + h, _rotated(low, high, low_cos, low_sin, False), mask=is_half)
    tl.store(key_cache_ptr + cell + HALF + h, _rotated(low, high, high_cos, high_sin, True), mask=is_half)
    d = tl.arange(0, BLOCK_D)
    if 2 * HALF < HEAD_DIM:
        is_rest = (d >= 2 * HALF) & (d < HEAD_DIM)
        tl.store(key_cache_ptr + cell + d, tl.load(keys + d, mask=is_rest, other=0.0), mask=is_rest)
    values = v_ptr + head * v_head_stride + token * v_token_stride
    has_value = d < HEAD_DIM
    tl.store(value_cache_ptr + cell + d, tl.load(values + d, mask=has_value, other=0.0), mask=has_value)
