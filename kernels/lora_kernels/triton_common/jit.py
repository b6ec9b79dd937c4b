"""Triton's decorator with types, and corrections of its interpreter in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


class Kernel(Protocol):
    """`kernel[grid](arguments, num_warps=..., num_stages=...)` launches it."""

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., Any]: ...


def kernel(*not_specialized: str) -> Callable[[Callable[..., None]], Kernel]:
    """`triton.jit`. not_specialized: integers that change from step to step or from layer to layer. Triton would
    compile again when one of them becomes 1 or a multiple of 16; a peer's first release did so per prompt length."""

    def decorate(function: Callable[..., None]) -> Kernel:
        return cast(Kernel, triton.jit(function, do_not_specialize=list(not_specialized)))

    return decorate


def device_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that kernels call."""
    return cast("Callable[..., Any]", triton.jit(function))


@device_function
def dot(a: tl.tensor, b: tl.tensor, acc: tl.tensor) -> tl.tensor:
    """acc + a b in float32. The interpreter multiplies bfloat16's bits as integers, so there it gets float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@device_function
def rounded(x: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """float32 x in another element type, to the nearest, ties to even. The interpreter cuts bfloat16 off instead."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@device_function
def widened(x: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """Bytes in a floating type, which holds each of them exactly; x of that type already as it is."""
    if x.dtype == tl.int8:
        x = rounded(x.to(tl.float32), DTYPE)
    return x


@device_function
def column_block_of(  # noqa: PLR0917  (kernels call it without keywords)
    block: tl.tensor,
    module0: tl.tensor,
    module1: tl.tensor,
    module2: tl.tensor,
    out0: tl.tensor,
    out1: tl.tensor,
    out2: tl.tensor,
    BLOCK_N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """In a grid over the column blocks of all members: member, its module, width, first column of y, and the block's
    index within the member."""
    blocks0 = tl.cdiv(out0, BLOCK_N)
    blocks01 = blocks0 + tl.cdiv(out1, BLOCK_N)
    in_first, in_second = block < blocks0, block < blocks01
    member = tl.where(in_first, 0, tl.where(in_second, 1, 2))
    module = tl.where(in_first, module0, tl.where(in_second, module1, module2))
    width = tl.where(in_first, out0, tl.where(in_second, out1, out2))
    y_first = tl.where(in_first, 0, tl.where(in_second, out0, out0 + out1))
    column_block = block - tl.where(in_first, 0, tl.where(in_second, blocks0, blocks01))
    return member, module, width, y_first, column_block


@device_function
def let_next_start() -> None:
    """The next kernel may start from here on, if it was launched that way (sm_90). It must not read this one's results
    yet."""
    if not INTERPRETED:
        tl.extra.cuda.gdc_launch_dependents()


@device_function
def wait_for_previous() -> None:
    """The previous kernel's results can be read from here on."""
    if not INTERPRETED:
        tl.extra.cuda.gdc_wait()
