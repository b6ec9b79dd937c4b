"""Adapters for the op benchmarks: an arena larger than any cache, and tables that point into it. Knows no models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.common.shapes import GroupShape
from lora_kernels.lora.batch import LoraGroup, LoraTable

STD = 0.02
SCALE = 2.0  # of every adapter


def random_numbers(count: int) -> torch.Tensor:
    """bfloat16 from N(0, 0.02), the same in every run."""
    return (torch.randn(count, generator=torch.Generator().manual_seed(0)) * STD).to(torch.bfloat16)


@dataclass(frozen=True)
class LayeredAdapters:
    """Adapters on several layers' groups. ranks[s]: the rank of slot s. groups[layer][i]: the layer's i-th group."""

    table: LoraTable
    groups: list[list[LoraGroup]]
    ranks: tuple[int, ...]
    bytes_per_layer: int

    @property
    def num_layers(self) -> int:
        return len(self.groups)

    def a_of(self, group: LoraGroup, member: int, slot: int) -> torch.Tensor:
        """[rank, in_features], a view of the arena."""
        return self._matrices(group, member, slot)[0]

    def b_of(self, group: LoraGroup, member: int, slot: int) -> torch.Tensor:
        """[rank, out_features], a view of the arena."""
        return self._matrices(group, member, slot)[1]

    def _matrices(self, group: LoraGroup, member: int, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.table.matrices(group.module_rows[member], slot, group.in_features, group.out_features[member])


def layered_adapters(
    shapes: Sequence[GroupShape], ranks: Sequence[int], arena: torch.Tensor, *, num_layers: int | None = None
) -> LayeredAdapters:
    """One adapter per entry of `ranks`, on every layer. num_layers None: as many layers as fill the arena."""
    per_layer = elements_per_layer(shapes, ranks)
    count = num_layers or max(1, arena.numel() // per_layer)
    groups, modules_per_layer = _groups(shapes, count)
    table = LoraTable(arena, modules_per_layer * count, len(ranks))
    _fill(table, groups, ranks)
    return LayeredAdapters(table, groups, tuple(ranks), 2 * per_layer)


def elements_per_layer(shapes: Sequence[GroupShape], ranks: Sequence[int]) -> int:
    """A's and B's of all these adapters on one layer."""
    return sum(ranks) * sum(len(shape.out_features) * shape.in_features + sum(shape.out_features) for shape in shapes)


def _groups(shapes: Sequence[GroupShape], count: int) -> tuple[list[list[LoraGroup]], int]:
    layers: list[list[LoraGroup]] = []
    row = 0
    for _ in range(count):
        layer = []
        for shape in shapes:
            members = len(shape.out_features)
            layer.append(LoraGroup(tuple(range(row, row + members)), shape.in_features, shape.out_features))
            row += members
        layers.append(layer)
    return layers, row // count


def _fill(table: LoraTable, layers: list[list[LoraGroup]], ranks: Sequence[int]) -> None:
    modules: list[list[tuple[int, int, int, int, float]]] = [[] for _ in ranks]
    cursor = 0
    for layer in layers:
        for slot, rank in enumerate(ranks):
            for group in layer:
                for row, out in zip(group.module_rows, group.out_features, strict=True):
                    b_offset = cursor + rank * group.in_features
                    modules[slot].append((row, cursor, b_offset, rank, SCALE))
                    cursor = b_offset + rank * out
    assert cursor <= table.arena.numel(), "the arena is too small for its layers"
    for slot, rows in enumerate(modules):
        table.set_slot(slot, 0, rows)
