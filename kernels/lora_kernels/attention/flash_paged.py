"""Paged attention: online softmax over a block table. Knows pointers; `triton_launch.py` decides the launches.

Legend: M query rows (tokens x the query heads of one key head), N keys, D head size. Caches are contiguous
[blocks, kv_heads, PAGE, D]. A long context may be cut into splits, whose results a second kernel joins in one fixed
order. Sources: FlashAttention-2 (arXiv 2307.08691), Flash-Decoding (pytorch.org/blog/flash-decoding).
"""

# ruff: noqa: PLR0917  (a kernel is launched without keywords)

from __future__ import annotations

import triton.language as tl

from lora_kernels.triton_common.jit import device_function, dot, kernel, rounded

LOG2_E = tl.constexpr(1.4426950408889634)


@kernel()
def store_kv_kernel(
    key_cache_ptr: tl.tensor,
    value_cache_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    k_head_stride: tl.tensor,
    k_token_stride: tl.tensor,
    v_head_stride: tl.tensor,
    v_token_stride: tl.tensor,
    KV_HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
) -> None:
    """Grid (tokens): one token's keys and values of all heads. A negative slot marks padding."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot < 0:
        return
    head = tl.arange(0, BLOCK_H)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    wanted = (head < KV_HEADS) & (d < HEAD_DIM)
    cells = (((slot // PAGE) * KV_HEADS + head) * PAGE + slot % PAGE) * HEAD_DIM + d
    k = tl.load(k_ptr + head.to(tl.int64) * k_head_stride + token * k_token_stride + d, mask=wanted)
    v = tl.load(v_ptr + head.to(tl.int64) * v_head_stride + token * v_token_stride + d, mask=wanted)
    tl.store(key_cache_ptr + cells, k, mask=wanted)
    tl.store(value_cache_ptr + cells, v, mask=wanted)


@device_function
def _scores(
    q: tl.tensor,
    k: tl.tensor,
    n: tl.tensor,
    n_last: tl.tensor,
    positions: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    softcap: tl.tensor,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
) -> tl.tensor:
    """In units of log2, -inf where a query does not see the key. [M, N]"""
    s = dot(q, k, tl.zeros((q.shape[0], k.shape[1]), dtype=tl.float32)) * scale
    if HAS_SOFTCAP:
        s = softcap * (2.0 * tl.sigmoid(2.0 * s / softcap) - 1.0)  # tanh
    visible = (n[None, :] <= positions[:, None]) & (n[None, :] < n_last)
    if HAS_WINDOW:
        visible = visible & (positions[:, None] - n[None, :] < window)
    return tl.where(visible, s * LOG2_E, float("-inf"))


@device_function
def _split_keys(
    first_position: tl.tensor,
    end: tl.tensor,
    window: tl.tensor,
    num_splits: tl.tensor,
    min_keys: tl.tensor,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The first key that any of the tile's tokens sees, the keys of each split, and how many splits have any.

    A tile has as many splits as its own keys fill; a short sequence beside a long one has one."""
    begin = first_position * 0
    if HAS_WINDOW:
        begin = tl.maximum(first_position - window + 1, 0) // BLOCK_N * BLOCK_N
    per_split = tl.cdiv(tl.maximum(tl.cdiv(end - begin, num_splits), min_keys), BLOCK_N) * BLOCK_N
    return begin, per_split, tl.cdiv(end - begin, per_split)


