"""A planned adapter and its file -> one contiguous buffer in device layout, cast to the base's dtype.

Layout contract: layout.py. Reading, hashing, checking and placing are one pass over the tensors. Plain numpy on
bit patterns: one thread, and the GIL is released while bytes move. Knows nothing of pools or devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

from adapters_store.base.description import BaseDescription, expert_name
from adapters_store.errors import AdapterRejected
from adapters_store.format.digest import DigestBuilder
from adapters_store.format.dtypes import TENSOR_TYPES, Bits, TensorType, cast_bits, type_of_base
from adapters_store.format.safetensors_header import TensorEntry
from adapters_store.format.tensor_file import WeightsFile
from adapters_store.format.validate import AdapterPlan, check_copy, check_values
from adapters_store.packed.experts import joined
from adapters_store.packed.host_buffers import HostBuffers
from adapters_store.packed.int8 import Int8Rows
from adapters_store.packed.layout import ALIGN_BYTES, PackedAdapter, PackedModule

_FACTOR_BYTES = 4  # float32, whatever the base's type: rounded to bfloat16, a factor would change every output by 0.2 %


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything goes: linear layers, token layers, then each expert, and the buffer's length in elements."""

    modules: tuple[PackedModule, ...]
    num_elements: int


def packed_bytes(plan: AdapterPlan) -> int:
    """Bytes the adapter takes on the device, known before a tensor is read."""
    return plan_layout(plan).num_elements * type_of_base(plan.base.dtype).itemsize


