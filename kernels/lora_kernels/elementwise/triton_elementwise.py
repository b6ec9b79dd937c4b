"""RMSNorm, SwiGLU and RoPE in one pass each, with the same roundings as transformers' chains of operations.

Legend: R rows, H features, T tokens, D head size. Launchers and kernels;
`lora_kernels.elementwise.launcher` decides when these run.
"""

# ruff: noqa: PLR0917  (a kernel is launched without keywords)

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from lora_kernels.triton_common.jit import device_function, kernel, rounded
from lora_kernels.triton_common.tiles import power_of_two

BLOCK_ELEMENTS = 4096  # of one program, for short rows
SILU_BLOCK = 1024
MAX_NORM_WIDTH = 32768  # one program holds a row in registers
ROPE_TOKENS = 4


@device_function
def _normed(x: tl.tensor, weight: tl.tensor, eps: tl.tensor, WIDTH: tl.constexpr, ONE_PLUS: tl.constexpr) -> tl.tensor:
    """x [R, H] float32, zero beyond WIDTH."""
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / WIDTH + eps)
    wide = weight.to(tl.float32)[None, :]
    if ONE_PLUS:
        return rounded(x * scale[:, None] * (1.0 + wide), weight.dtype)
    return rounded(rounded(x * scale[:, None], weight.dtype).to(tl.float32) * wide, weight.dtype)


