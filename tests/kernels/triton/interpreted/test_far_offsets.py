"""Every kernel reaches beyond 2^31 elements: arenas, caches and activations of a large GPU hold more.

The tensors are mapped, not filled: only the pages that a test writes take memory.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_kernels.attention.batch import AttentionRule, LayerCache, PagedBatch
from lora_kernels.attention.reference import attention_reference
from lora_kernels.attention.triton_launch import paged_attention_triton
from lora_kernels.elementwise.launcher import rms_norm
from lora_kernels.elementwise.reference import rms_norm_reference
from lora_kernels.lora.batch import LoraBatch, LoraGroup, LoraTable
from lora_kernels.lora.reference import lora_delta_reference
from lora_kernels.lora.triton_launch import add_lora_delta_triton
from lora_kernels.triton_common.available import triton_switch
from support.kernels.triton_cases import normal, relative_error

FAR = 2**31
DTYPE = torch.bfloat16
MAPS_ITS_TENSORS = True


def test_an_adapter_at_the_end_of_a_large_arena() -> None:
    group = LoraGroup((0,), 128, (64,))
    table = LoraTable(torch.empty(FAR + 8192, dtype=DTYPE), 1, 1)
    table.set_slot(0, FAR, [(0, 64, 64 + 8 * 128, 8, 1.5)])
    table.arena[FAR : FAR + 8192] = normal(8192, dtype=DTYPE)
    x, batch = normal(3, 128, dtype=DTYPE), LoraBatch(table, np.zeros(3, dtype=np.int32))
    got = add_lora_delta_triton(torch.zeros(3, 64, dtype=DTYPE), x, batch, group)
    assert relative_error(got, lora_delta_reference(x, batch, group)) < 0.01


def test_rows_that_lie_far_apart() -> None:
    group = LoraGroup((0,), 128, (64,))
    table = LoraTable(normal(8192, dtype=DTYPE), 1, 1)
    table.set_slot(0, 0, [(0, 64, 64 + 8 * 128, 8, 1.5)])
    stride = 2**30 + 64
    x, y = (torch.empty(2 * stride + 128, dtype=DTYPE).as_strided((3, width), (stride, 1)) for width in (128, 64))
    x.copy_(normal(3, 128, dtype=DTYPE))
    y.zero_()
    batch = LoraBatch(table, np.zeros(3, dtype=np.int32))
    assert relative_error(add_lora_delta_triton(y, x, batch, group), lora_delta_reference(x, batch, group)) < 0.01


@pytest.mark.parametrize("context", [20, 600])
def test_blocks_at_the_end_of_a_large_cache(context: int) -> None:
    page, head_dim = 16, 64
    num_blocks = FAR // (page * head_dim) + 64
    cache = LayerCache(*(torch.empty(num_blocks, 1, page, head_dim, dtype=DTYPE) for _ in range(2)))
    k, v = (normal(context, 1, head_dim, dtype=DTYPE, seed=seed) for seed in (1, 2))
    table = np.arange(num_blocks - 64, num_blocks - 64 + -(-context // page), dtype=np.int32)[None]
    for position in range(context - 1):
        cache.keys[int(table[0, position // page]), :, position % page] = k[position]
        cache.values[int(table[0, position // page]), :, position % page] = v[position]
    batch = PagedBatch(
        query_starts=np.array([0, 1], dtype=np.int32),
        context_lens=np.array([context], dtype=np.int32),
        block_tables=table,
        slot_mapping_T=torch.tensor([int(table[0, -1]) * page + (context - 1) % page]),
        positions_T=np.array([context - 1], dtype=np.int32),
        sequences_T=np.zeros(1, dtype=np.int32),
        block_size=page,
    )
    q = normal(1, 2, head_dim, dtype=DTYPE)
    arguments = (part.transpose(0, 1) for part in (q, k[-1:], v[-1:]))
    got = paged_attention_triton(*arguments, cache, batch=batch, rule=AttentionRule(0.2))
    assert relative_error(got, attention_reference(q, k, v, scale=0.2)) < 0.01


def test_norms_of_rows_beyond_two_to_the_31() -> None:
    x = torch.empty(2**31 + 2048, dtype=DTYPE).as_strided((1, 2, 1, 64), (0, 2**31, 64, 1))
    x.copy_(normal(1, 2, 1, 64, dtype=DTYPE))
    weight = normal(64, dtype=DTYPE)
    triton_switch().on_cpu = True
    try:
        got = rms_norm(x, weight, 1e-6)
    finally:
        triton_switch().on_cpu = False
    assert relative_error(got, rms_norm_reference(x, weight, 1e-6)) < 0.01
