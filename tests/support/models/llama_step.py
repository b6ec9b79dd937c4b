"""One Llama-8B layer's operations on a packed batch, called through the launchers as the model's step calls them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.roofline import MODELS
from lora_kernels.attention.batch import AttentionRule, LayerCache, PagedBatch
from lora_kernels.attention.launcher import paged_attention
from lora_kernels.elementwise.launcher import rms_norm, rope_in_place, silu_mul
from lora_kernels.lora.batch import LoraBatch, LoraGroup, LoraTable
from lora_kernels.lora.launcher import add_lora_delta
from lora_kernels.nf4.launcher import nf4_linear
from lora_kernels.nf4.weight import NESTED_BLOCK, NF4_BLOCK, Nf4Weight

SHAPE = MODELS["8b"]
HEAD_DIM = SHAPE.hidden // SHAPE.heads
PAGE, NUM_BLOCKS = 16, 8
DTYPE = torch.bfloat16
GROUPS = tuple(
    LoraGroup(tuple(range(first, first + len(group.out_features))), group.in_features, group.out_features)
    for first, group in zip((0, 3, 4, 6), SHAPE.groups.values(), strict=True)
)


@cache
def table_of(ranks: tuple[int, ...], factored: tuple[int, ...] = (), int8: tuple[int, ...] = ()) -> LoraTable:
    """One adapter per rank on all groups; they share the arena's beginning, which nothing here reads. factored: slots
    with DoRA's factors. int8: slots of bytes."""
    widest = max(group.in_features + max(group.out_features) for group in GROUPS)
    table = LoraTable(torch.zeros(max(ranks) * widest, dtype=DTYPE), 7, len(ranks))
    for slot, rank in enumerate(ranks):
        places = [(row, 0, rank * GROUPS[0].in_features, rank, 1.0) for row in range(7)]
        factors = [(row, 64) for row in range(7)] if slot in factored else []
        table.set_slot(slot, 0, places, factors=factors, is_int8=slot in int8)
    return table


@cache
def _caches() -> LayerCache:
    shape = (NUM_BLOCKS, SHAPE.kv_heads, PAGE, HEAD_DIM)
    return LayerCache(torch.zeros(shape, dtype=DTYPE), torch.zeros(shape, dtype=DTYPE))


@cache
def _codes() -> tuple[torch.Tensor, torch.Tensor]:
    """Shared by all weights, as `nf4_weights` makes it for a group."""
    return torch.zeros(16), torch.zeros(256)


@cache
def _nf4(out: int, inputs: int) -> Nf4Weight:
    blocks = out * inputs // NF4_BLOCK
    code, floats = _codes()
    return Nf4Weight(
        torch.zeros(out * inputs // 2, dtype=torch.uint8),
        code,
        torch.zeros(blocks, dtype=torch.uint8),
        out,
        inputs,
        floats,
        torch.zeros(-(-blocks // NESTED_BLOCK)),
        torch.zeros(()),
    )


def paged_batch(counts: Sequence[int], contexts: Sequence[int]) -> PagedBatch:
    """counts: tokens of each sequence in this step; contexts: its tokens in the cache after it."""
    starts = np.cumsum([0, *counts]).astype(np.int32)
    total = int(starts[-1])
    return PagedBatch(
        query_starts=starts,
        context_lens=np.array(contexts, dtype=np.int32),
        block_tables=np.zeros((len(counts), -(-max(contexts) // PAGE)), dtype=np.int32),
        slot_mapping_T=torch.zeros(total, dtype=torch.int64),
        positions_T=np.zeros(total, dtype=np.int32),
        sequences_T=np.repeat(np.arange(len(counts)), counts).astype(np.int32),
        block_size=PAGE,
    )


def run_layer(
    batch: PagedBatch, table: LoraTable, row_slots: NDArray[np.int32], *, nf4: bool = False, window: int = 0
) -> None:
    """Everything of a layer that our kernels do. row_slots [T]."""
    tokens = len(row_slots)
    adapters = LoraBatch(table, row_slots) if bool((row_slots >= 0).any()) else None
    x = torch.zeros(1, tokens, SHAPE.hidden, dtype=DTYPE)
    normed = rms_norm(x, torch.ones(SHAPE.hidden, dtype=DTYPE), 1e-5)
    for group in GROUPS:
        x_TH = normed[0] if group.in_features == SHAPE.hidden else torch.zeros(tokens, group.in_features, dtype=DTYPE)
        if nf4 and tokens <= 64:
            y = nf4_linear(
                x_TH, [_nf4(out, group.in_features) for out in group.out_features], [None] * len(group.out_features)
            )
        else:
            y = torch.zeros(tokens, sum(group.out_features), dtype=DTYPE)
        add_lora_delta(y, x_TH, adapters, group)
        if group is GROUPS[0]:
            _attend(y, batch, window)
        if group is GROUPS[2]:
            silu_mul(y)


def _attend(qkv: torch.Tensor, batch: PagedBatch, window: int) -> None:
    tokens, kv_width = len(qkv), SHAPE.kv_heads * HEAD_DIM
    q, k, v = (
        part.view(1, tokens, -1, HEAD_DIM).transpose(1, 2)
        for part in qkv.split([SHAPE.hidden, kv_width, kv_width], dim=1)
    )
    angles = torch.zeros(1, tokens, HEAD_DIM, dtype=DTYPE)
    rope_in_place(q, angles, angles)
    rope_in_place(k, angles, angles)
    paged_attention(q[0], k[0], v[0], _caches(), batch=batch, rule=AttentionRule(0.1, window=window))
