"""Launches store_kv and paged attention: chooses tiles and how often to split a context. Knows shapes; no kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lora_kernels.attention.batch import AttentionRule, LayerCache, PagedBatch, Rotation
from lora_kernels.attention.flash_paged import attention_kernel, join_splits_kernel, store_kv_kernel
from lora_kernels.attention.query_tiles import AttentionTiles, QueryTiles
from lora_kernels.attention.rotated_store import rotated_store_kernel
from lora_kernels.triton_common.tiles import AttentionTile, device_tiles, power_of_two

MAX_SPLITS = 16
MIN_KEYS_PER_SPLIT = 256
UNEVEN = 16  # times as many programs for decode rows as fill the device: most rows leave theirs unused at once
MAX_KEYS_FACTOR = 8


def paged_attention_triton(
    q_HTD: torch.Tensor,
    k_HTD: torch.Tensor,
    v_HTD: torch.Tensor,
    cache: LayerCache,
    *,
    batch: PagedBatch,
    rule: AttentionRule,
    rotation: Rotation | None = None,
) -> torch.Tensor:
    """Store k and v, then attend. Shapes as in `attention.launcher.paged_attention`. Returns [T, q_heads, D]."""
    assert all(tensor.stride(2) == 1 for tensor in (q_HTD, k_HTD, v_HTD)), "a head's values are contiguous"
    assert cache.keys.is_contiguous(), "the kernels compute the cache's strides"
    assert cache.values.is_contiguous(), "the kernels compute the cache's strides"
    if rotation is None:
        store_kv_triton(k_HTD, v_HTD, cache, batch)
    else:
        rotate_and_store_triton(q_HTD, k_HTD, v_HTD, cache, batch=batch, rotation=rotation)
    q_heads, num_tokens, head_dim = q_HTD.shape
    out_THD = q_HTD.new_empty(num_tokens, q_heads, head_dim)
    group = q_heads // len(k_HTD)
    table = device_tiles(q_HTD.device).tiles
    chosen = {
        decode: table.attention(head_dim=head_dim, group=group, num_bytes=q_HTD.element_size(), decode=decode)
        for decode in (True, False)
    }
    tiles = batch.attention_tiles(group, chosen[True].block_m, chosen[False].block_m, q_HTD.device)
    for queries, tile in ((tiles.decode, chosen[True]), (tiles.prefill, chosen[False])):
        if len(queries):
            _attend(_Launch(out_THD, q_HTD, cache, tiles, queries, tile), rule)
    return out_THD


def store_kv_triton(k_HTD: torch.Tensor, v_HTD: torch.Tensor, cache: LayerCache, batch: PagedBatch) -> None:
    """Write each token's keys and values to its slot."""
    kv_heads, num_tokens, head_dim = k_HTD.shape
    store_kv_kernel[(num_tokens,)](
        cache.keys,
        cache.values,
        k_HTD,
        v_HTD,
        batch.slot_mapping_T,
        *k_HTD.stride()[:2],
        *v_HTD.stride()[:2],
        KV_HEADS=kv_heads,
        BLOCK_H=power_of_two(kv_heads),
        HEAD_DIM=head_dim,
        BLOCK_D=power_of_two(head_dim),
        PAGE=batch.block_size,
        num_warps=4,
    )


def rotate_and_store_triton(
    q_HTD: torch.Tensor,
    k_HTD: torch.Tensor,
    v_HTD: torch.Tensor,
    cache: LayerCache,
    *,
    batch: PagedBatch,
    rotation: Rotation,
) -> None:
    """Rotate q in place; write each token's rotated keys, and its values, to its slot. A padding token does nothing."""
    kv_heads, num_tokens, head_dim = k_HTD.shape
    group, half = len(q_HTD) // kv_heads, rotation.cos_TR.shape[1] // 2
    rotated_store_kernel[num_tokens, kv_heads](
        cache.keys,
        cache.values,
        q_HTD,
        k_HTD,
        v_HTD,
        rotation.cos_TR.contiguous(),
        rotation.sin_TR.contiguous(),
        batch.slot_mapping_T,
        *q_HTD.stride()[:2],
        *k_HTD.stride()[:2],
        *v_HTD.stride()[:2],
        KV_HEADS=kv_heads,
        GROUP=group,
        BLOCK_G=power_of_two(group),
        HEAD_DIM=head_dim,
        BLOCK_D=power_of_two(head_dim),
        HALF=half,
        BLOCK_H=power_of_two(half),
        PAGE=batch.block_size,
        num_warps=1,
    )


