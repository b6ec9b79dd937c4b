"""Every tile of shrink and expand compiles for A100 and H100: whole vectors, tensor cores, no spills."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from lora_kernels.lora.one_launch import one_launch_kernel
from lora_kernels.lora.row_tiles import MIN_RANK_BLOCK
from lora_kernels.lora.shrink_expand import expand_kernel, shrink_kernel
from lora_kernels.triton_common.tiles import DECODE_ROWS, SM_80, TILES
from support.kernels.triton_compile import SMALLEST_SHARED_LIMIT, SPILLS, TENSOR_CORE, Compiled, compile_for

POINTERS = {"h_ptr": "*fp32", "offsets_ptr": "*i64", "ranks_ptr": "*i32", "records_ptr": "*i32", "rows_ptr": "*i32"}
CASES = [(tile, "bf16", 3) for tile in SM_80.lora]
CASES += [((16, 16), "fp16", 1), ((64, 64), "fp32", 2)]
SPECIAL = {"int8_ptr": "*u8", "factors_ptr": "*i64", "bias_ptr": "*bf16"}
WHOLE = {"LDGSTS.E.BYPASS.128", "LDGSTS.E.BYPASS.LTC128B.128"}
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


def check(compiled: Compiled, dtype: str) -> None:
    assert compiled.shared_bytes <= SMALLEST_SHARED_LIMIT
    assert compiled.stack_bytes == 0
    assert compiled.count(*SPILLS) == 0
    assert dtype == "fp32" or compiled.count(*TENSOR_CORE) > 0


def shrink(
    capability: int,
    key: tuple[int, int],
    dtype: str,
    members: int,
    *,
    even: bool = True,
    overlaps: bool = False,
    special: dict[str, str] | None = None,
    folder: Path,
) -> Compiled:
    tile = TILES[capability].lora[key].for_element(BYTES[dtype])
    block_m, rank_block = key
    return compile_for(
        capability,
        shrink_kernel,
        POINTERS | {"x_ptr": f"*{dtype}", "arena_ptr": f"*{dtype}"} | (special or {}),
        {
            "MEMBERS": members,
            "BLOCK_M": block_m,
            "BLOCK_R": rank_block,
            "BLOCK_K": tile.shrink_k,
            "EVEN_K": even,
            "ALIGNED": True,
            "OVERLAPPED": overlaps,
        },
        divisible={"in_features", "x_stride"},
        num_warps=tile.shrink_warps,
        num_stages=tile.shrink_stages,
        folder=folder,
    )


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("key", "dtype", "members"), CASES, ids=str)
def test_shrink_streams_whole_vectors_to_tensor_cores(
    capability: int, key: tuple[int, int], dtype: str, members: int, tmp_path: Path
) -> None:
    for even in (True, False) if key[1] == 16 else (True,):
        compiled = shrink(capability, key, dtype, members, even=even, folder=tmp_path)
        check(compiled, dtype)
        assert {op for op in compiled.instructions if op.startswith("LDGSTS")} <= WHOLE
        assert compiled.count("LDGSTS") > 0


def expand(
    capability: int,
    key: tuple[int, int],
    dtype: str,
    members: int,
    *,
    overlaps: bool = False,
    special: dict[str, str] | None = None,
    folder: Path,
) -> Compiled:
    tile = TILES[capability].lora[key].for_element(BYTES[dtype])
    return compile_for(
        capability,
        expand_kernel,
        POINTERS | {"y_ptr": f"*{dtype}", "arena_ptr": f"*{dtype}", "scales_ptr": "*fp32"} | (special or {}),
        {
            "MEMBERS": members,
            "BLOCK_M": key[0],
            "BLOCK_R": tile.expand_r,
            "BLOCK_N": tile.expand_n,
            "SPLITS_AT_ONCE": tile.splits_at_once,
            "ALIGNED": True,
            "OVERLAPPED": overlaps,
        },
        divisible={"out0", "out1", "out2", "y_stride"},
        num_warps=tile.expand_warps,
        num_stages=2,
        folder=folder,
    )


def check_vectors(compiled: Compiled) -> None:
    assert compiled.instructions["LDG.E.128"] > compiled.instructions["LDG.E.U16"]
    assert compiled.instructions["STG.E.128"] == compiled.count("STG")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("key", "dtype", "members"), CASES, ids=str)
def test_expand_reads_and_writes_whole_vectors(
    capability: int, key: tuple[int, int], dtype: str, members: int, tmp_path: Path
) -> None:
    compiled = expand(capability, key, dtype, members, folder=tmp_path)
    check(compiled, dtype)
    check_vectors(compiled)


@pytest.mark.parametrize(("capability", "key"), [(80, (16, 16)), (90, (16, 16)), (90, (64, 64))], ids=str)
def test_kernels_for_int8_and_dora_read_whole_vectors_and_keep_enough_bytes_in_flight(
    capability: int, key: tuple[int, int], tmp_path: Path
) -> None:
    """Bytes come as wide as the others' elements, and each output is written once."""
    plain, tile = expand(capability, key, "bf16", 3, folder=tmp_path), TILES[capability].lora[key]
    shrunk = shrink(capability, key, "bf16", 3, special={"int8_ptr": "*u8"}, folder=tmp_path)
    expanded = expand(capability, key, "bf16", 3, special=SPECIAL, folder=tmp_path)
    for compiled in (shrunk, expanded):
        check(compiled, "bf16")
    assert {op for op in shrunk.instructions if op.startswith("LDGSTS")} <= WHOLE
    stage = tile.shrink_k * (key[1] + 2 * key[0])  # of A's bytes, and of x
    at_once = (tile.shrink_stages - 1) * stage * shrunk.programs_per_multiprocessor(capability)
    assert at_once >= 64 * 1024, "a multiprocessor needs some 40"
    check_vectors(expanded)
    assert expanded.count("STG") == plain.count("STG")
    assert expanded.programs_per_multiprocessor(capability) >= plain.programs_per_multiprocessor(capability)


