"""Cuts a step's sequences into tiles of query tokens: once per step, one copy to the device. Knows no kernels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lora_kernels.transfer import to_device

RECORD = 4  # where the block table begins, first token, number of tokens, position of the first


@dataclass(frozen=True, eq=False)
class QueryTiles:
    """records [tiles, 4] int32. max_context: the longest context of any of them."""

    records: torch.Tensor
    block_m: int
    max_context: int

    def __len__(self) -> int:
        return len(self.records)


@dataclass(frozen=True, eq=False)
class AttentionTiles:
    """What the attention kernel reads of a step. Sequences with few query rows and with many get tiles of their own.

    block_tables int32, 1-D, one table after the other, on the model's device with the records in one allocation.
    """

    block_tables: torch.Tensor
    decode: QueryTiles
    prefill: QueryTiles


def attention_tiles(
    query_starts: NDArray[np.int32],
    context_lens: NDArray[np.int32],
    block_tables: NDArray[np.int32],
    *,
    group: int,
    decode_m: int,
    prefill_m: int,
    device: torch.device,
) -> AttentionTiles:
    """group: query heads per key head; a tile of M rows holds M // group tokens, each with all of its group's heads."""
    is_short = np.diff(query_starts) * group <= decode_m
    table_starts = np.arange(len(block_tables)) * block_tables.shape[1]
    assert block_tables.size < 2**31, "a record holds the start of its block table in 32 bits"
    short = query_records(query_starts, context_lens, table_starts, is_short, decode_m // group)
    long = query_records(query_starts, context_lens, table_starts, ~is_short, prefill_m // group)
    packed = to_device(torch.from_numpy(np.concatenate([short.ravel(), long.ravel(), block_tables.ravel()])), device)
    parts = packed.split([short.size, long.size, block_tables.size])
    longest = [int(context_lens[chosen].max(initial=0)) for chosen in (is_short, ~is_short)]
    return AttentionTiles(
        parts[2],
        QueryTiles(parts[0].view(-1, RECORD), decode_m, longest[0]),
        QueryTiles(parts[1].view(-1, RECORD), prefill_m, longest[1]),
    )


def query_records(
    query_starts: NDArray[np.int32],
    context_lens: NDArray[np.int32],
    table_starts: NDArray[np.int64],
    chosen: NDArray[np.bool_],
    tokens_per_tile: int,
) -> NDArray[np.int32]:
    """[tiles, 4]: tiles of the chosen sequences, in their order, each of at most tokens_per_tile tokens."""
    counts = np.diff(query_starts)
    tiles = np.where(chosen, -(-counts // tokens_per_tile), 0)
    sequences = np.repeat(np.arange(len(counts)), tiles)
    done = (np.arange(len(sequences)) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * tokens_per_tile
    lengths = np.minimum(tokens_per_tile, counts[sequences] - done)
    positions = context_lens[sequences] - counts[sequences] + done
    firsts = query_starts[sequences] + done
    return np.stack([table_starts[sequences], firsts, lengths, positions], axis=1).astype(np.int32)