def num_splits(programs: int, max_context: int, target_programs: int) -> int:
    """Stretches of a long context, so that a few sequences keep the whole device busy."""
    return max(1, min(-(-target_programs // programs), -(-max_context // MIN_KEYS_PER_SPLIT), MAX_SPLITS))


@dataclass(frozen=True, slots=True)
class _Launch:
    """One kind of tiles of one layer."""

    out_THD: torch.Tensor
    q_HTD: torch.Tensor
    cache: LayerCache
    tiles: AttentionTiles
    queries: QueryTiles
    tile: AttentionTile

    @property
    def kv_heads(self) -> int:
        return self.cache.keys.shape[1]

    @property
    def constants(self) -> dict[str, Any]:
        return {
            "KV_HEADS": self.kv_heads,
            "GROUP": len(self.q_HTD) // self.kv_heads,
            "HEAD_DIM": self.q_HTD.shape[2],
            "BLOCK_D": self.tile.block_d,
            "BLOCK_M": self.tile.block_m,
            "BLOCK_N": self.tile.block_n,
        }

    def cut(self, max_context: int, target_programs: int) -> tuple[int, int]:
        """How many splits a tile may have, and the least keys of one.

        Decode rows may differ in length by any factor, and a recorded step does not know theirs. So each may have many
        splits; a row has as many as its own keys fill. The more rows there are, the longer is a split."""
        programs = len(self.queries) * self.kv_heads
        if self.queries is not self.tiles.decode:
            return num_splits(programs, max_context, target_programs), MIN_KEYS_PER_SPLIT
        factor = min(max(4 * programs // target_programs, 1), MAX_KEYS_FACTOR)
        return num_splits(programs, max_context, UNEVEN * target_programs), factor * MIN_KEYS_PER_SPLIT


def _attend(launch: _Launch, rule: AttentionRule) -> None:
    q, out = launch.q_HTD, launch.out_THD
    seen = launch.queries.max_context
    if rule.window > 0:
        seen = min(seen, rule.window + launch.tile.block_m)
    splits, min_keys = launch.cut(seen, device_tiles(q.device).target_programs)
    rows = len(launch.queries) * launch.kv_heads * launch.tile.block_m
    parts, sums = out, out
    if splits > 1:
        parts = torch.empty(splits * rows, out.shape[2], dtype=torch.float32, device=out.device)
        sums = torch.empty(splits * rows, dtype=torch.float32, device=out.device)
    attention_kernel[launch.kv_heads * splits, len(launch.queries)](
        out,
        parts,
        sums,
        q,
        launch.cache.keys,
        launch.cache.values,
        launch.tiles.block_tables,
        launch.queries.records,
        splits,
        min_keys,
        q.stride(0),
        q.stride(1),
        rule.scale,
        rule.window,
        rule.softcap,
        **launch.constants,
        PAGE=launch.cache.keys.shape[2],
        HAS_WINDOW=rule.window > 0,
        HAS_SOFTCAP=rule.softcap > 0,
        SPLIT=splits > 1,
        num_warps=launch.tile.num_warps,
        num_stages=launch.tile.num_stages,
    )
    if splits > 1:
        join_splits_kernel[launch.tile.block_m, launch.kv_heads, len(launch.queries)](
            out,
            parts,
            sums,
            launch.queries.records,
            splits,
            min_keys,
            rule.window,
            **launch.constants,
            HAS_WINDOW=rule.window > 0,
            MAX_SPLITS=MAX_SPLITS,
            num_warps=4,
        )
