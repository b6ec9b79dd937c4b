"""The kernels' inputs of a step whose launches are recorded once: fixed tensors, whose content changes.

A recorded step has a tile for each token, all of the shape that decode rows have. A tile of count zero returns at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from lora_kernels.attention.batch import PagedBatch
from lora_kernels.attention.query_tiles import RECORD as ATTENTION_RECORD
from lora_kernels.attention.query_tiles import AttentionTiles, QueryTiles
from lora_kernels.lora.batch import NO_ADAPTER, LoraBatch, LoraTable
from lora_kernels.lora.row_tiles import RowTiles
from lora_kernels.triton_common.available import has_triton
from lora_kernels.triton_common.tiles import DECODE_ROWS, device_tiles


@dataclass(eq=False)
class CapturedPagedBatch(PagedBatch):
    """Its host arrays have the right sizes; their content is not used."""

    tiles: AttentionTiles = field(kw_only=True)
    tokens_per_tile: int = field(kw_only=True)

    def attention_tiles(self, group: int, decode_m: int, prefill_m: int, device: torch.device) -> AttentionTiles:
        assert self.tokens_per_tile * group <= max(decode_m, group), "a tile has fewer rows than its tokens need"
        return self.tiles


def decode_tokens_per_tile(device: torch.device, *, head_dim: int, group: int, num_bytes: int) -> int:
    """Neighbouring tokens of one sequence that a tile of decode rows has room for. group: query heads per key head."""
    tile = device_tiles(device).tiles.attention(head_dim=head_dim, group=group, num_bytes=num_bytes, decode=True)
    return tile.block_m // group


def captured_paged_batch(
    slots: torch.Tensor,
    records: torch.Tensor,
    block_tables: torch.Tensor,
    *,
    block_size: int,
    max_context: int,
    tokens_per_tile: int = 1,
) -> CapturedPagedBatch:
    """slots [rows], records [rows, 4] and block_tables [any], int32 on the device, are read again at every step."""
    rows = len(slots)
    nothing = torch.empty(0, ATTENTION_RECORD, dtype=torch.int32, device=slots.device)
    tiles = AttentionTiles(
        block_tables,
        QueryTiles(records, DECODE_ROWS, max_context),
        QueryTiles(nothing, DECODE_ROWS, 0),
    )
    return CapturedPagedBatch(
        query_starts=np.arange(rows + 1, dtype=np.int32),
        context_lens=np.ones(rows, dtype=np.int32),
        block_tables=np.zeros((rows, 1), dtype=np.int32),
        slot_mapping_T=slots,
        positions_T=np.zeros(rows, dtype=np.int32),
        sequences_T=np.arange(rows, dtype=np.int32),
        block_size=block_size,
        tiles=tiles,
        tokens_per_tile=tokens_per_tile,
    )


def captured_scratch_elements(device: torch.device, *, max_rows: int, max_rank: int) -> int:
    """float32 elements of scratch that suffice for every group of a recorded step of at most max_rows rows."""
    if not has_triton():
        return 0
    from lora_kernels.lora.triton_launch import most_scratch

    return most_scratch(max_rows, max_rank, device)


def captured_lora_batch(
    table: LoraTable,
    records: torch.Tensor,
    rows: torch.Tensor,
    *,
    max_rank: int,
    scratch: torch.Tensor,
    modules: frozenset[int] | None = None,
    special: bool = False,
) -> LoraBatch:
    """records [rows, 3] and rows [rows], int32 on the device, are read again at every step; scratch is written.

    modules: rows of the table that an adapter of these steps may touch; other groups are not launched. None: all.
    special: whether they may be int8 or have factors for their outputs.
    """
    batch = LoraBatch(table, np.full(len(rows), NO_ADAPTER, dtype=np.int32))
    batch.row_tiles = RowTiles(records, rows, DECODE_ROWS, max_rank, scratch)
    touched = np.ones(len(table.ranks), dtype=np.bool_)
    if modules is not None:
        touched[:] = False
        touched[list(modules)] = True
    batch.touched_modules = touched
    batch.has_int8 = special
    batch.scaled_modules = touched if special else None
    return batch
