"""Shrink and expand over the arena: h = x A^T, then y += scale * h B. `triton_launch.py` decides the launches.

Legend: M rows of a tile, R ranks, K in_features, N out_features. Layouts: A is [rank, K], B is [rank, N]; h is float32
[splits, rows, members, h_rank], h_rank = 16 h_rank_blocks. Two launches: see `one_launch.py` for a single one.
OVERLAPPED (sm_90): expand starts while shrink runs, finds its adapter, loads B, then waits. Source: S-LoRA
(arXiv 2311.03285), Punica (arXiv 2310.18547).

int8_ptr, factors_ptr and bias_ptr are None, and kernels are compiled without them, if no adapter of the step is int8
or has DoRA's factors. An int8 adapter's A and B are bytes. They are widened where they are loaded, which is exact, and
its ranks' factors, float32 [rank] before A, multiply h.
"""

# ruff: noqa: PLR0917  (a kernel is launched without keywords)

from __future__ import annotations

import triton.language as tl

from lora_kernels.triton_common.jit import (
    column_block_of,
    device_function,
    dot,
    kernel,
    let_next_start,
    rounded,
    wait_for_previous,
    widened,
)

_PER_STEP = ("num_slots", "module0", "module1", "module2", "num_rows", "h_rank_blocks", "num_splits")


