"""Cuts a packed adapter into one part for each rank. Knows buffers and shapes; knows no devices.

The parts have one layout, so an adapter has the same place in every rank's arena. What is not divided (the A of a layer
whose outputs are, the B of one whose inputs are, DoRA's factors of the latter, an own embedding or head) is in each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from adapters_store.packed.host_buffers import HostBuffers
from adapters_store.packed.layout import ALIGN_BYTES, PackedAdapter, PackedModule
from adapters_store.packed.packing import place_linear
from lora_kernels.background import TimeSlices
from server.engine.tensor_parallel.cuts import INPUTS, OUTPUTS, Cuts

_FACTOR_BYTES = 4


@dataclass(frozen=True, slots=True)
class ShardedAdapter(PackedAdapter):
    """buffer: the first rank's part. others: those of the further ranks, in their order."""

    others: tuple[torch.Tensor, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Of host memory."""
        return self.buffer.nbytes * (1 + len(self.others))


def sharded(adapter: PackedAdapter, cuts: Cuts, buffers: HostBuffers, slices: TimeSlices) -> ShardedAdapter:
    """All ranks' parts. slices: when its pieces may be computed."""
    modules, num_elements = _layout(adapter, cuts)
    first = buffers.take(num_elements, adapter.buffer.dtype)
    others = [torch.empty(num_elements, dtype=adapter.buffer.dtype) for _ in range(cuts.num_ranks - 1)]
    with slices.work():
        for rank, part in enumerate((first, *others)):
            part.view(torch.uint8).zero_()  # between the matrices too
            writer = _Writer(adapter, cuts, rank, part)
            for source, target in zip(adapter.modules, modules, strict=True):
                slices.wait()
                writer.put(source, target)
    return ShardedAdapter(adapter.digest, first, modules, adapter.is_int8, tuple(others))


def _layout(adapter: PackedAdapter, cuts: Cuts) -> tuple[tuple[PackedModule, ...], int]:
    """Where each module of a part lies, and the part's length in elements. As in the whole: linear layers, then an own
    embedding and head, then factors."""
    rows, itemsize = cuts.layers.table_rows, adapter.buffer.element_size()
    linear = [module for module in adapter.modules if _is_linear(module, cuts)]
    places, end = place_linear(cuts.layers, linear, is_int8=adapter.is_int8)
    first, stop = _own_rows(adapter, cuts)
    shift = end - first
    end += stop - first
    modules = []
    for module in adapter.modules:
        if not _is_linear(module, cuts):
            modules.append(replace(module, a_offset=module.a_offset + shift, b_offset=module.b_offset + shift))
            continue
        a_offset, b_offset = places[module.name]
        factors = 0
        if module.factor_offset:
            factors = end
            end += _aligned(rows[module.name].out_features * _FACTOR_BYTES // itemsize, itemsize)
        modules.append(replace(module, a_offset=a_offset, b_offset=b_offset, factor_offset=factors))
    return tuple(modules), end


def _is_linear(module: PackedModule, cuts: Cuts) -> bool:
    return bool(module.rank) and module.name in cuts.layers.table_rows


def _own_rows(adapter: PackedAdapter, cuts: Cuts) -> tuple[int, int]:
    """Where the own embedding and head begin and end in the whole; nothing: (0, 0)."""
    starts = [module.a_offset for module in adapter.modules if not _is_linear(module, cuts)]
    factors = [module.factor_offset for module in adapter.modules if module.factor_offset]
    return (min(starts), min(factors, default=adapter.buffer.numel())) if starts else (0, 0)


def _aligned(count: int, itemsize: int) -> int:
    align = ALIGN_BYTES // itemsize
    return -(-count // align) * align


class _Writer:
    """Writes one rank's part of single modules."""

    def __init__(self, adapter: PackedAdapter, cuts: Cuts, rank: int, part: torch.Tensor) -> None:
        self._cuts = cuts
        self._rank = rank
        self._is_int8 = adapter.is_int8
        self._itemsize = part.element_size()
        self._whole, self._part = adapter.buffer, part
        self._own_rows = _own_rows(adapter, cuts)

    def put(self, source: PackedModule, target: PackedModule) -> None:
        if not _is_linear(source, self._cuts):
            first, stop = self._own_rows
            if source.a_offset == first:  # all of them at once
                _write(self._part, target.a_offset, self._whole[first:stop])
            return
        whole, part, size = self._whole, self._part, 1
        if self._is_int8:
            whole, part, size = whole.view(torch.uint8), part.view(torch.uint8), self._itemsize
            count = source.rank * _FACTOR_BYTES  # of the ranks' factors, which end where A begins
            first, to = source.a_offset * size - count, target.a_offset * size - count
            part[to : to + count] = whole[first : first + count]
        shape = self._cuts.base.table_rows[source.name]
        for dim, width, start, to in (
            (INPUTS, shape.in_features, source.a_offset, target.a_offset),
            (OUTPUTS, shape.out_features, source.b_offset, target.b_offset),
        ):
            matrix_KN = whole[start * size : start * size + source.rank * width].view(source.rank, width)
            _write(part, to * size, self._own(matrix_KN, source.name, dim))
        if source.factor_offset:
            count = shape.out_features * _FACTOR_BYTES // self._itemsize
            factors_O = self._whole[source.factor_offset : source.factor_offset + count].view(torch.float32)
            own_O = self._own(factors_O[None], source.name, OUTPUTS).reshape(-1)
            _write(self._part, target.factor_offset, own_O.view(self._part.dtype))

    def _own(self, matrix_KN: torch.Tensor, name: str, dim: int) -> torch.Tensor:
        """The rank's columns of A (dim: the layer's inputs) or of B, transposed (its outputs)."""
        cut = self._cuts.by_row.get(name)
        return matrix_KN if cut is None or cut.dim != dim else cut.part(matrix_KN, 1, self._rank)


def _write(memory: torch.Tensor, start: int, values: torch.Tensor) -> None:
    flat = values.reshape(-1)
    memory[start : start + len(flat)] = flat
