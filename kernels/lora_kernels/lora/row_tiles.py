"""Cuts a step's segments into tiles of rows: once per step, one copy to the device. Knows no kernels."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from lora_kernels.transfer import to_device
from lora_kernels.triton_common.tiles import DECODE_ROWS, PREFILL_ROWS

RECORD = 3  # slot, first position in `rows`, number of rows
ALIGN_ELEMENTS = 4  # 16 bytes: Triton compiles twice for a pointer that is aligned only sometimes
MIN_RANK_BLOCK, MAX_RANK_BLOCK = 16, 64


@dataclass(eq=False)
class RowTiles:
    """The input of every LoRA kernel of the step.

    records [tiles, 3] and rows [R], int32, on the arena's device, in one allocation. A tile's rows all have its slot;
    a record of zero rows is a tile that returns at once (a captured CUDA graph has as many tiles as its largest batch).
    max_rank: the largest rank of the step. given_scratch: float32 memory for all launches, kept by the owner of the
    step; None: allocated at the first launch.
    """

    records: torch.Tensor
    rows: torch.Tensor
    block_m: int
    max_rank: int
    given_scratch: torch.Tensor | None = None
    _scratch: torch.Tensor | None = field(init=False, default=None)

    @property
    def num_tiles(self) -> int:
        return len(self.records)

    @property
    def rank_block(self) -> int:
        """Ranks per pass: a power of two, so that mixed ranks meet at most three compiled kernels."""
        return min(MAX_RANK_BLOCK, max(MIN_RANK_BLOCK, 1 << (self.max_rank - 1).bit_length()))

    def scratch(self, num_elements: int) -> torch.Tensor:
        """float32, shared by all layers, which run one after another on one stream."""
        if self.given_scratch is not None:
            assert num_elements <= len(self.given_scratch), f"scratch of {len(self.given_scratch)}, not {num_elements}"
            return self.given_scratch
        if self._scratch is None or len(self._scratch) < num_elements:
            self._scratch = torch.empty(num_elements, dtype=torch.float32, device=self.rows.device)
        return self._scratch


def row_tiles(
    slots: NDArray[np.int32],
    starts: NDArray[np.int32],
    rows: NDArray[np.int32],
    *,
    max_rank: int,
    device: torch.device,
) -> RowTiles:
    """Tiles of segments `slots [S]`, `starts [S + 1]` over `rows [R]`."""
    counts = np.diff(starts)
    block_m = DECODE_ROWS if counts.max(initial=0) <= DECODE_ROWS else PREFILL_ROWS
    records = tile_records(slots, starts, counts, block_m)
    gap = -records.size % ALIGN_ELEMENTS
    packed = to_device(torch.from_numpy(np.concatenate([records.ravel(), np.zeros(gap, dtype=np.int32), rows])), device)
    size = records.size
    return RowTiles(packed[:size].view(-1, RECORD), packed[size + gap :], block_m, max_rank)


def tile_records(
    slots: NDArray[np.int32], starts: NDArray[np.int32], counts: NDArray[np.int32], block_m: int
) -> NDArray[np.int32]:
    """One record per tile of at most block_m rows; counts [S]: rows of each segment."""
    per_segment = -(-counts // block_m)
    segments = np.repeat(np.arange(len(slots)), per_segment)
    within = np.arange(len(segments)) - np.repeat(np.cumsum(per_segment) - per_segment, per_segment)
    firsts = starts[segments] + within * block_m
    lengths = np.minimum(block_m, starts[segments + 1] - firsts)
    return np.stack([slots[segments], firsts, lengths], axis=1).astype(np.int32)
