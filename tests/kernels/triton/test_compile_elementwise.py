"""The elementwise kernels of an 8B step compile for A100 and H100: whole vectors, no spills."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

import torch

from lora_kernels.attention.batch import LayerCache, Rotation
from lora_kernels.attention.triton_launch import rotate_and_store_triton
from lora_kernels.elementwise.launcher import add_rms_norm, rms_norm, rope_in_place, silu_mul
from support.kernels.triton_compile import SPILLS
from support.kernels.triton_launches import recorded_launches
from support.models.llama_step import paged_batch


@pytest.mark.parametrize("capability", [80, 90])
def test_norms_rotations_and_gates_read_whole_vectors(capability: int, tmp_path: Path) -> None:
    weight, qkv = torch.ones(4096, dtype=torch.bfloat16), torch.zeros(1, 5, 6144, dtype=torch.bfloat16)
    angles = torch.zeros(1, 5, 128, dtype=torch.bfloat16)
    with recorded_launches(capability) as launches:
        rms_norm(qkv[..., :4096].contiguous(), weight, 1e-5)
        rms_norm(qkv[..., :4096].view(1, 5, 32, 128), weight[:128], 1e-5)
        silu_mul(torch.zeros(5, 2 * 14336, dtype=torch.bfloat16))
        rope_in_place(qkv[..., :4096].view(1, 5, 32, 128).transpose(1, 2), angles, angles)
    assert [launch.name for launch in launches] == ["rms_norm_kernel"] * 2 + ["silu_mul_kernel", "rope_kernel"]
    for launch in launches:
        compiled = launch.compile_for(capability, tmp_path)
        assert compiled.stack_bytes == 0, launch.name
        assert compiled.count(*SPILLS) == 0, launch.name
        assert compiled.count("STG.E.U16") == 0, (launch.name, compiled.instructions)
        assert compiled.count("LDG.E.U16") <= 1, (launch.name, compiled.instructions)  # a short row's weight
        assert compiled.shared_bytes <= 16 * 1024, launch.name


@pytest.mark.parametrize("capability", [90])
def test_sums_with_norms_and_rotations_with_stores_keep_to_registers(capability: int) -> None:
    x, weight = torch.zeros(1, 5, 4096, dtype=torch.bfloat16), torch.ones(4096, dtype=torch.bfloat16)
    cache = LayerCache(*(torch.zeros(4, 8, 16, 128, dtype=torch.bfloat16) for _ in range(2)))
    q, k, v = (torch.zeros(5, heads, 128, dtype=torch.bfloat16).transpose(0, 1) for heads in (32, 8, 8))
    angles = torch.zeros(5, 128, dtype=torch.bfloat16)
    with recorded_launches(capability) as launches:
        add_rms_norm(x, x, weight, 1e-5)
        rotate_and_store_triton(q, k, v, cache, batch=paged_batch([1] * 5, [9] * 5), rotation=Rotation(angles, angles))
    assert [launch.name for launch in launches] == ["add_rms_norm_kernel", "rotated_store_kernel"]
    for launch in launches:
        compiled = launch.compile_for(capability)
        assert compiled.stack_bytes == 0, launch.name
        assert compiled.count(*SPILLS) == 0, launch.name
        assert compiled.count("STG.E.U16") == 0, (launch.name, compiled.instructions)
