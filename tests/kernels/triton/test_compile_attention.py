"""Every tile of paged attention compiles for A100 and H100: whole vectors, tensor cores, no spills."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from lora_kernels.attention.flash_paged import attention_kernel, join_splits_kernel, store_kv_kernel
from lora_kernels.attention.triton_launch import MAX_SPLITS
from lora_kernels.triton_common.tiles import TILES, power_of_two
from support.kernels.triton_compile import SMALLEST_SHARED_LIMIT, SPILLS, TENSOR_CORE, Compiled, compile_for

FLOATS = {"scale": "fp32", "softcap": "fp32"}
SHAPES = [(64, 4), (96, 1), (128, 4), (128, 7), (256, 2)]  # head size, query heads per key head


def check(compiled: Compiled) -> None:
    assert compiled.shared_bytes <= SMALLEST_SHARED_LIMIT
    assert compiled.stack_bytes == 0
    assert compiled.count(*SPILLS) == 0


def heads(head_dim: int, group: int) -> dict[str, int]:
    return {"KV_HEADS": 8, "GROUP": group, "HEAD_DIM": head_dim, "BLOCK_D": power_of_two(head_dim)}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("head_dim", "group"), SHAPES)
@pytest.mark.parametrize("decode", [True, False], ids=["decode", "prefill"])
def test_attention_streams_whole_vectors_to_tensor_cores(
    capability: int, head_dim: int, group: int, decode: bool, tmp_path: Path
) -> None:
    tile = TILES[capability].attention(head_dim=head_dim, group=group, num_bytes=2, decode=decode)
    special = head_dim in (96, 256)  # Phi-3 and Gemma
    compiled = compile_for(
        capability,
        attention_kernel,
        dict.fromkeys(("out_ptr", "q_ptr", "key_cache_ptr", "value_cache_ptr"), "*bf16")
        | {"parts_ptr": "*fp32", "sums_ptr": "*fp32", "tables_ptr": "*i32", "records_ptr": "*i32"}
        | FLOATS,
        heads(head_dim, group)
        | {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "PAGE": 16}
        | {"HAS_WINDOW": special, "HAS_SOFTCAP": special, "SPLIT": decode},
        divisible={"q_head_stride", "q_token_stride"},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        folder=tmp_path,
    )
    check(compiled)
    assert compiled.count(*TENSOR_CORE) > 0
    wide = compiled.count("LDGSTS.E.BYPASS.128", "LDGSTS.E.BYPASS.LTC128B.128", "LDG.E.128")
    assert wide >= 4
    assert compiled.count("LDG.E.U16") == 0


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("head_dim", "group"), [(80, 1), (256, 2)])
def test_store_and_join_keep_to_registers(capability: int, head_dim: int, group: int, tmp_path: Path) -> None:
    shape = heads(head_dim, group)
    store = compile_for(
        capability,
        store_kv_kernel,
        dict.fromkeys(("key_cache_ptr", "value_cache_ptr", "k_ptr", "v_ptr"), "*bf16") | {"slots_ptr": "*i64"},
        {name: value for name, value in shape.items() if name != "GROUP"} | {"BLOCK_H": 8, "PAGE": 16},
        divisible={"k_head_stride", "k_token_stride", "v_head_stride", "v_token_stride"},
        num_warps=4,
        num_stages=1,
        folder=tmp_path,
    )
    check(store)
    assert store.count("STG.E.U16") == 0
    join = compile_for(
        capability,
        join_splits_kernel,
        {"out_ptr": "*bf16", "parts_ptr": "*fp32", "sums_ptr": "*fp32", "records_ptr": "*i32"},
        shape | {"BLOCK_M": 16, "BLOCK_N": 64, "HAS_WINDOW": False, "MAX_SPLITS": MAX_SPLITS},
        divisible=set(),
        num_warps=4,
        num_stages=1,
        folder=tmp_path,
    )
    check(join)
