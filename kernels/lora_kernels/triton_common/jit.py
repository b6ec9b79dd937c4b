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