def plan_layout(plan: AdapterPlan) -> Layout:
    """Offsets (in elements) of each A and B, see `place_linear`. Factors are last."""
    itemsize = type_of_base(plan.base.dtype).itemsize
    align = ALIGN_BYTES // itemsize
    shapes = plan.base.modules
    experts = [
        Layer(expert_name(stack.name, expert), stack.rank, stack.scale)
        for stack in plan.experts
        for expert in range(plan.base.experts[stack.name].num_experts)
    ]
    places, end = place_linear(plan.base, [*plan.modules, *experts], is_int8=plan.is_int8)
    modules = [PackedModule(module.name, module.rank, module.scale, *places[module.name]) for module in plan.modules]
    for layer in plan.token_layers:
        starts = []
        for entry in layer.entries:
            starts.append(end)
            end += _aligned(entry.shape[0] * entry.shape[1], align)
        modules.append(PackedModule(layer.name, layer.rank, layer.scale, starts[0], starts[-1]))
    for index, module in enumerate(plan.modules):
        if module.magnitude is not None:
            modules[index] = replace(modules[index], factor_offset=end)
            end += _aligned(shapes[module.name].out_features * _FACTOR_BYTES // itemsize, align)
    modules += [PackedModule(each.name, each.rank, each.scale, *places[each.name]) for each in experts]
    return Layout(tuple(modules), end)


class Layer(NamedTuple):
    """One expert's part of a parameter that an adapter changes."""

    name: str
    rank: int
    scale: float


class Ranked(Protocol):
    """A linear layer that an adapter changes."""

    @property
    def name(self) -> str: ...
    @property
    def rank(self) -> int: ...


def place_linear(
    base: BaseDescription, modules: Sequence[Ranked], *, is_int8: bool
) -> tuple[dict[str, tuple[int, int]], int]:
    """The offsets of each module's A and B, and where they end: aligned, and within a group all A's before all B's."""
    itemsize = type_of_base(base.dtype).itemsize
    align = ALIGN_BYTES // itemsize
    per_value, per_rank = (1, 4) if is_int8 else (itemsize, 0)  # bytes
    shapes = base.table_rows

    def room(rank: int, width: int) -> int:
        return _aligned(-(-rank * width * per_value // itemsize), align)

    places: dict[str, tuple[int, int]] = {}
    end = 0
    for group in _groups(base, modules):
        starts = []
        for module in group:
            end += _aligned(module.rank * per_rank // itemsize, align)
            starts.append(end)
            end += room(module.rank, shapes[module.name].in_features)
        for module, start in zip(group, starts, strict=True):
            places[module.name] = start, end
            end += room(module.rank, shapes[module.name].out_features)
    return places, end


def _aligned(count: int, align: int) -> int:
    return -(-count // align) * align


def _groups(base: BaseDescription, modules: Sequence[Ranked]) -> Iterable[list[Ranked]]:
    """The modules by the base's groups, in the order of each group's first module; a module without a group is its
    own."""
    group_of = {name: group[0] for group in base.groups for name in group}
    groups: dict[str, list[Ranked]] = {}
    for module in modules:
        groups.setdefault(group_of.get(module.name, module.name), []).append(module)
    return groups.values()


def pack(plan: AdapterPlan, weights: Path, *, check: bool = False, buffers: HostBuffers | None = None) -> PackedAdapter:
    """Read, hash and place every tensor. The digest is of the bytes packed: compare it with the one asked for.

    check: refuse values that cannot be served. buffers: the source of the memory; None: new memory.

    Raises:
        AdapterRejected: unsupported_full_weight, non_finite, with `check`; cast_overflow.
        AdapterUnavailable: base_weights_missing, for DoRA.
        OSError: the file cannot be read.
    """
    layout = plan_layout(plan)
    target = type_of_base(plan.base.dtype)
    buffer = (buffers or HostBuffers()).take(layout.num_elements, target.torch_dtype)
    elements = _as_bits(buffer, target)
    elements.fill(0)  # between the tensors too: what is summed and kept depends on the adapter alone
    builder, int8 = DigestBuilder(plan), Int8Rows(elements.view(np.uint8), target.itemsize)
    with WeightsFile(weights) as file:
        for copy in plan.copies if check else ():
            check_copy(copy, file.sha256(copy.entry))
        source = _Source(file, builder, plan.base if check else None)
        for tensor in _placed(plan, layout):
            if tensor.factors_end is None:
                tensor.put(elements, source.parts(tensor.entry), target)
            else:
                values = source.whole(tensor.entry, TENSOR_TYPES["F32"]).view(np.float32)
                rows = values.T if tensor.is_transposed else values
                int8.put(rows, tensor.offset, tensor.factors_end, is_first=not tensor.is_transposed)
        places = {place.name: place for place in layout.modules} if plan.experts else {}
        for stack in plan.experts:
            read = partial(source.whole, kind=TENSOR_TYPES["F32"] if plan.is_int8 else target)
            each = zip(*joined(stack, plan.base.experts[stack.name], read), strict=True)
            for expert, matrices in enumerate(each):
                _put_expert(matrices, places[expert_name(stack.name, expert)], elements, int8 if plan.is_int8 else None)
    if not int8.are_finite:
        raise AdapterRejected("cast_overflow", "weights: the product of A's and B's scales is not finite in int8")
    if factored := [module for module in layout.modules if module.factor_offset]:
        from adapters_store.packed.magnitudes import divide_by_norms  # it imports transformers, to read the base

        divide_by_norms(buffer, factored, plan.base, is_int8=plan.is_int8)
    return PackedAdapter(builder.digest(), buffer, layout.modules, plan.is_int8)


@dataclass(frozen=True, slots=True)
class _Source:
    """The file's tensors. What is read is hashed, and checked if a base is given."""

    file: WeightsFile
    builder: DigestBuilder
    checked_for: BaseDescription | None

    def parts(self, entry: TensorEntry) -> Iterator[Bits]:
        for bits in self.file.parts(entry):
            if self.checked_for is not None:
                check_values(entry, bits, self.checked_for)
            self.builder.update(bits)
            yield bits

    def whole(self, entry: TensorEntry, kind: TensorType) -> Bits:
        """The whole tensor, cast."""
        return cast_bits(np.concatenate(list(self.parts(entry))), TENSOR_TYPES[entry.dtype], kind)


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of the file and its place. factors_end: in an int8 adapter, where the factors of its ranks end.
    kind: the type that it is kept in; None: the base's."""

    entry: TensorEntry
    offset: int
    is_transposed: bool
    factors_end: int | None = None
    kind: TensorType | None = None

    def put(self, elements: Bits, parts: Iterable[Bits], target: TensorType) -> None:
        """Cast and place it. elements: the buffer, in the base's type."""
        kind = self.kind or target
        count = self.entry.shape[0] * self.entry.shape[1] * kind.itemsize // target.itemsize
        room = elements[self.offset : self.offset + count].view(kind.bits)
        room = room.reshape(self.entry.shape[::-1] if self.is_transposed else self.entry.shape)
        first = 0
        for bits in parts:
            rows = cast_bits(bits, TENSOR_TYPES[self.entry.dtype], kind)
            (room.T if self.is_transposed else room)[first : first + len(rows)] = rows
            first += len(rows)


def _placed(plan: AdapterPlan, layout: Layout) -> Iterator[_Tensor]:
    """Every tensor in the digest's order, but those of experts."""
    for module, place in zip(plan.modules, layout.modules, strict=False):
        factors_end = place.a_offset if plan.is_int8 else None
        yield _Tensor(module.a, place.a_offset, False, factors_end)
        yield _Tensor(module.b, place.b_offset, True, factors_end)
        if module.magnitude is not None:
            yield _Tensor(module.magnitude, place.factor_offset, False, kind=TENSOR_TYPES["F32"])
    for layer, place in zip(plan.token_layers, layout.modules[len(plan.modules) :], strict=False):  # then experts
        for entry, offset in zip(layer.entries, (place.a_offset, place.b_offset), strict=False):
            yield _Tensor(entry, offset, layer.rank > 0)


def _put_expert(matrices: tuple[Bits, Bits], place: PackedModule, elements: Bits, int8: Int8Rows | None) -> None:
    """A and B, one row for each rank. int8: writes them as bytes."""
    for bits, offset in zip(matrices, (place.a_offset, place.b_offset), strict=True):
        if int8 is not None:
            values = np.ascontiguousarray(bits).view(np.float32)
            int8.put(values, offset, place.a_offset, is_first=offset == place.a_offset)
        else:
            elements[offset : offset + bits.size].reshape(bits.shape)[:] = bits


def _as_bits(buffer: torch.Tensor, target: TensorType) -> Bits:
    """The tensor's own memory as unsigned integers (numpy has no bfloat16)."""
    signed = torch.int32 if target.itemsize == 4 else torch.int16
    bits: Bits = buffer.view(signed).numpy().view(np.dtype(target.bits))
    return bits
