"""Which adapter applies to which row: the table of resident adapters, a group of layers, and one step's segments.

Legend: T token rows, H in_features, O out_features, S segments, M modules, R rows that have an adapter,
E rows of experts: one for each token and each of its experts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from lora_kernels.lora.row_tiles import RowTiles, row_tiles
from lora_kernels.lora.token_rows import TokenRows
from lora_kernels.native.bindings import CLoraBatch, CLoraGroup
from lora_kernels.transfer import to_device

Place = tuple[int, int, int, int, float]  # module row, offset of A, offset of B, rank, scale
FactorPlace = tuple[int, int]  # module row, offset of its factors
NO_ADAPTER = -1
MAX_MEMBERS = 3  # q/k/v is the widest group


class LoraTable:
    """Where every resident adapter is in the arena. Rows: modules of the base; columns: device slots.

    arena: 1-D, the base's dtype. offsets [M, slots, 2] int64: A and B in elements of the arena. ranks [M, slots] int32
    (0: the slot does not touch the module). scales [M, slots] float32. A is [rank, H], B is [rank, O] (transposed).
    factors [M, slots] int64: where DoRA's factors lie, float32 [O], in elements of the arena; 0: there are none. They
    multiply the layer's product with its delta, before the bias.
    int8 [slots] uint8, on the host, and device_int8: 1 where A and B are bytes. Each rank's term then has a factor, and
    a module's factors, [rank] float32, end where its A begins.
    token_rows [slots], on the host: each slot's own embedding and head; few adapters have them.
    Modules from first_expert on are experts, see `ExpertsBatch`; None: there are none.
    """

    def __init__(
        self, arena: torch.Tensor, num_modules: int, num_slots: int, *, first_expert: int | None = None
    ) -> None:
        device = arena.device
        self.arena = arena
        self.num_slots = num_slots
        self.first_expert = num_modules if first_expert is None else first_expert
        self.offsets = torch.zeros(num_modules, num_slots, 2, dtype=torch.int64, device=device)
        self.ranks = torch.zeros(num_modules, num_slots, dtype=torch.int32, device=device)
        self.scales = torch.zeros(num_modules, num_slots, dtype=torch.float32, device=device)
        self.factors = torch.zeros(num_modules, num_slots, dtype=torch.int64, device=device)
        self.int8 = np.zeros(num_slots, dtype=np.uint8)
        self.device_int8 = torch.from_numpy(self.int8).to(device)  # the same memory on a CPU
        self.token_rows: list[tuple[TokenRows, ...]] = [()] * num_slots
        self.max_ranks = np.zeros(num_slots, dtype=np.int64)  # on the host, to size the scratch
        # On the host, to skip launches without an adapter, and without factors
        self.touched, self.scaled = (np.zeros((num_modules, num_slots), dtype=np.bool_) for _ in range(2))
        self.has_factors = [False] * num_slots
        self.has_experts = [False] * num_slots
        self._offset_bits = 0  # all offsets so far, or-ed: the lowest set bit is their common alignment

    def set_slot(
        self,
        slot: int,
        offset: int,
        modules: list[Place],
        token_rows: Sequence[TokenRows] = (),
        factors: Sequence[FactorPlace] = (),
        *,
        is_int8: bool = False,
    ) -> None:
        """Point a slot at an adapter stored from `offset`. token_rows: its own embedding and head.

        One copy to the device, and one more of factors; the host does not wait for it."""
        self.clear_slot(slot)
        self.token_rows[slot] = tuple(rows.moved(offset) for rows in token_rows)
        if self.int8[slot] != is_int8:
            self.int8[slot] = is_int8
            self.device_int8[slot] = is_int8
        entries = np.array([module[:4] for module in modules], dtype=np.int64).reshape(-1, 4)
        entries[:, 1:3] += offset
        scales = np.array([module[4] for module in modules], dtype=np.float32).view(np.int32)
        packed = to_device(torch.from_numpy(np.column_stack([entries, scales])), self.arena.device)
        rows = packed[:, 0]
        self.offsets[rows, slot] = packed[:, 1:3]
        self.ranks[rows, slot] = packed[:, 3].int()
        self.scales[rows, slot] = packed[:, 4].int().view(torch.float32)
        self.max_ranks[slot] = max((module[3] for module in modules), default=0)
        self.touched[entries[:, 0], slot] = True
        self.has_experts[slot] = bool((entries[:, 0] >= self.first_expert).any())
        self._offset_bits |= int(np.bitwise_or.reduce(entries[:, 1:3], axis=None))
        if factors:
            self.set_factors(slot, offset, factors)

    def set_factors(self, slot: int, offset: int, factors: Sequence[FactorPlace]) -> None:
        """Of the adapter that the slot points at. One copy to the device."""
        places = np.array(factors, dtype=np.int64) + np.array([0, offset])
        assert not (places[:, 1] * self.arena.element_size() % 4).any(), "factors are float32"
        on_device = to_device(torch.from_numpy(places), self.arena.device)
        self.factors[on_device[:, 0], slot] = on_device[:, 1]
        self.scaled[places[:, 0], slot] = True
        self.has_factors[slot] = True
        self._offset_bits |= int(np.bitwise_or.reduce(places[:, 1]))

    def matrices(self, module: int, slot: int, in_features: int, out: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A [rank, H] and B [rank, O] of one cell: views of the arena; of an int8 adapter whole again, in float32."""
        a_offset, b_offset = self.offsets[module, slot].tolist()
        place = (module, a_offset, b_offset, int(self.ranks[module, slot]), 1.0)
        return matrices_at(self.arena, place, in_features, out, is_int8=bool(self.int8[slot]))

    def clear_slot(self, slot: int) -> None:
        self.ranks[:, slot] = 0
        self.max_ranks[slot] = 0
        self.has_experts[slot] = False
        self.token_rows[slot] = ()
        self.touched[:, slot] = False
        if self.has_factors[slot]:
            self.factors[:, slot] = 0
            self.scaled[:, slot] = False
            self.has_factors[slot] = False

    def touched_by(self, slots: Sequence[int] | NDArray[np.int32]) -> NDArray[np.bool_]:
        """For each module before experts, which are many: whether an adapter in `slots` touches it."""
        touched: NDArray[np.bool_] = np.logical_or.reduce(self.touched[: self.first_expert, slots], axis=1)
        return touched

    def factors_of(self, module: int, slot: int, out_features: int) -> torch.Tensor | None:
        """float32 [out_features]; None: the slot has none for the module."""
        if not self.scaled[module, slot]:
            return None
        start = int(self.factors[module, slot])
        return self.arena[start : start + out_features * 4 // self.arena.element_size()].view(torch.float32)

    def is_aligned_to(self, num_bytes: int) -> bool:
        """Whether every A, B and factor row so far starts on a multiple of num_bytes (a power of two) of the arena."""
        return self._offset_bits * self.arena.element_size() % num_bytes == 0


def matrices_at(
    memory: torch.Tensor, place: Place, in_features: int, out: int, *, is_int8: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, in_features] and B [rank, out] of one layer: views of memory; of int8 whole again, in float32."""
    _, a_offset, b_offset, rank, _ = place
    starts, shapes = (a_offset, b_offset), ((rank, in_features), (rank, out))
    if not is_int8:
        a_KH, b_KO = (memory[at : at + k * n].view(k, n) for at, (k, n) in zip(starts, shapes, strict=True))
        return a_KH, b_KO
    bytes_, size = memory.view(torch.uint8), memory.element_size()
    a_KH, b_KO = (
        bytes_[at * size : at * size + k * n].view(torch.int8).view(k, n).float()
        for at, (k, n) in zip(starts, shapes, strict=True)
    )
    first = a_offset * size
    return a_KH * bytes_[first - 4 * rank : first].view(torch.float32)[:, None], b_KO


@dataclass(frozen=True, eq=False)
class LoraGroup:
    """Linear layers that read the same input and write neighbouring columns of one output [T, sum(out_features)].

    module_rows: each member's row of the table.
    """

    module_rows: tuple[int, ...]
    in_features: int
    out_features: tuple[int, ...]

    @property
    def starts(self) -> tuple[int, ...]:
        return tuple(int(start) for start in np.cumsum((0, *self.out_features[:-1])))

    @cached_property
    def _native(self) -> tuple[CLoraGroup, list[NDArray[np.int64]]]:
        """The struct, and the arrays it points into (kept alive with it)."""
        arrays = [np.array(values, dtype=np.int64) for values in (self.module_rows, self.starts, self.out_features)]
        struct = CLoraGroup(len(self.module_rows), self.in_features, *(array.ctypes.data for array in arrays))
        return struct, arrays

    @cached_property
    def native_address(self) -> int:
        return ctypes.addressof(self._native[0])


class LoraBatch:
    """One step's rows grouped by slot. Rows without an adapter belong to no segment and cost nothing.

    row_slots [T]: as given."""

    def __init__(self, table: LoraTable, row_slots: NDArray[np.int32]) -> None:
        """row_slots [T]: the slot of each token row, or NO_ADAPTER."""
        self.table = table
        self.row_slots = row_slots
        order = np.argsort(row_slots, kind="stable").astype(np.int32)
        sorted_slots = row_slots[order]
        first = int(np.searchsorted(sorted_slots, 0))
        self.rows: NDArray[np.int32] = np.ascontiguousarray(order[first:])
        used = sorted_slots[first:]
        bounds = np.flatnonzero(np.diff(used, prepend=NO_ADAPTER)).astype(np.int32)
        self.slots: NDArray[np.int32] = np.ascontiguousarray(used[bounds], dtype=np.int32)
        self.starts: NDArray[np.int32] = np.append(bounds, np.int32(len(used))).astype(np.int32)

    @property
    def num_segments(self) -> int:
        return len(self.slots)

    @property
    def table_slots(self) -> NDArray[np.int32]:
        """Each segment's column of the table."""
        return self.slots

    @property
    def max_rank(self) -> int:
        return int(self.table.max_ranks[self.table_slots].max(initial=0))

    @property
    def int8_segments(self) -> NDArray[np.uint8]:
        """1 where a segment's A and B are bytes."""
        return self.table.int8[self.table_slots]

    @property
    def device_int8(self) -> torch.Tensor:
        """By slot."""
        return self.table.device_int8

    @cached_property
    def has_int8(self) -> bool:
        return bool(self.int8_segments.any())

    @cached_property
    def token_segments(self) -> list[tuple[torch.Tensor, TokenRows]]:
        """The token rows of each adapter that has its own embedding or head, and where that lies."""
        device = self.table.arena.device
        return [
            (torch.from_numpy(self.rows[self.starts[index] : self.starts[index + 1]]).long().to(device), own)
            for index, slot in enumerate(self.slots.tolist())
            for own in self.table.token_rows[slot]
        ]

    @cached_property
    def has_experts(self) -> bool:
        """Whether any row's adapter changes experts."""
        return any(self.table.has_experts[slot] for slot in self.slots)

    def of_experts(self, expert_E: NDArray[np.int64], token_E: NDArray[np.int64], count: int) -> ExpertsBatch:
        """The batch of rows that a layer's `count` experts compute: row i is token token_E[i] at expert expert_E[i]."""
        slot_E = self.row_slots[token_E].astype(np.int64)
        own_E = np.where(slot_E == NO_ADAPTER, NO_ADAPTER, expert_E * self.table.num_slots + slot_E)
        return ExpertsBatch(self.table, own_E.astype(np.int32), count)

    @cached_property
    def touched_modules(self) -> NDArray[np.bool_]:
        """Whether any adapter of the step touches the module, for those before experts."""
        return self.table.touched_by(self.slots)

    def touches(self, group: LoraGroup) -> bool:
        """Whether any row's adapter touches the group."""
        return any(self.touched_modules[row] for row in group.module_rows)

    @cached_property
    def scaled_modules(self) -> NDArray[np.bool_] | None:
        """Whether any adapter of the step has factors for the module's outputs, for modules before experts; None: for
        no module."""
        if not any(self.table.has_factors[slot] for slot in self.slots):
            return None
        scaled: NDArray[np.bool_] = np.logical_or.reduce(
            self.table.scaled[: self.table.first_expert, self.slots], axis=1
        )
        return scaled

    def scales(self, group: LoraGroup) -> bool:
        """Whether any row's adapter has factors for an output of the group."""
        scaled = self.scaled_modules
        return scaled is not None and any(scaled[row] for row in group.module_rows)

    def is_special(self, group: LoraGroup) -> bool:
        """Whether any row's adapter is int8, or has factors for an output of the group."""
        return self.has_int8 or self.scales(group)

    @cached_property
    def row_tiles(self) -> RowTiles:
        """The device's view of the segments, made and copied once for all layers."""
        device = self.table.arena.device
        return row_tiles(self.slots, self.starts, self.rows, max_rank=self.max_rank, device=device)

    @cached_property
    def _native(self) -> tuple[CLoraBatch, NDArray[np.float32], NDArray[np.uint8]]:
        """The struct, and what it points to and only it has (kept alive with it)."""
        table, h_rank = self.table, self.max_rank
        scratch = np.empty(len(self.rows) * MAX_MEMBERS * h_rank, dtype=np.float32)
        arrays, int8 = (self.slots, self.starts, self.rows), self.int8_segments
        tensors = (table.offsets, table.ranks, table.scales)
        factors = None if self.scaled_modules is None else table.factors.data_ptr()
        struct = CLoraBatch(
            self.num_segments,
            table.num_slots,
            h_rank,
            *(array.ctypes.data for array in arrays),
            *(tensor.data_ptr() for tensor in tensors),
            int8.ctypes.data,
            table.arena.data_ptr(),
            scratch.ctypes.data,
            factors,
        )
        return struct, scratch, int8

    @cached_property
    def native_address(self) -> int:
        return ctypes.addressof(self._native[0])

    def read_like(self, other: LoraBatch) -> None:
        """Let C kernels that were given this batch read the other, for as long as that lives."""
        ctypes.memmove(self.native_address, other.native_address, ctypes.sizeof(CLoraBatch))


class ExpertsBatch(LoraBatch):
    """A layer's rows of experts, grouped by expert and slot. For groups of one module: that of the first expert, whose
    neighbours the others are. Expert e's slot s is slot e * num_slots + s, so its cell of the table is where a plain
    batch would look for slot e * num_slots + s of the first expert."""

    def __init__(self, table: LoraTable, row_slots: NDArray[np.int32], count: int) -> None:
        super().__init__(table, row_slots)
        self._count = count

    @property
    def table_slots(self) -> NDArray[np.int32]:
        return self.slots % self.table.num_slots

    @property
    def device_int8(self) -> torch.Tensor:
        return self.table.device_int8.repeat(self._count)

    def touches(self, group: LoraGroup) -> bool:
        [first] = group.module_rows
        return bool(self.table.touched[first : first + self._count].reshape(-1)[self.slots].any())

    @cached_property
    def scaled_modules(self) -> None:
        """No adapter has factors for experts."""
        return None
