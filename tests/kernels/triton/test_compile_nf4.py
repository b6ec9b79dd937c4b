"""Every tile of the NF4 matmul compiles for A100 and H100: whole vectors, tensor cores, no spills."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from lora_kernels.nf4.triton_nf4 import MAX_SPLITS, SUM_COLUMNS, nf4_kernel, sum_parts_kernel
from lora_kernels.nf4.weight import NF4_BLOCK
from lora_kernels.triton_common.tiles import SM_80, Nf4Tile
from support.kernels.triton_compile import SMALLEST_SHARED_LIMIT, SPILLS, TENSOR_CORE, Compiled, compile_for

FLOATS = ("parts_ptr", "code_ptr", "nested_code_ptr", *(f"{of}{i}_ptr" for of in ("outer", "offset") for i in range(3)))
BIASES = ("bias0_ptr", "bias1_ptr", "bias2_ptr")
POINTERS = dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(("x_ptr", "y_ptr", *BIASES), "*bf16")
POINTERS |= dict.fromkeys(("words0_ptr", "words1_ptr", "words2_ptr"), "*i32")
WIDTHS = {"out0", "out1", "out2"}


def check(compiled: Compiled) -> None:
    assert compiled.shared_bytes <= SMALLEST_SHARED_LIMIT
    assert compiled.stack_bytes == 0
    assert compiled.count(*SPILLS) == 0


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("tile", "nested"), [*((tile, True) for tile in SM_80.nf4), (SM_80.nf4[0], False)], ids=str)
def test_matmul_streams_packed_weights_to_tensor_cores(
    capability: int, tile: Nf4Tile, nested: bool, tmp_path: Path
) -> None:
    compiled = compile_for(
        capability,
        nf4_kernel,
        POINTERS | {f"absmax{i}_ptr": "*u8" if nested else "*fp32" for i in range(3)},
        {"NESTED": nested, "HAS_BIAS": not nested, "SPLIT": nested}
        | {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": NF4_BLOCK},
        divisible=WIDTHS | {"in_features", "x_stride", "y_stride"},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        folder=tmp_path,
    )
    check(compiled)
    assert compiled.count(*TENSOR_CORE) > 0
    wide = [name for name in compiled.instructions if name.startswith("LDGSTS") and name.endswith(".128")]
    assert wide, compiled.instructions


@pytest.mark.parametrize("capability", [80, 90])
def test_sum_of_parts_keeps_to_registers(capability: int, tmp_path: Path) -> None:
    pointers = {name: POINTERS[name] for name in ("y_ptr", "parts_ptr", *BIASES)}
    constants = {"HAS_BIAS": True, "MAX_SPLITS": MAX_SPLITS, "BLOCK_N": SUM_COLUMNS}
    options = {"divisible": WIDTHS | {"y_stride"}, "num_warps": 4, "num_stages": 1, "folder": tmp_path}
    check(compile_for(capability, sum_parts_kernel, pointers, constants, **options))
