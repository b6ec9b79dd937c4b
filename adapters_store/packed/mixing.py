"""Packed adapters and their weights -> one packed adapter with the sum of their deltas. Knows no files and no names.

    sum_i w_i scale_i B_i (A_i x)  =  scale [B_1 B_2 ...] ([r_1 A_1; r_2 A_2; ...] x),   r_i = w_i scale_i / scale

scale is the w_i scale_i of largest magnitude, so that no value grows and parts with the same product keep their bits;
the others are rounded once. In int8 the r_i multiply the ranks' float32 factors, and no byte changes. The same as
PEFT's `add_weighted_adapter(combination_type="cat")`, which rounds each A twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from adapters_store.base.description import AdapterDigest, BaseDescription, LinearShape
from adapters_store.format.dtypes import type_of_base
from adapters_store.packed.host_buffers import HostBuffers
from adapters_store.packed.layout import PackedAdapter, PackedModule
from adapters_store.packed.mix import not_combinable
from adapters_store.packed.packing import place_linear
from lora_kernels.background import TimeSlices

_PIECE = 1 << 17  # elements: well below a millisecond
_FACTOR_BYTES = 4

Weighted = tuple[PackedAdapter, float]


def mixed(
    digest: AdapterDigest, parts: Sequence[Weighted], base: BaseDescription, buffers: HostBuffers, slices: TimeSlices
) -> PackedAdapter:
    """slices: when its pieces may be computed. Raises NotCombinable (adapters_not_combinable)."""
    _check([adapter for adapter, _ in parts], base)
    is_int8 = parts[0][0].is_int8
    sums = list(_sums(parts, base))
    places, num_elements = place_linear(base, sums, is_int8=is_int8)
    modules = tuple(PackedModule(each.name, each.rank, each.scale, *places[each.name]) for each in sums)
    buffer = buffers.take(num_elements, type_of_base(base.dtype).torch_dtype)
    memory = buffer.view(torch.int8) if is_int8 else buffer
    writer = _Int8Writer(memory, slices, buffer.element_size()) if is_int8 else _Writer(memory, slices)
    with slices.work():
        writer.clear()
        for module, each in zip(modules, sums, strict=True):
            writer.put(module, each.terms, base.table_rows[module.name])
    return PackedAdapter(digest, buffer, modules, is_int8)


def _check(adapters: Sequence[PackedAdapter], base: BaseDescription) -> None:
    if any(module.factor_offset for adapter in adapters for module in adapter.modules):
        raise not_combinable("one is DoRA, which is no sum with the base: its factors divide by the norm of both")
    if any(adapter.places(base.module_index)[1] for adapter in adapters):
        raise not_combinable("one has its own embedding or head (modules_to_save), or LoRA on the embedding")
    if len({adapter.is_int8 for adapter in adapters}) > 1:
        raise not_combinable("one is int8 and another is not: push both with the same adapter_dtype")


class _Term(NamedTuple):
    """One part's module in a sum; factor: its r in the formula above."""

    adapter: PackedAdapter
    module: PackedModule
    factor: float


@dataclass(frozen=True, slots=True)
class _Sum:
    """One layer, and the parts that target it."""

    name: str
    scale: float
    terms: tuple[_Term, ...]

    @property
    def rank(self) -> int:
        return sum(term.module.rank for term in self.terms)


def _sums(parts: Sequence[Weighted], base: BaseDescription) -> Iterator[_Sum]:
    """In the base's order."""
    by_name: dict[str, list[tuple[PackedAdapter, PackedModule, float]]] = {}
    for adapter, weight in parts:
        for module in adapter.modules:
            by_name.setdefault(module.name, []).append((adapter, module, weight * module.scale))
    for name in base.table_rows:
        if found := by_name.get(name):
            scale = max((product for _, _, product in found), key=abs)
            ratios = [product / scale if scale else 0.0 for _, _, product in found]
            yield _Sum(name, scale, tuple(_Term(*part[:2], ratio) for part, ratio in zip(found, ratios, strict=True)))


class _Writer:
    """Writes the layers in the base's type, piece by piece."""

    def __init__(self, memory: torch.Tensor, slices: TimeSlices) -> None:
        self._memory = memory
        self._slices = slices

    def clear(self) -> None:
        """Between the matrices too: what is read depends on the adapters alone."""
        for piece in self._memory.split(_PIECE):
            self._slices.wait()
            piece.zero_()

    def put(self, module: PackedModule, terms: Sequence[_Term], shape: LinearShape) -> None:
        """module: its place here."""
        first = 0  # of the term's ranks
        for term in terms:
            own = term.module
            for start, to, width, factor in (
                (own.a_offset, module.a_offset, shape.in_features, term.factor),
                (own.b_offset, module.b_offset, shape.out_features, 1.0),
            ):
                self._copy(term.adapter.buffer[start : start + own.rank * width], to + first * width, factor)
            first += own.rank

    def _copy(self, rows: torch.Tensor, to: int, factor: float = 1.0) -> None:
        for piece, target in zip(rows.split(_PIECE), self._memory[to : to + len(rows)].split(_PIECE), strict=True):
            self._slices.wait()
            target.copy_(piece if factor == 1.0 else piece.float() * factor)


class _Int8Writer(_Writer):
    """The same for bytes. memory: the whole buffer as bytes. itemsize: of the elements that offsets count."""

    def __init__(self, memory: torch.Tensor, slices: TimeSlices, itemsize: int) -> None:
        super().__init__(memory, slices)
        self._itemsize = itemsize

    def put(self, module: PackedModule, terms: Sequence[_Term], shape: LinearShape) -> None:
        first, size = 0, self._itemsize
        factors = self._factors(self._memory, module)
        for term in terms:
            source, own = term.adapter.buffer.view(torch.int8), term.module
            for start, to, width in (
                (own.a_offset * size, module.a_offset * size, shape.in_features),
                (own.b_offset * size, module.b_offset * size, shape.out_features),
            ):
                self._copy(source[start : start + own.rank * width], to + first * width)
            factors[first : first + own.rank] = self._factors(source, own) * term.factor
            first += own.rank

    def _factors(self, memory: torch.Tensor, module: PackedModule) -> torch.Tensor:
        """Float32, one a rank; they end where A begins."""
        end = module.a_offset * self._itemsize
        return memory[end - module.rank * _FACTOR_BYTES : end].view(torch.float32)