@device_function
def product_over_k(
    x_rows: tl.tensor,
    a_columns: tl.tensor,
    has_row: tl.tensor,
    has_rank: tl.tensor,
    k_first: tl.tensor,
    k_last: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
) -> tl.tensor:
    """x_rows [BLOCK_M, 1] and a_columns [1, BLOCK_R] point to where k is 0. Returns [BLOCK_M, BLOCK_R]."""
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k0 in range(k_first, k_last, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        if EVEN_K:
            x = tl.load(x_rows + k[None, :], mask=has_row[:, None], other=0.0)
            a = tl.load(a_columns + k[:, None], mask=has_rank[None, :], other=0.0)
        else:
            has_k = k < k_last
            x = tl.load(x_rows + k[None, :], mask=has_row[:, None] & has_k[None, :], other=0.0)
            a = tl.load(a_columns + k[:, None], mask=has_rank[None, :] & has_k[:, None], other=0.0)
        acc = dot(x, widened(a, x.dtype), acc)
    return acc


@device_function
def expanded(h: tl.tensor, b: tl.tensor, acc: tl.tensor) -> tl.tensor:
    """acc + h B. h [M, R] float32."""
    high = rounded(h, b.dtype)
    acc = dot(high, b, acc)
    if b.dtype != tl.float32:  # adds back what rounding h lost: small ranks would not average it out
        acc = dot(rounded(h - high.to(tl.float32), b.dtype), b, acc)
    return acc


@device_function
def _scaled(
    total: tl.tensor,
    arena_ptr: tl.tensor,
    factors_ptr: tl.tensor,
    bias_ptr: tl.tensor | None,
    cell: tl.tensor,
    n: tl.tensor,
    y_first: tl.tensor,
    has_column: tl.tensor,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    """factor * (total - bias) + bias where the slot has DoRA's factors for the module, else total [M, N] as it is."""
    factor_offset = tl.load(factors_ptr + cell)
    if ALIGNED:
        factor_offset = tl.multiple_of(factor_offset, 8)
    if factor_offset != 0:
        factors = (arena_ptr + factor_offset).to(tl.pointer_type(tl.float32), bitcast=True)
        factor = tl.load(factors + n, mask=has_column, other=0.0)[None, :]
        if bias_ptr is None:
            total = factor * total
        else:
            own = tl.load(bias_ptr + y_first + n, mask=has_column, other=0.0).to(tl.float32)[None, :]
            total = factor * (total - own) + own
    return total


@device_function
def _sum_of_splits(
    cells: tl.tensor, mask: tl.tensor, num_splits: tl.tensor, split_stride: tl.tensor, AT_ONCE: tl.constexpr
) -> tl.tensor:
    """The splits of h [M, R] added in one fixed order. AT_ONCE > 1: that many loads at once."""
    total = tl.zeros(cells.shape, dtype=tl.float32)
    for first in range(0, num_splits, AT_ONCE):
        if AT_ONCE == 1:
            total += tl.load(cells + first * split_stride, mask=mask, other=0.0)
        else:
            s = (first + tl.arange(0, AT_ONCE))[:, None, None]
            parts = tl.load(cells[None, :, :] + s * split_stride, mask=mask[None, :, :] & (s < num_splits), other=0.0)
            total += tl.sum(parts, axis=0)
    return total


@kernel(*_PER_STEP)
def shrink_kernel(
    h_ptr: tl.tensor,
    x_ptr: tl.tensor,
    arena_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    ranks_ptr: tl.tensor,
    int8_ptr: tl.tensor | None,
    records_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    num_slots: tl.tensor,
    module0: tl.tensor,
    module1: tl.tensor,
    module2: tl.tensor,
    in_features: tl.tensor,
    x_stride: tl.tensor,
    num_rows: tl.tensor,
    h_rank_blocks: tl.tensor,
    num_splits: tl.tensor,
    MEMBERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    ALIGNED: tl.constexpr,
    OVERLAPPED: tl.constexpr,
) -> None:
    """Grid (members * splits, tiles): one tile of rows, one member's A, one stretch of K. Neighbouring programs share
    the tile's x in L2."""
    if OVERLAPPED:
        let_next_start()
    tile = tl.program_id(1)
    count = tl.load(records_ptr + tile * 3 + 2)
    if count == 0:
        return
    member = tl.program_id(0) % MEMBERS
    split = tl.program_id(0) // MEMBERS
    slot = tl.load(records_ptr + tile * 3)
    first_row = tl.load(records_ptr + tile * 3 + 1)
    module = tl.where(member == 0, module0, tl.where(member == 1, module1, module2))
    cell = module.to(tl.int64) * num_slots + slot
    rank = tl.load(ranks_ptr + cell)
    if rank == 0:
        return
    a_offset = tl.load(offsets_ptr + cell * 2)
    if ALIGNED:
        a_offset = tl.multiple_of(a_offset, 8)
    m = tl.arange(0, BLOCK_M)
    has_row = m < count
    rows = tl.load(rows_ptr + first_row + m, mask=has_row, other=0).to(tl.int64)
    x_rows = x_ptr + rows[:, None] * x_stride
    per_split = tl.cdiv(tl.cdiv(in_features, BLOCK_K), num_splits) * BLOCK_K
    k_first = split * per_split
    k_last = tl.minimum(k_first + per_split, in_features)
    h_rank = h_rank_blocks.to(tl.int64) * 16
    h_rows = h_ptr + ((split * num_rows + first_row + m) * MEMBERS + member) * h_rank
    rank_16 = tl.cdiv(rank, 16) * 16  # whole vectors of h: zeros fill the last one
    is_int8 = False
    if int8_ptr is not None:
        is_int8 = tl.load(int8_ptr + slot) != 0
    for r0 in range(0, rank, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        has_rank = r < rank
        if is_int8:
            bytes_ptr = (arena_ptr + a_offset).to(tl.pointer_type(tl.int8), bitcast=True)
            a_bytes = bytes_ptr + r[None, :].to(tl.int64) * in_features
            acc = product_over_k(x_rows, a_bytes, has_row, has_rank, k_first, k_last, BLOCK_M, BLOCK_R, BLOCK_K, EVEN_K)
            of_ranks = (arena_ptr + a_offset).to(tl.pointer_type(tl.float32), bitcast=True) - rank
            acc *= tl.load(of_ranks + r, mask=has_rank, other=0.0)[None, :]
        else:
            a_columns = arena_ptr + a_offset + r[None, :].to(tl.int64) * in_features
            acc = product_over_k(
                x_rows, a_columns, has_row, has_rank, k_first, k_last, BLOCK_M, BLOCK_R, BLOCK_K, EVEN_K
            )
        tl.store(h_rows[:, None] + r[None, :], acc, mask=has_row[:, None] & (r < rank_16)[None, :])


@kernel(*_PER_STEP)
def expand_kernel(
    y_ptr: tl.tensor,
    h_ptr: tl.tensor,
    arena_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    ranks_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    int8_ptr: tl.tensor | None,
    factors_ptr: tl.tensor | None,
    bias_ptr: tl.tensor | None,
    records_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    num_slots: tl.tensor,
    module0: tl.tensor,
    module1: tl.tensor,
    module2: tl.tensor,
    out0: tl.tensor,
    out1: tl.tensor,
    out2: tl.tensor,
    y_stride: tl.tensor,
    num_rows: tl.tensor,
    h_rank_blocks: tl.tensor,
    num_splits: tl.tensor,
    MEMBERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS_AT_ONCE: tl.constexpr,
    ALIGNED: tl.constexpr,
    OVERLAPPED: tl.constexpr,
) -> None:
    """Grid (column blocks of all members, tiles). Adds the splits of h in one fixed order: no atomics. factors_ptr,
    bias_ptr: see `_scaled`."""
    tile = tl.program_id(1)
    count = tl.load(records_ptr + tile * 3 + 2)
    if count == 0:
        return
    member, module, width, y_first, column_block = column_block_of(
        tl.program_id(0), module0, module1, module2, out0, out1, out2, BLOCK_N
    )
    slot = tl.load(records_ptr + tile * 3)
    first_row = tl.load(records_ptr + tile * 3 + 1)
    cell = module.to(tl.int64) * num_slots + slot
    rank = tl.load(ranks_ptr + cell)
    if rank == 0:
        return
    b_offset = tl.load(offsets_ptr + cell * 2 + 1)
    if ALIGNED:
        b_offset = tl.multiple_of(b_offset, 8)
    m = tl.arange(0, BLOCK_M)
    has_row = m < count
    rows = tl.load(rows_ptr + first_row + m, mask=has_row, other=0).to(tl.int64)
    n = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    has_column = n < width
    y_cells = y_ptr + rows[:, None] * y_stride + (y_first + n)[None, :]
    wanted = has_row[:, None] & has_column[None, :]
    y = tl.load(y_cells, mask=wanted, other=0.0)
    h_rank = h_rank_blocks.to(tl.int64) * 16
    h_split_stride = num_rows * MEMBERS * h_rank
    h_rows = h_ptr + ((first_row + m) * MEMBERS + member) * h_rank
    rank_16 = tl.cdiv(rank, 16) * 16
    is_int8 = False
    if int8_ptr is not None:
        is_int8 = tl.load(int8_ptr + slot) != 0
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for r0 in range(0, rank, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        b_mask = (r < rank)[:, None] & has_column[None, :]
        if is_int8:
            bytes_ptr = (arena_ptr + b_offset).to(tl.pointer_type(tl.int8), bitcast=True)
            b_bytes = bytes_ptr + r[:, None].to(tl.int64) * width
            b = widened(tl.load(b_bytes + n[None, :], mask=b_mask, other=0), arena_ptr.dtype.element_ty)
        else:
            b_rows = arena_ptr + b_offset + r[:, None].to(tl.int64) * width
            b = tl.load(b_rows + n[None, :], mask=b_mask, other=0.0)
        if OVERLAPPED:
            wait_for_previous()
        h_mask = has_row[:, None] & (r < rank_16)[None, :]
        h = _sum_of_splits(h_rows[:, None] + r[None, :], h_mask, num_splits, h_split_stride, SPLITS_AT_ONCE)
        acc = expanded(h, b, acc)
    scale = tl.load(scales_ptr + cell)
    total = y.to(tl.float32) + scale * acc
    if factors_ptr is not None:
        total = _scaled(total, arena_ptr, factors_ptr, bias_ptr, cell, n, y_first, has_column, ALIGNED)
    tl.store(y_cells, rounded(total, y.dtype), mask=wanted)
