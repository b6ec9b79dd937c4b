"""Shrink and expand in one launch, for few rows: y += scale * (x A^T) B. Knows pointers; `triton_launch` chooses.

Every program needs all of its rows' h, so each block of columns reads all of A again, from L2. At rank 16 that is 2 MB
a row for Llama-8B's o and 15 MB for its gate/up; one program alone reads its 128 KB in 1.1 us at best. So one launch is
cheaper than two for q/k/v and o with up to about four rows at rank 16, and dearer everywhere else.

Another form of one launch was considered: programs that wait for each other's h. It replaces a launch by a counter's
two trips to L2, about as long, and all programs must run at once. `shrink_expand.py`'s OVERLAPPED gains the same
without either.

Legend: M rows of a tile, R ranks, K in_features, N out_features. No scratch, no splits.
"""

# ruff: noqa: PLR0917  (a kernel is launched without keywords)

from __future__ import annotations

import triton.language as tl

from lora_kernels.lora.shrink_expand import expanded, product_over_k
from lora_kernels.triton_common.jit import column_block_of, kernel, rounded


@kernel("num_slots", "module0", "module1", "module2")
def one_launch_kernel(
    y_ptr: tl.tensor,
    x_ptr: tl.tensor,
    arena_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    ranks_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    records_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    num_slots: tl.tensor,
    module0: tl.tensor,
    module1: tl.tensor,
    module2: tl.tensor,
    out0: tl.tensor,
    out1: tl.tensor,
    out2: tl.tensor,
    in_features: tl.tensor,
    x_stride: tl.tensor,
    y_stride: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    """Grid (column blocks of all members, tiles)."""
    tile = tl.program_id(1)
    count = tl.load(records_ptr + tile * 3 + 2)
    if count == 0:
        return
    _, module, width, y_first, column_block = column_block_of(
        tl.program_id(0), module0, module1, module2, out0, out1, out2, BLOCK_N
    )
    slot = tl.load(records_ptr + tile * 3)
    first_row = tl.load(records_ptr + tile * 3 + 1)
    cell = module.to(tl.int64) * num_slots + slot
    rank = tl.load(ranks_ptr + cell)
    if rank == 0:
        return
    a_offset = tl.load(offsets_ptr + cell * 2)
    b_offset = tl.load(offsets_ptr + cell * 2 + 1)
    if ALIGNED:
        a_offset = tl.multiple_of(a_offset, 8)
        b_offset = tl.multiple_of(b_offset, 8)
    m = tl.arange(0, BLOCK_M)
    has_row = m < count
    rows = tl.load(rows_ptr + first_row + m, mask=has_row, other=0).to(tl.int64)
    x_rows = x_ptr + rows[:, None] * x_stride
    n = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    has_column = n < width
    y_cells = y_ptr + rows[:, None] * y_stride + (y_first + n)[None, :]
    wanted = has_row[:, None] & has_column[None, :]
    y = tl.load(y_cells, mask=wanted, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for r0 in range(0, rank, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        has_rank = r < rank
        b_rows = arena_ptr + b_offset + r[:, None].to(tl.int64) * width
        b = tl.load(b_rows + n[None, :], mask=has_rank[:, None] & has_column[None, :], other=0.0)
        a_columns = arena_ptr + a_offset + r[None, :].to(tl.int64) * in_features
        h = product_over_k(x_rows, a_columns, has_row, has_rank, 0, in_features, BLOCK_M, BLOCK_R, BLOCK_K, EVEN_K)
        acc = expanded(h, b, acc)
    scale = tl.load(scales_ptr + cell)
    tl.store(y_cells, rounded(y.to(tl.float32) + scale * acc, y.dtype), mask=wanted)
