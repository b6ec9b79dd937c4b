"""NF4 matmul for a few rows: reads half a byte per weight and dequantises it in registers.

Legend: M rows of x, N out_features, K in_features. One launch serves all weights of a group. A program takes all rows,
BLOCK_N of one weight's rows and a stretch of K; with more than one stretch, a second kernel adds them in one fixed
order.

What limits it is instructions, not bytes. So a thread takes its 16 weights of a row as two whole words. That permutes
K within a block of 64, and x is permuted alike; a product does not depend on the order.
"""

# ruff: noqa: PLR0917  (a kernel is launched without keywords)

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import triton.language as tl

from lora_kernels.nf4.weight import NF4_BLOCK, Nf4Weight
from lora_kernels.triton_common.jit import column_block_of, device_function, dot, kernel, rounded
from lora_kernels.triton_common.tiles import device_tiles

MAX_SPLITS = 16
MAX_MEMBERS = 3  # q/k/v is the widest group
MIN_STEPS_PER_SPLIT = 4
SUM_COLUMNS = 256
T = TypeVar("T")


@device_function
def _one_of(member: tl.tensor, first: tl.tensor, second: tl.tensor, third: tl.tensor) -> tl.tensor:
    return tl.where(member == 0, first, tl.where(member == 1, second, third))


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


@device_function
def _indices(words: tl.tensor, BLOCK_N: tl.constexpr) -> tl.tensor:
    """The 4-bit indices in words [N, 8] of 8 weights each; the first of a byte is in its high half. [N, 64]

    A weight's k has the bits (t t w h l b): t and w choose the word, h and l the byte, b the half. Here they lie in the
    order (h l w t t b), which puts a word's weights on the thread that a tensor core wants them on."""
    low = tl.join(tl.join(words >> 4, words), tl.join(words >> 12, words >> 8))
    high = tl.join(tl.join(words >> 20, words >> 16), tl.join(words >> 28, words >> 24))
    parts = tl.reshape(tl.join(low, high), (BLOCK_N, 4, 2, 2, 2, 2))  # n, tt, w, b, l, h
    return tl.reshape(tl.permute(parts, (0, 5, 4, 2, 1, 3)), (BLOCK_N, 64)) & 15


@device_function
def _permuted(x: tl.tensor, BLOCK_M: tl.constexpr) -> tl.tensor:
    """x [M, 64] with its columns in the order of `_indices`."""
    parts = tl.reshape(x, (BLOCK_M, 4, 2, 2, 2, 2))  # m, tt, w, h, l, b
    return tl.reshape(tl.permute(parts, (0, 3, 4, 2, 1, 5)), (BLOCK_M, 64))


