"""Launches shrink and expand: chooses tiles and how often to split K. Knows shapes; holds no kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lora_kernels.lora.batch import MAX_MEMBERS, LoraBatch, LoraGroup
from lora_kernels.lora.one_launch import one_launch_kernel
from lora_kernels.lora.row_tiles import MIN_RANK_BLOCK
from lora_kernels.lora.shrink_expand import expand_kernel, shrink_kernel
from lora_kernels.triton_common.tiles import ALIGN_BYTES, DECODE_ROWS, LoraTile, OneLaunchTile, device_tiles

Special = tuple[torch.Tensor | None, ...]  # which slots are int8, where factors are, the group's bias; None: none
MAX_SPLITS = 16
MIN_BLOCKS_PER_SPLIT = 2
H_RANKS = 16  # h's rows are padded to a multiple of it


def add_lora_delta_triton(
    y_TO: torch.Tensor,
    x_TH: torch.Tensor,
    batch: LoraBatch,
    group: LoraGroup,
    bias_O: torch.Tensor | None = None,
) -> torch.Tensor:
    """y += scale * (x A^T) B for each row's own adapter, in place. y_TO: [T, sum(out_features)], x_TH: [T, H], last
    axes contiguous. bias_O: what y holds of it, which DoRA's factors leave alone. Launches nothing if no row's adapter
    touches the group. If one is int8 or has factors, the kernels for such are launched, in the same two launches."""
    if not batch.touches(group):
        return y_TO
    assert x_TH.stride(1) == 1, "x's features are contiguous"
    assert y_TO.stride(1) == 1, "y's features are contiguous"
    tiles = batch.row_tiles
    chosen = device_tiles(x_TH.device)
    is_special = batch.is_special(group)
    if not is_special and _takes_one_launch(batch, group, chosen.tiles.one_launch):
        _one_launch(y_TO, x_TH, batch, group, chosen.tiles.one_launch)
        return y_TO
    tile = chosen.tiles.lora[tiles.block_m, tiles.rank_block].for_element(x_TH.element_size())
    members = len(group.module_rows)
    splits = num_splits(tiles.num_tiles * members, group.in_features, tile.shrink_k, chosen.target_programs)
    h_rank_blocks = -(-tiles.max_rank // H_RANKS)
    h = tiles.scratch(splits * len(tiles.rows) * members * h_rank_blocks * H_RANKS)
    special: Special = (batch.device_int8, batch.table.factors, bias_O) if is_special else (None, None, None)
    shared = _Shared(batch, group, h, h_rank_blocks, splits, chosen.tiles.overlaps, special)
    _shrink(x_TH, shared, tile)
    _expand(y_TO, shared, tile)
    return y_TO


def num_splits(programs: int, in_features: int, block_k: int, target_programs: int) -> int:
    """Stretches of K, so that a few rows on a few adapters keep the whole device busy."""
    wanted = -(-target_programs // programs)
    possible = -(-in_features // (block_k * MIN_BLOCKS_PER_SPLIT))
    return max(1, min(wanted, possible, MAX_SPLITS))


def most_scratch(num_rows: int, max_rank: int, device: torch.device) -> int:
    """Elements of float32 that suffice for every group, whatever K, on tiles of one row each. Rises with both."""
    columns = num_rows * MAX_MEMBERS
    split_columns = min(MAX_SPLITS * columns, device_tiles(device).target_programs + columns)
    return split_columns * -(-max_rank // H_RANKS) * H_RANKS


@dataclass(frozen=True, slots=True)
class _Shared:
    """Arguments shared by both launches of one group."""

    batch: LoraBatch
    group: LoraGroup
    h: torch.Tensor
    h_rank_blocks: int
    splits: int
    overlaps: bool
    special: Special

    @property
    def pointers(self) -> tuple[torch.Tensor, ...]:
        table = self.batch.table
        return table.arena, table.offsets, table.ranks

    @property
    def rows(self) -> tuple[Any, ...]:
        return _rows(self.batch, self.group)

    @property
    def split_layout(self) -> tuple[int, int, int]:
        return len(self.batch.row_tiles.rows), self.h_rank_blocks, self.splits

    @property
    def options(self) -> dict[str, Any]:
        tiles = self.batch.row_tiles
        return {
            "MEMBERS": len(self.group.module_rows),
            "BLOCK_M": tiles.block_m,
            "ALIGNED": self.batch.table.is_aligned_to(ALIGN_BYTES),
            "OVERLAPPED": self.overlaps,
        }


def _rows(batch: LoraBatch, group: LoraGroup) -> tuple[Any, ...]:
    tiles = batch.row_tiles
    return tiles.records, tiles.rows, batch.table.num_slots, *padded(group.module_rows)


def padded(values: tuple[int, ...]) -> tuple[int, int, int]:
    """A group's values for the kernels' three members."""
    first, second, third = (*values, 0, 0)[:3]
    return first, second, third


def _shrink(x_TH: torch.Tensor, shared: _Shared, tile: LoraTile) -> None:
    in_features = shared.group.in_features
    grid = (len(shared.group.module_rows) * shared.splits, shared.batch.row_tiles.num_tiles)
    shrink_kernel[grid](
        shared.h,
        x_TH,
        *shared.pointers,
        shared.special[0],
        *shared.rows,
        in_features,
        x_TH.stride(0),
        *shared.split_layout,
        **shared.options,
        BLOCK_R=shared.batch.row_tiles.rank_block,
        BLOCK_K=tile.shrink_k,
        EVEN_K=in_features % tile.shrink_k == 0,
        num_warps=tile.shrink_warps,
        num_stages=tile.shrink_stages,
    )


def _expand(y_TO: torch.Tensor, shared: _Shared, tile: LoraTile) -> None:
    outs = shared.group.out_features
    grid = (sum(-(-out // tile.expand_n) for out in outs), shared.batch.row_tiles.num_tiles)
    expand_kernel[grid](
        y_TO,
        shared.h,
        *shared.pointers,
        shared.batch.table.scales,
        *shared.special,
        *shared.rows,
        *padded(outs),
        y_TO.stride(0),
        *shared.split_layout,
        **shared.options,
        BLOCK_R=tile.expand_r,
        BLOCK_N=tile.expand_n,
        SPLITS_AT_ONCE=tile.splits_at_once,
        num_warps=tile.expand_warps,
        num_stages=2,
        **({"launch_pdl": True} if shared.overlaps else {}),
    )


def _takes_one_launch(batch: LoraBatch, group: LoraGroup, tile: OneLaunchTile) -> bool:
    is_decode = batch.row_tiles.block_m == DECODE_ROWS and batch.table.arena.element_size() == 2
    return is_decode and one_launch_bytes(batch, group, tile) < tile.max_bytes


def one_launch_bytes(batch: LoraBatch, group: LoraGroup, tile: OneLaunchTile) -> int:
    """Bytes of A that one launch reads: each block of columns reads its member's whole A, at the largest rank."""
    tiles = batch.row_tiles
    programs = tiles.num_tiles * sum(-(-out // tile.block_n) for out in group.out_features)
    return programs * tiles.max_rank * group.in_features * batch.table.arena.element_size()


def _one_launch(
    y_TO: torch.Tensor, x_TH: torch.Tensor, batch: LoraBatch, group: LoraGroup, tile: OneLaunchTile
) -> None:
    table, outs = batch.table, group.out_features
    grid = (sum(-(-out // tile.block_n) for out in outs), batch.row_tiles.num_tiles)
    one_launch_kernel[grid](
        y_TO,
        x_TH,
        table.arena,
        table.offsets,
        table.ranks,
        table.scales,
        *_rows(batch, group),
        *padded(outs),
        group.in_features,
        x_TH.stride(0),
        y_TO.stride(0),
        BLOCK_M=DECODE_ROWS,
        BLOCK_R=MIN_RANK_BLOCK,
        BLOCK_K=tile.block_k,
        BLOCK_N=tile.block_n,
        EVEN_K=group.in_features % tile.block_k == 0,
        ALIGNED=table.is_aligned_to(ALIGN_BYTES),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