@kernel("num_rows", "inner")
def rms_norm_kernel(
    y_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    num_rows: tl.tensor,
    inner: tl.tensor,
    outer_stride: tl.tensor,
    inner_stride: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> None:
    """Grid (row blocks). Row r of x starts at (r // inner) * outer_stride + (r % inner) * inner_stride."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    h = tl.arange(0, BLOCK_H)
    wanted = (r < num_rows)[:, None] & (h < WIDTH)[None, :]
    starts = (r // inner).to(tl.int64) * outer_stride + (r % inner).to(tl.int64) * inner_stride
    x = tl.load(x_ptr + starts[:, None] + h[None, :], mask=wanted, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + h, mask=h < WIDTH, other=0.0)
    y = _normed(x, weight, eps, WIDTH, ONE_PLUS)
    tl.store(y_ptr + r.to(tl.int64)[:, None] * WIDTH + h[None, :], y, mask=wanted)


@kernel("num_rows")
def add_rms_norm_kernel(
    y_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    num_rows: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> None:
    """Grid (row blocks). All of [rows, WIDTH], contiguous. The norm reads the sum as it was rounded."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    h = tl.arange(0, BLOCK_H)
    wanted = (r < num_rows)[:, None] & (h < WIDTH)[None, :]
    cells = r.to(tl.int64)[:, None] * WIDTH + h[None, :]
    x = tl.load(x_ptr + cells, mask=wanted, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + cells, mask=wanted, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + h, mask=h < WIDTH, other=0.0)
    total = rounded(residual + x, weight.dtype)
    tl.store(sum_ptr + cells, total, mask=wanted)
    tl.store(y_ptr + cells, _normed(total.to(tl.float32), weight, eps, WIDTH, ONE_PLUS), mask=wanted)


@kernel()
def silu_mul_kernel(
    y_ptr: tl.tensor, x_ptr: tl.tensor, width: tl.tensor, x_stride: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Grid (column blocks, rows). x's rows are [gate | up]."""
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    has_column = n < width
    gate = tl.load(x_ptr + row * x_stride + n, mask=has_column, other=0.0)
    up = tl.load(x_ptr + row * x_stride + width + n, mask=has_column, other=0.0)
    wide = gate.to(tl.float32)
    silu = rounded(wide / (1.0 + tl.exp(-wide)), gate.dtype).to(tl.float32)
    tl.store(y_ptr + row * width + n, rounded(silu * up.to(tl.float32), gate.dtype), mask=has_column)


@kernel("num_tokens")
def rope_kernel(
    x_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    num_tokens: tl.tensor,
    head_stride: tl.tensor,
    token_stride: tl.tensor,
    HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Grid (token blocks, heads), in place. cos and sin are contiguous [T, 2 HALF]."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    wanted = (t < num_tokens)[:, None] & (d < HALF)[None, :]
    low_cells = x_ptr + tl.program_id(1).to(tl.int64) * head_stride + t[:, None] * token_stride + d[None, :]
    angles = t[:, None] * (2 * HALF) + d[None, :]
    low = tl.load(low_cells, mask=wanted, other=0.0)
    high = tl.load(low_cells + HALF, mask=wanted, other=0.0)
    dtype = low.dtype
    low_cos = tl.load(cos_ptr + angles, mask=wanted, other=0.0).to(tl.float32)
    high_cos = tl.load(cos_ptr + angles + HALF, mask=wanted, other=0.0).to(tl.float32)
    low_sin = tl.load(sin_ptr + angles, mask=wanted, other=0.0).to(tl.float32)
    high_sin = tl.load(sin_ptr + angles + HALF, mask=wanted, other=0.0).to(tl.float32)
    low, high = low.to(tl.float32), high.to(tl.float32)
    new_low = rounded(low * low_cos, dtype).to(tl.float32) - rounded(high * low_sin, dtype).to(tl.float32)
    new_high = rounded(high * high_cos, dtype).to(tl.float32) + rounded(low * high_sin, dtype).to(tl.float32)
    tl.store(low_cells, rounded(new_low, dtype), mask=wanted)
    tl.store(low_cells + HALF, rounded(new_high, dtype), mask=wanted)


def rms_norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float, *, one_plus: bool = False) -> torch.Tensor:
    """The norm over the last axis. x: [..., H], weight: [H]. Returns a contiguous [..., H]."""
    width = x.shape[-1]
    y = x.new_empty(x.shape)
    num_rows = x.numel() // width
    if num_rows == 0:
        return y
    x, inner, outer_stride, inner_stride = _two_strides(x)
    options = _norm_options(width, one_plus=one_plus)
    rms_norm_kernel[(-(-num_rows // options["BLOCK_R"]),)](
        y, x, weight, num_rows, inner, outer_stride, inner_stride, eps, **options
    )
    return y


def add_rms_norm_triton(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, one_plus: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """residual + x, and its norm. x, residual: [..., H], contiguous."""
    assert x.shape == residual.shape, f"the sum of {tuple(x.shape)} and {tuple(residual.shape)}"
    total, y = torch.empty_like(x), torch.empty_like(x)
    width = x.shape[-1]
    num_rows = x.numel() // width
    if num_rows:
        options = _norm_options(width, one_plus=one_plus)
        grid = (-(-num_rows // options["BLOCK_R"]),)
        add_rms_norm_kernel[grid](y, total, x, residual, weight, num_rows, eps, **options)
    return total, y


def _norm_options(width: int, *, one_plus: bool) -> dict[str, Any]:
    assert width <= MAX_NORM_WIDTH, f"{width} features; the kernel takes {MAX_NORM_WIDTH}"
    block_h = power_of_two(width)
    block_r = max(1, min(16, BLOCK_ELEMENTS // block_h))
    num_warps = 8 if block_h >= 4096 else 4
    return {"WIDTH": width, "ONE_PLUS": one_plus, "BLOCK_R": block_r, "BLOCK_H": block_h, "num_warps": num_warps}


def _two_strides(x: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    """x as rows of two nested loops, so that a token's heads inside a fused projection need no copy."""
    if x.dim() == 4 and len(x) == 1 and x.stride(3) == 1:
        return x, x.shape[2], x.stride(1), x.stride(2)
    return x.contiguous(), 1, x.shape[-1], 0


def silu_mul_triton(gate_up_T2I: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up. gate_up_T2I: [..., 2 I] contiguous, the gate's half first. Returns [..., I]."""
    assert gate_up_T2I.is_contiguous(), "rows are [gate | up], one after the other"
    width = gate_up_T2I.shape[-1] // 2
    y = gate_up_T2I.new_empty(*gate_up_T2I.shape[:-1], width)
    num_rows = y.numel() // max(width, 1)
    if num_rows:
        grid = (-(-width // SILU_BLOCK), num_rows)
        silu_mul_kernel[grid](y, gate_up_T2I, width, 2 * width, BLOCK=SILU_BLOCK, num_warps=4)
    return y


def rope_triton(x_1HTD: torch.Tensor, cos_1TR: torch.Tensor, sin_1TR: torch.Tensor) -> None:
    """x cos + rotate_half(x) sin over the first R of D elements, in place. x_1HTD: any strides, D contiguous."""
    _, heads, tokens, _ = x_1HTD.shape
    half = cos_1TR.shape[-1] // 2
    rope_kernel[-(-tokens // ROPE_TOKENS), heads](
        x_1HTD,
        cos_1TR.contiguous(),
        sin_1TR.contiguous(),
        tokens,
        x_1HTD.stride(1),
        x_1HTD.stride(2),
        HALF=half,
        BLOCK_T=ROPE_TOKENS,
        BLOCK_D=power_of_two(half),
        num_warps=4,
    )
