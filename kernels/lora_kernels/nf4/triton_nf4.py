"""NF4 matmul for a few rows: reads half a byte per weight and dequantises it in registers.

Legend: M rows of x, N out_features, K in_features. A program takes all rows, BLOCK_N weights' rows and a stretch of K;
with more than one stretch, a second kernel adds them in one fixed order.
"""

# ruff: noqa: PLR0917  (a kernel is launched without keywords)

from __future__ import annotations

import torch
import triton.language as tl

from lora_kernels.nf4.weight import NF4_BLOCK, Nf4Weight
from lora_kernels.triton_common.jit import device_function, dot, kernel, rounded
from lora_kernels.triton_common.tiles import device_tiles

MAX_SPLITS = 16
MIN_STEPS_PER_SPLIT = 4
SUM_COLUMNS = 256


@device_function
def _absmax(
    blocks: tl.tensor,
    has_column: tl.tensor,
    absmax_ptr: tl.tensor,
    nested_code_ptr: tl.tensor,
    nested_absmax_ptr: tl.tensor,
    offset: tl.tensor,
    NESTED: tl.constexpr,
) -> tl.tensor:
    absmax = tl.load(absmax_ptr + blocks, mask=has_column, other=0)
    if NESTED:
        inner = tl.load(nested_code_ptr + absmax.to(tl.int32))
        absmax = inner * tl.load(nested_absmax_ptr + blocks // 256, mask=has_column, other=0.0) + offset
    return absmax


@kernel("num_rows", "num_splits")
def nf4_kernel(
    y_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    x_ptr: tl.tensor,
    packed_ptr: tl.tensor,
    code_ptr: tl.tensor,
    absmax_ptr: tl.tensor,
    nested_code_ptr: tl.tensor,
    nested_absmax_ptr: tl.tensor,
    nested_offset_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_splits: tl.tensor,
    out_features: tl.tensor,
    in_features: tl.tensor,
    x_stride: tl.tensor,
    y_stride: tl.tensor,
    NESTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Grid (column blocks, splits). BLOCK_K is the block that shares an absmax. SPLIT: write float32 parts."""
    split = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    has_row, has_column = m < num_rows, n < out_features
    columns = n.to(tl.int64)[:, None] * (in_features // 2) + tl.arange(0, BLOCK_K // 2)[None, :]
    x_cells = x_ptr + m.to(tl.int64)[:, None] * x_stride + tl.arange(0, BLOCK_K)[None, :]
    absmax_rows = n.to(tl.int64) * (in_features // BLOCK_K)
    offset = 0.0
    if NESTED:
        offset = tl.load(nested_offset_ptr)
    # looked up by shuffles between lanes; the compiler would stage loads through shared memory
    code = tl.broadcast_to(tl.load(code_ptr + tl.arange(0, 16))[None, :], (BLOCK_N, 16))
    steps = in_features // BLOCK_K
    per_split = tl.cdiv(steps, num_splits)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)  # a tensor core takes its left factor from registers
    for step in range(split * per_split, tl.minimum((split + 1) * per_split, steps)):
        packed = tl.load(packed_ptr + columns + step * (BLOCK_K // 2), mask=has_column[:, None], other=0).to(tl.int32)
        x = tl.load(x_cells + step * BLOCK_K, mask=has_row[:, None], other=0.0)
        scale = _absmax(absmax_rows + step, has_column, absmax_ptr, nested_code_ptr, nested_absmax_ptr, offset, NESTED)
        first = tl.gather(code, packed >> 4, 1) * scale[:, None]
        second = tl.gather(code, packed & 15, 1) * scale[:, None]
        weight = tl.interleave(rounded(first, x.dtype), rounded(second, x.dtype))
        acc = dot(weight, tl.trans(x), acc)
    wanted = has_column[:, None] & has_row[None, :]
    if SPLIT:
        part = (split * num_rows + m).to(tl.int64)
        tl.store(parts_ptr + part[None, :] * out_features + n[:, None], acc, mask=wanted)
    else:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + n, mask=has_column, other=0.0).to(tl.float32)[:, None]
        y_cells = y_ptr + m.to(tl.int64)[None, :] * y_stride + n[:, None]
        tl.store(y_cells, rounded(acc, y_ptr.dtype.element_ty), mask=wanted)


@kernel("num_rows", "num_splits")
def sum_parts_kernel(
    y_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_splits: tl.tensor,
    out_features: tl.tensor,
    y_stride: tl.tensor,
    HAS_BIAS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Grid (column blocks, rows)."""
    row = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    has_column = n < out_features
    s = tl.arange(0, MAX_SPLITS)
    cells = (s * num_rows + row).to(tl.int64)[:, None] * out_features + n[None, :]
    parts = tl.load(parts_ptr + cells, mask=(s < num_splits)[:, None] & has_column[None, :], other=0.0)
    total = tl.sum(parts, axis=0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=has_column, other=0.0).to(tl.float32)
    y_cells = y_ptr + row.to(tl.int64) * y_stride + n
    tl.store(y_cells, rounded(total, y_ptr.dtype.element_ty), mask=has_column)


def num_splits(out_features: int, in_features: int, block_n: int, target_programs: int) -> int:
    """Stretches of K, so that a narrow layer keeps the whole device busy."""
    wanted = -(-target_programs // -(-out_features // block_n))
    possible = in_features // NF4_BLOCK // MIN_STEPS_PER_SPLIT
    return max(1, min(wanted, possible, MAX_SPLITS))


def nf4_matmul(x_TH: torch.Tensor, weight: Nf4Weight, bias: torch.Tensor | None, y_TO: torch.Tensor) -> None:
    """y = x W^T + bias. x_TH: [T <= 64, H], y_TO: [T, O], last axes contiguous."""
    assert x_TH.stride(1) == 1, "x's features are contiguous"
    assert y_TO.stride(1) == 1, "y's features are contiguous"
    rows, outs = y_TO.shape
    chosen = device_tiles(x_TH.device)
    tile = chosen.tiles.nf4_for(rows)
    splits = num_splits(outs, weight.in_features, tile.block_n, chosen.target_programs)
    parts = y_TO if splits == 1 else torch.empty(splits * rows * outs, dtype=torch.float32, device=y_TO.device)
    nothing = weight.code  # a pointer that the kernel does not read
    nested = (weight.nested_code, weight.nested_absmax, weight.nested_offset)
    nf4_kernel[-(-outs // tile.block_n), splits](
        y_TO,
        parts,
        x_TH,
        weight.packed,
        weight.code,
        weight.absmax,
        *(nothing if tensor is None else tensor for tensor in (*nested, bias)),
        rows,
        splits,
        outs,
        weight.in_features,
        x_TH.stride(0),
        y_TO.stride(0),
        NESTED=weight.nested_code is not None,
        HAS_BIAS=bias is not None,
        SPLIT=splits > 1,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=NF4_BLOCK,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if splits > 1:
        _sum_parts(y_TO, parts, bias, splits)


def _sum_parts(y_TO: torch.Tensor, parts: torch.Tensor, bias: torch.Tensor | None, splits: int) -> None:
    rows, outs = y_TO.shape
    sum_parts_kernel[-(-outs // SUM_COLUMNS), rows](
        y_TO,
        parts,
        parts if bias is None else bias,
        rows,
        splits,
        outs,
        y_TO.stride(0),
        HAS_BIAS=bias is not None,
        MAX_SPLITS=MAX_SPLITS,
        BLOCK_N=SUM_COLUMNS,
        num_warps=4,
    )
