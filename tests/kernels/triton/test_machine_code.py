"""The machine code that an 8B server runs on an H100 keeps to its budget: instructions, registers, bytes in flight.

It is read from what the compiler makes, without a GPU. A multiprocessor of an H100 issues four instructions a cycle and
does 4,096 bfloat16 operations a cycle on its tensor cores. It needs some 40 KB in flight to read at full bandwidth.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

import triton

from benchmarks.common.time_model import CODE
from support.kernels.triton_compile import SPILLS, Compiled
from support.kernels.triton_launches import Launch, recorded_launches
from support.models.llama_step import paged_batch, run_layer, table_of

ROOT = Path(__file__).parents[3]
CAPABILITY = 90
ISSUES_PER_CYCLE, TENSOR_OPERATIONS_PER_CYCLE = 4, 4096
KB = 1024


def _decode(rank: int) -> list[Launch]:
    with recorded_launches(CAPABILITY) as launches:
        run_layer(paged_batch([1] * 8, [9000] * 8), table_of((rank,)), np.zeros(8, dtype=np.int32), nf4=True)
    return launches


def _prompt(rank: int) -> list[Launch]:
    with recorded_launches(CAPABILITY) as launches:
        run_layer(paged_batch([8192], [8192]), table_of((rank,)), np.zeros(8192, dtype=np.int32))
    return launches


@cache
def built(name: str, rank: int = 16, *, is_prompt: bool = False) -> tuple[Launch, Compiled]:
    """The first launch of this kernel in a layer's step: as recorded, and as compiled."""
    launches = _prompt(rank) if is_prompt else _decode(rank)
    launch = next(launch for launch in launches if launch.name == name)
    compiled = launch.compile_for(CAPABILITY)
    assert compiled.stack_bytes == 0, "registers suffice"
    assert compiled.count(*SPILLS) == 0, "nothing is spilled"
    return launch, compiled


def in_flight(launch: Launch, compiled: Compiled, bytes_per_stage: int) -> int:
    """Bytes that a multiprocessor's programs have asked for at once: all stages but the one in use."""
    return (launch.options["num_stages"] - 1) * bytes_per_stage * compiled.programs_per_multiprocessor(CAPABILITY)


def near(num_bytes: int) -> Any:
    """What the time model may say: this with the pinned Triton; another may fit a program fewer or more."""
    is_pinned = f"\ntriton=={triton.__version__}\n" in (ROOT / "constraints.txt").read_text()
    return num_bytes if is_pinned else pytest.approx(num_bytes, rel=0.2)


def test_nf4_takes_fewer_instructions_a_weight_than_bytes_allow() -> None:
    """bitsandbytes 0.50 has 8.1 to 8.7 of them. At 9, issuing an 8B step takes 1.9 ms; reading its weights 0.84."""
    launch, compiled = built("nf4_kernel")
    weights = launch.constant("BLOCK_N") * launch.constant("BLOCK_K")
    assert compiled.loop_lanes / weights <= 7
    looked_up = compiled.loop_of("SHFL", "LDS") * 32 * compiled.num_warps / weights
    assert looked_up <= 1.5, "one look-up a weight, and a few loads"
    assert compiled.loop_of("BAR") <= 6
    stage = weights // 2 + launch.constant("BLOCK_M") * launch.constant("BLOCK_K") * 2
    assert in_flight(launch, compiled, stage) >= 64 * KB
    assert CODE["nf4"].per_weight == pytest.approx(compiled.loop_lanes / weights, rel=0.05)
    assert CODE["nf4"].in_flight == near(in_flight(launch, compiled, stage))


@pytest.mark.parametrize("rank", [16, 64])
def test_shrink_keeps_enough_bytes_in_flight(rank: int) -> None:
    launch, compiled = built("shrink_kernel", rank)
    stage = launch.constant("BLOCK_K") * (launch.constant("BLOCK_R") + launch.constant("BLOCK_M")) * 2
    assert in_flight(launch, compiled, stage) >= 64 * KB
    assert CODE[f"shrink r{rank}"].in_flight == near(in_flight(launch, compiled, stage))


@pytest.mark.parametrize(("rank", "is_prompt", "least_kb"), [(16, False, 32), (64, False, 64), (16, True, 48)], ids=str)
def test_expand_keeps_enough_bytes_in_flight(rank: int, is_prompt: bool, least_kb: int) -> None:
    """A program reads its part of B at once, and for prompts as much of y as B has ranks or more."""
    launch, compiled = built("expand_kernel", rank, is_prompt=is_prompt)
    rows = launch.constant("BLOCK_R") + (launch.constant("BLOCK_M") if is_prompt else 0)
    at_once = rows * launch.constant("BLOCK_N") * 2 * compiled.programs_per_multiprocessor(CAPABILITY)
    assert at_once >= least_kb * KB
    assert is_prompt or CODE[f"expand r{rank}"].in_flight == near(at_once)


def test_attention_of_prompts_is_bound_by_tensor_cores_not_by_issuing() -> None:
    launch, compiled = built("attention_kernel", is_prompt=True)
    block_m, block_n, head_dim = (launch.constant(name) for name in ("BLOCK_M", "BLOCK_N", "HEAD_DIM"))
    tensor_cycles = 4 * block_m * block_n * head_dim / TENSOR_OPERATIONS_PER_CYCLE
    issue_cycles = compiled.loop.total() * compiled.num_warps / ISSUES_PER_CYCLE
    assert compiled.loop_of("HGMMA") > 0, "a warp group's own multiplication, not a warp's"
    assert issue_cycles / tensor_cycles <= 1.25
