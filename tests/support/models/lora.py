"""Random adapters in an arena, for kernel tests and benchmarks alike."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch

from lora_kernels.lora.batch import LoraGroup, LoraTable, Place

SENTINEL_GAP = 96  # NaN elements between adapters: reading one past an adapter shows


def random_table(
    groups: Sequence[LoraGroup],
    ranks: Sequence[int],
    dtype: torch.dtype,
    *,
    seed: int = 0,
    missing: int = -1,
    int8: Collection[int] = (),
    factored: Sequence[int] = (),
) -> LoraTable:
    """One adapter per slot with the given rank on every module of the groups; slot `missing` skips the odd modules, and
    slots of `int8` hold bytes. factored: slots with DoRA's factors, from 0.5 to 1.5, on every module."""
    generator = torch.Generator().manual_seed(seed)
    num_modules = sum(len(group.module_rows) for group in groups)
    num_outputs = sum(sum(group.out_features) for group in groups)
    size = sum(_adapter_elements(groups, rank) + SENTINEL_GAP for rank in ranks) + SENTINEL_GAP
    size += len(factored) * (num_outputs * 2 + num_modules) + len(int8) * 64
    table = LoraTable(torch.full((size,), torch.nan, dtype=dtype), num_modules, len(ranks))
    cursor = SENTINEL_GAP
    for slot, rank in enumerate(ranks):
        cursor += -cursor % 32 if int8 else 0
        modules, factors, used = [], [], 0
        for group in groups if slot not in int8 else ():
            for row, out in zip(group.module_rows, group.out_features, strict=True):
                if slot == missing and row % 2:
                    continue
                a_offset, b_offset = used, used + rank * group.in_features
                used = b_offset + rank * out
                table.arena[cursor + a_offset : cursor + b_offset] = _normal(
                    b_offset - a_offset, 0.05, generator, dtype
                )
                table.arena[cursor + b_offset : cursor + used] = _normal(used - b_offset, 0.05, generator, dtype)
                modules.append((row, a_offset, b_offset, rank, 0.5 + slot))
                if slot in factored:
                    used += (cursor + used) % 2  # float32 in an arena of two bytes an element
                    factors.append((row, used))
                    end = used + out * 4 // table.arena.element_size()
                    table.arena[cursor + used : cursor + end].view(torch.float32).copy_(
                        torch.rand(out, generator=generator) + 0.5
                    )
                    used = end
        if slot in int8:
            modules, used = _int8_modules(table, groups, rank, cursor, slot)
            for row, out in _members(groups) if slot in factored else ():
                factors.append((row, used))
                end = used + out * 4 // table.arena.element_size()
                table.arena[cursor + used : cursor + end].view(torch.float32).copy_(
                    torch.rand(out, generator=generator) + 0.5
                )
                used = end
        table.set_slot(slot, cursor, modules, factors=factors, is_int8=slot in int8)
        cursor += used + SENTINEL_GAP
    return table


def _int8_modules(
    table: LoraTable, groups: Sequence[LoraGroup], rank: int, cursor: int, slot: int
) -> tuple[list[Place], int]:
    """Random bytes, each A behind random factors; starts are aligned as in a packed adapter."""
    generator, size = np.random.default_rng(slot), table.arena.element_size()
    memory, modules, used = table.arena.view(torch.uint8).numpy(), list[Place](), 0
    for group in groups:
        for row, out in _members([group]):
            starts = []
            for factors, width in ((rank, group.in_features), (0, out)):
                used += -(-factors * 4 // 64) * 64 // size
                at = (cursor + used) * size
                memory[at - 4 * factors : at].view(np.float32)[:] = generator.uniform(1e-5, 6e-5, factors)
                memory[at : at + rank * width] = generator.integers(0, 256, rank * width)
                starts.append(used)
                used += -(-rank * width // 64) * 64 // size
            modules.append((row, starts[0], starts[1], rank, 0.5 + slot))
    return modules, used


def _members(groups: Sequence[LoraGroup]) -> list[tuple[int, int]]:
    """Each layer's row of the table and its outputs."""
    return [pair for group in groups for pair in zip(group.module_rows, group.out_features, strict=True)]


def _adapter_elements(groups: Sequence[LoraGroup], rank: int) -> int:
    return sum(rank * (group.in_features * len(group.out_features) + sum(group.out_features)) for group in groups)


def _normal(count: int, scale: float, generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(count, generator=generator) * scale).to(dtype)
