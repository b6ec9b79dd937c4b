"""Every compiled shape of every kernel, by architecture, in one table. Knows sizes; launches nothing, tunes nothing.

Serving never autotunes: only these shapes run. A row for an architecture is written from measurements made with
`python -m benchmarks.gpu_suite --only tune`; until one is, the architecture has the row of sm_80, whose tiles
fit every one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache

import torch

DECODE_ROWS = 16  # the smallest tile of a tensor core
PREFILL_ROWS = 64
MIN_TILE = 16
ALIGN_BYTES = 16  # the widest load
PROGRAMS_PER_MULTIPROCESSOR = 4
UNKNOWN_MULTIPROCESSORS = 128  # under the interpreter
SMALLEST_ARCHITECTURE = 80


@dataclass(frozen=True, slots=True)
class LoraTile:
    """One compiled shape of shrink and expand, for 16-bit elements; float32 halves the blocks to keep the bytes,
    and has twice the warps to share its sums (no tensor core adds exactly in float32)."""

    shrink_k: int
    shrink_warps: int
    shrink_stages: int
    expand_r: int
    expand_n: int
    expand_warps: int
    splits_at_once: int

    def for_element(self, num_bytes: int) -> LoraTile:
        if num_bytes == 2:
            return self
        return replace(
            self,
            shrink_k=self.shrink_k // 2,
            shrink_warps=2 * self.shrink_warps,
            expand_n=self.expand_n // 2,
        )


@dataclass(frozen=True, slots=True)
class OneLaunchTile:
    """The compiled shape of shrink and expand in one launch, for 16-bit elements only. It is used if its programs
    together read fewer than max_bytes of A, mostly from L2; two launches read each A once. 0: never."""

    block_k: int
    block_n: int
    num_warps: int
    num_stages: int
    max_bytes: int


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """One compiled shape. block_m: query rows; block_n: keys."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Determines a head size's tile. key_bytes: of a tile of keys; wider ones spill on an A100.

    block_m: query rows, at least. narrow_*: for keys wider than 256 bytes.
    """

    key_bytes: int
    block_m: int
    num_warps: int
    num_stages: int
    narrow_key_bytes: int
    narrow_block_m: int

    def tile(self, *, head_dim: int, group: int, num_bytes: int) -> AttentionTile:
        """group: query heads per key head, which share a tile."""
        block_d = max(MIN_TILE, power_of_two(head_dim))
        one_key = block_d * num_bytes
        is_wide = one_key <= 256
        key_bytes, rows = (self.key_bytes, self.block_m) if is_wide else (self.narrow_key_bytes, self.narrow_block_m)
        block_n = min(64, max(MIN_TILE, key_bytes // one_key))
        return AttentionTile(max(rows, power_of_two(group)), block_n, block_d, self.num_warps, self.num_stages)


@dataclass(frozen=True, slots=True)
class Nf4Tile:
    """One compiled shape. It depends on the number of rows only through block_m: 16, 32 or 64."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ArchitectureTiles:
    """One architecture's row. lora: by rows of a tile and ranks per pass. overlaps: expand is launched so that it may
    start while shrink runs, which needs sm_90."""

    lora: Mapping[tuple[int, int], LoraTile]
    nf4: tuple[Nf4Tile, ...]
    decode_attention: AttentionShape
    prefill_attention: AttentionShape
    one_launch: OneLaunchTile = OneLaunchTile(256, 256, 4, 4, max_bytes=0)
    overlaps: bool = False
    programs_per_multiprocessor: int = PROGRAMS_PER_MULTIPROCESSOR

    def attention(self, *, head_dim: int, group: int, num_bytes: int, decode: bool) -> AttentionTile:
        shape = self.decode_attention if decode else self.prefill_attention
        return shape.tile(head_dim=head_dim, group=group, num_bytes=num_bytes)

    def nf4_for(self, num_rows: int) -> Nf4Tile:
        return next(tile for tile in self.nf4 if num_rows <= tile.block_m)


SM_80 = ArchitectureTiles(
    lora={
        (DECODE_ROWS, 16): LoraTile(128, 2, 4, 16, 256, 4, 4),
        (DECODE_ROWS, 32): LoraTile(128, 4, 4, 32, 256, 4, 4),
        (DECODE_ROWS, 64): LoraTile(128, 4, 4, 64, 256, 8, 1),
        (PREFILL_ROWS, 16): LoraTile(64, 4, 4, 16, 64, 4, 1),
        (PREFILL_ROWS, 32): LoraTile(64, 4, 4, 32, 128, 8, 1),
        (PREFILL_ROWS, 64): LoraTile(64, 4, 4, 32, 128, 8, 1),
    },
    nf4=(Nf4Tile(16, 128, 4, 4), Nf4Tile(32, 128, 4, 3), Nf4Tile(64, 128, 4, 3)),
    decode_attention=AttentionShape(16 * 1024, MIN_TILE, 4, 3, 16 * 1024, MIN_TILE),
    prefill_attention=AttentionShape(8 * 1024, 128, 8, 2, 16 * 1024, 64),
)
SM_90 = replace(
    SM_80,  # 64 keys at once spill on an A100; an H100 has the shared memory for more stages
    nf4=(Nf4Tile(16, 128, 4, 6), *SM_80.nf4[1:]),
    prefill_attention=AttentionShape(16 * 1024, 128, 8, 2, 16 * 1024, 64),
)
TILES: Mapping[int, ArchitectureTiles] = {80: SM_80, 89: SM_80, 90: SM_90}


@dataclass(frozen=True)
class DeviceTiles:
    """Tiles for the launchers of one device. target_programs: a grid that keeps the whole device reading."""

    tiles: ArchitectureTiles = field(default=SM_80)
    target_programs: int = UNKNOWN_MULTIPROCESSORS * PROGRAMS_PER_MULTIPROCESSOR


def architecture_for(capability: int) -> int:
    """The newest row that is not newer than the device. Raises ValueError below sm_80, which lacks instructions that
    the kernels use."""
    if capability < SMALLEST_ARCHITECTURE:
        raise ValueError(f"compute capability must be at least {SMALLEST_ARCHITECTURE / 10}, got {capability / 10}")
    return max(known for known in TILES if known <= capability)


def device_tiles(device: torch.device) -> DeviceTiles:
    return _cuda_tiles(device) if device.type == "cuda" else DeviceTiles()


@cache
def _cuda_tiles(device: torch.device) -> DeviceTiles:
    properties = torch.cuda.get_device_properties(device)
    tiles = TILES[architecture_for(10 * properties.major + properties.minor)]
    return DeviceTiles(tiles, properties.multi_processor_count * tiles.programs_per_multiprocessor)


def power_of_two(value: int) -> int:
    """The smallest power of two that is not below value."""
    return 1 << (value - 1).bit_length()