@kernel("num_rows", "num_splits")
def nf4_kernel(
    y_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    x_ptr: tl.tensor,
    code_ptr: tl.tensor,
    nested_code_ptr: tl.tensor,
    words0_ptr: tl.tensor,
    words1_ptr: tl.tensor,
    words2_ptr: tl.tensor,
    absmax0_ptr: tl.tensor,
    absmax1_ptr: tl.tensor,
    absmax2_ptr: tl.tensor,
    outer0_ptr: tl.tensor,
    outer1_ptr: tl.tensor,
    outer2_ptr: tl.tensor,
    offset0_ptr: tl.tensor,
    offset1_ptr: tl.tensor,
    offset2_ptr: tl.tensor,
    bias0_ptr: tl.tensor,
    bias1_ptr: tl.tensor,
    bias2_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_splits: tl.tensor,
    out0: tl.tensor,
    out1: tl.tensor,
    out2: tl.tensor,
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
    """Grid (column blocks of all members, splits). BLOCK_K is the block that shares an absmax, 64. SPLIT: write float32
    parts [splits, rows, sum of out_features]. outer, offset: of the nested absmax."""
    split = tl.program_id(1)
    member, _, width, y_first, column_block = column_block_of(tl.program_id(0), 0, 0, 0, out0, out1, out2, BLOCK_N)
    words_ptr = _one_of(member, words0_ptr, words1_ptr, words2_ptr)
    absmax_ptr = _one_of(member, absmax0_ptr, absmax1_ptr, absmax2_ptr)
    outer_ptr = _one_of(member, outer0_ptr, outer1_ptr, outer2_ptr)
    m = tl.arange(0, BLOCK_M)
    n = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    has_row, has_column = m < num_rows, n < width
    columns = n.to(tl.int64)[:, None] * (in_features // 8) + tl.arange(0, BLOCK_K // 8)[None, :]
    x_cells = x_ptr + m.to(tl.int64)[:, None] * x_stride + tl.arange(0, BLOCK_K)[None, :]
    absmax_rows = n.to(tl.int64) * (in_features // BLOCK_K)
    offset = 0.0
    if NESTED:
        offset = tl.load(_one_of(member, offset0_ptr, offset1_ptr, offset2_ptr))
    code = tl.load(code_ptr + tl.arange(0, 16))
    steps = in_features // BLOCK_K
    per_split = tl.cdiv(steps, num_splits)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)  # a tensor core takes its left factor from registers
    for step in range(split * per_split, tl.minimum((split + 1) * per_split, steps)):
        words = tl.load(words_ptr + columns + step * (BLOCK_K // 8), mask=has_column[:, None], other=0)
        x = tl.load(x_cells + step * BLOCK_K, mask=has_row[:, None], other=0.0)
        scale = _absmax(absmax_rows + step, has_column, absmax_ptr, nested_code_ptr, outer_ptr, offset, NESTED)
        # one look-up of all indices: the compiler keeps the codes in shared memory, a bank each
        flat = tl.gather(code, tl.reshape(_indices(words, BLOCK_N), (BLOCK_N * BLOCK_K,)), 0)
        weight = rounded(tl.reshape(flat, (BLOCK_N, BLOCK_K)) * scale[:, None], x.dtype)
        acc = dot(weight, tl.trans(_permuted(x, BLOCK_M)), acc)
    wanted = has_column[:, None] & has_row[None, :]
    if SPLIT:
        part = (split * num_rows + m).to(tl.int64) * (out0 + out1 + out2)
        tl.store(parts_ptr + part[None, :] + (y_first + n)[:, None], acc, mask=wanted)
    else:
        if HAS_BIAS:
            bias_ptr = _one_of(member, bias0_ptr, bias1_ptr, bias2_ptr)
            acc += tl.load(bias_ptr + n, mask=has_column, other=0.0).to(tl.float32)[:, None]
        y_cells = y_ptr + m.to(tl.int64)[None, :] * y_stride + (y_first + n)[:, None]
        tl.store(y_cells, rounded(acc, y_ptr.dtype.element_ty), mask=wanted)


@kernel("num_rows", "num_splits")
def sum_parts_kernel(
    y_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    bias0_ptr: tl.tensor,
    bias1_ptr: tl.tensor,
    bias2_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_splits: tl.tensor,
    out0: tl.tensor,
    out1: tl.tensor,
    out2: tl.tensor,
    y_stride: tl.tensor,
    HAS_BIAS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Grid (column blocks of all members, rows)."""
    row = tl.program_id(1)
    member, _, width, y_first, column_block = column_block_of(tl.program_id(0), 0, 0, 0, out0, out1, out2, BLOCK_N)
    n = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    has_column = n < width
    s = tl.arange(0, MAX_SPLITS)
    cells = (s * num_rows + row).to(tl.int64)[:, None] * (out0 + out1 + out2) + (y_first + n)[None, :]
    parts = tl.load(parts_ptr + cells, mask=(s < num_splits)[:, None] & has_column[None, :], other=0.0)
    total = tl.sum(parts, axis=0)
    if HAS_BIAS:
        bias_ptr = _one_of(member, bias0_ptr, bias1_ptr, bias2_ptr)
        total += tl.load(bias_ptr + n, mask=has_column, other=0.0).to(tl.float32)
    y_cells = y_ptr + row.to(tl.int64) * y_stride + y_first + n
    tl.store(y_cells, rounded(total, y_ptr.dtype.element_ty), mask=has_column)


def num_splits(out_features: int, in_features: int, block_n: int, target_programs: int) -> int:
    """Stretches of K, so that a narrow layer keeps the whole device busy."""
    wanted = -(-target_programs // -(-out_features // block_n))
    possible = in_features // NF4_BLOCK // MIN_STEPS_PER_SPLIT
    return max(1, min(wanted, possible, MAX_SPLITS))


def nf4_matmul(
    x_TH: torch.Tensor, weights: Sequence[Nf4Weight], biases: Sequence[torch.Tensor | None], y_TO: torch.Tensor
) -> None:
    """y = x W^T + bias of up to three weights that read the same x, side by side, in one launch (and one to add parts).

    x_TH: [T <= 64, H], y_TO: [T, sum(out_features)], last axes contiguous. The weights share their codes and are all
    nested or none is; all have a bias or none has.
    """
    assert x_TH.stride(1) == 1, "x's features are contiguous"
    assert y_TO.stride(1) == 1, "y's features are contiguous"
    assert len(weights) <= MAX_MEMBERS, f"{len(weights)} weights; the kernel takes {MAX_MEMBERS}"
    rows, outs = y_TO.shape
    first = weights[0]
    chosen = device_tiles(x_TH.device)
    tile = chosen.tiles.nf4_for(rows)
    splits = num_splits(outs, first.in_features, tile.block_n, chosen.target_programs)
    parts = y_TO if splits == 1 else torch.empty(splits * rows * outs, dtype=torch.float32, device=y_TO.device)
    widths = _padded([weight.out_features for weight in weights], 0)
    nf4_kernel[sum(-(-width // tile.block_n) for width in widths), splits](
        y_TO,
        parts,
        x_TH,
        first.code,
        _or_unread(first.nested_code, first.code),
        *_padded([weight.words for weight in weights], first.words),
        *_padded([weight.absmax for weight in weights], first.absmax),
        *_padded([_or_unread(weight.nested_absmax, first.code) for weight in weights], first.code),
        *_padded([_or_unread(weight.nested_offset, first.code) for weight in weights], first.code),
        *(_or_unread(bias, x_TH) for bias in _padded(biases, None)),
        rows,
        splits,
        *widths,
        first.in_features,
        x_TH.stride(0),
        y_TO.stride(0),
        NESTED=first.is_nested,
        HAS_BIAS=biases[0] is not None,
        SPLIT=splits > 1,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=NF4_BLOCK,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if splits > 1:
        _sum_parts(y_TO, parts, biases, widths, splits)


def _sum_parts(
    y_TO: torch.Tensor,
    parts: torch.Tensor,
    biases: Sequence[torch.Tensor | None],
    widths: Sequence[int],
    splits: int,
) -> None:
    sum_parts_kernel[sum(-(-width // SUM_COLUMNS) for width in widths), len(y_TO)](
        y_TO,
        parts,
        *(_or_unread(bias, y_TO) for bias in _padded(biases, None)),
        len(y_TO),
        splits,
        *widths,
        y_TO.stride(0),
        HAS_BIAS=biases[0] is not None,
        MAX_SPLITS=MAX_SPLITS,
        BLOCK_N=SUM_COLUMNS,
        num_warps=4,
    )


def _padded(values: Sequence[T], filler: T) -> list[T]:
    """One value for each of the kernel's members."""
    return [*values, *[filler] * (MAX_MEMBERS - len(values))]


def _or_unread(tensor: torch.Tensor | None, unread: torch.Tensor) -> torch.Tensor:
    """A pointer that the kernel does not read, in place of none."""
    return unread if tensor is None else tensor