@kernel("window", "num_splits", "min_keys")
def attention_kernel(
    out_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    q_ptr: tl.tensor,
    key_cache_ptr: tl.tensor,
    value_cache_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    records_ptr: tl.tensor,
    num_splits: tl.tensor,
    min_keys: tl.tensor,
    q_head_stride: tl.tensor,
    q_token_stride: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    softcap: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    """Grid (kv_heads * splits, tiles). A split has min_keys keys or more. SPLIT: a tile of more than one split writes
    each split's rows and their log2 sums; any other writes the result."""
    record = records_ptr + tl.program_id(1) * 4
    count = tl.load(record + 2)
    if count == 0:
        return
    kv_head = tl.program_id(0) % KV_HEADS
    split = tl.program_id(0) // KV_HEADS
    first_position = tl.load(record + 3)
    begin, per_split, used = _split_keys(
        first_position, first_position + count, window, num_splits, min_keys, BLOCK_N, HAS_WINDOW
    )
    if split >= used:
        return
    table = tables_ptr + tl.load(record)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    has_row = (m // GROUP) < count
    token = (tl.load(record + 1) + m // GROUP).to(tl.int64)
    head = kv_head * GROUP + m % GROUP
    positions = first_position + m // GROUP
    q_rows = q_ptr + head.to(tl.int64) * q_head_stride + token * q_token_stride
    q = tl.load(q_rows[:, None] + d[None, :], mask=has_row[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    n_first = begin + split * per_split
    n_last = tl.minimum(n_first + per_split, first_position + count)
    highest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for n0 in range(n_first, n_last, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        has_key = n < n_last
        block = tl.load(table + n // PAGE, mask=has_key, other=0).to(tl.int64)
        cells = ((block * KV_HEADS + kv_head) * PAGE + n % PAGE) * HEAD_DIM
        k_mask = has_key[None, :] & (d < HEAD_DIM)[:, None]
        k = tl.load(key_cache_ptr + cells[None, :] + d[:, None], mask=k_mask, other=0.0)
        s = _scores(q, k, n, n_last, positions, scale, window, softcap, HAS_WINDOW, HAS_SOFTCAP)
        new_highest = tl.maximum(highest, tl.max(s, axis=1))
        origin = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # a row without a visible key so far
        p = tl.exp2(s - origin[:, None])
        shrunk = tl.exp2(highest - origin)
        total = total * shrunk + tl.sum(p, axis=1)
        v_mask = has_key[:, None] & (d < HEAD_DIM)[None, :]
        v = tl.load(value_cache_ptr + cells[:, None] + d[None, :], mask=v_mask, other=0.0)
        acc = dot(rounded(p, v.dtype), v, acc * shrunk[:, None])
        highest = new_highest
    wanted = has_row[:, None] & (d < HEAD_DIM)[None, :]
    is_whole = (m * 0 + used) == 1  # [M], like the other masks
    result = acc / tl.where((total == 0.0) & ~is_whole, 1.0, total)[:, None]  # NaN for a row of -inf alone
    if SPLIT:
        tile = (split * tl.num_programs(1) + tl.program_id(1)) * KV_HEADS + kv_head
        part = tile.to(tl.int64) * BLOCK_M + m
        tl.store(parts_ptr + part[:, None] * HEAD_DIM + d[None, :], result, mask=wanted & ~is_whole[:, None])
        tl.store(sums_ptr + part, highest + tl.log2(tl.where(total == 0.0, 1.0, total)), mask=has_row & ~is_whole)
    row = token * (KV_HEADS * GROUP) + head
    tl.store(out_ptr + row[:, None] * HEAD_DIM + d[None, :], rounded(result, q.dtype), mask=wanted & is_whole[:, None])


@kernel("window", "num_splits", "min_keys")
def join_splits_kernel(
    out_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    records_ptr: tl.tensor,
    num_splits: tl.tensor,
    min_keys: tl.tensor,
    window: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
) -> None:
    """Grid (BLOCK_M, kv_heads, tiles): one row of all splits' results, weighted by their sums. A tile of one split is
    left alone: it has its result."""
    m, kv_head, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    record = records_ptr + tile * 4
    count = tl.load(record + 2)
    if m // GROUP >= count:
        return
    first_position = tl.load(record + 3)
    _, _, used = _split_keys(first_position, first_position + count, window, num_splits, min_keys, BLOCK_N, HAS_WINDOW)
    if used == 1:
        return
    s = tl.arange(0, MAX_SPLITS)
    d = tl.arange(0, BLOCK_D)
    has_split = s < used
    rows = ((s.to(tl.int64) * tl.num_programs(2) + tile) * KV_HEADS + kv_head) * BLOCK_M + m
    sums = tl.load(sums_ptr + rows, mask=has_split, other=float("-inf"))
    weights = tl.exp2(sums - tl.max(sums, axis=0))
    wanted = has_split[:, None] & (d < HEAD_DIM)[None, :]
    parts = tl.load(parts_ptr + rows[:, None] * HEAD_DIM + d[None, :], mask=wanted, other=0.0)
    result = tl.sum(parts * weights[:, None], axis=0) / tl.sum(weights, axis=0)
    token = (tl.load(record + 1) + m // GROUP).to(tl.int64)
    cells = out_ptr + (token * KV_HEADS * GROUP + kv_head * GROUP + m % GROUP) * HEAD_DIM + d
    tl.store(cells, rounded(result, out_ptr.dtype.element_ty), mask=d < HEAD_DIM)