@pytest.mark.parametrize("key", [(16, 16), (16, 64)], ids=str)
def test_overlapped_launches_tell_and_wait_on_sm_90(key: tuple[int, int], tmp_path: Path) -> None:
    """PREEXIT lets the next kernel start, ACQBULK waits for the one before."""
    first = shrink(90, key, "bf16", 3, overlaps=True, folder=tmp_path)
    second = expand(90, key, "bf16", 3, overlaps=True, folder=tmp_path)
    for compiled in (first, second):
        check(compiled, "bf16")
    assert (first.count("PREEXIT"), first.count("ACQBULK")) == (1, 0)
    assert second.count("PREEXIT") == 0
    assert second.count("ACQBULK") >= 1
    check_vectors(second)
    assert expand(90, key, "bf16", 3, folder=tmp_path).count("ACQBULK") == 0


@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_one_launch_streams_a_and_spills_nothing(capability: int, dtype: str, tmp_path: Path) -> None:
    tile = TILES[capability].one_launch
    compiled = compile_for(
        capability,
        one_launch_kernel,
        {name: of for name, of in POINTERS.items() if name != "h_ptr"}
        | {"scales_ptr": "*fp32", **dict.fromkeys(("x_ptr", "y_ptr", "arena_ptr"), f"*{dtype}")},
        {
            "BLOCK_M": DECODE_ROWS,
            "BLOCK_R": MIN_RANK_BLOCK,
            "BLOCK_K": tile.block_k,
            "BLOCK_N": tile.block_n,
            "EVEN_K": True,
            "ALIGNED": True,
        },
        divisible={"out0", "out1", "out2", "in_features", "x_stride", "y_stride"},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        folder=tmp_path,
    )
    check(compiled, dtype)
    check_vectors(compiled)
    assert compiled.count("LDGSTS.E.BYPASS") == compiled.count("LDGSTS") > 0
