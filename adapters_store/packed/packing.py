"""A planned adapter and its file -> one contiguous buffer in device layout, cast to the base's dtype.

Layout contract: layout.py. Reading, hashing, checking and placing are one pass over the tensors. Plain numpy on
bit patterns: one thread, and the GIL is released while bytes move. Knows nothing of pools or devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from adapters_store.base.description import BaseDescription
from adapters_store.format.digest import DigestBuilder
from adapters_store.format.dtypes import TENSOR_TYPES, Bits, TensorType, cast_bits, type_of_base
from adapters_store.format.safetensors_header import TensorEntry
from adapters_store.format.tensor_file import WeightsFile
from adapters_store.format.validate import AdapterPlan, PlannedModule, check_copy, check_values
from adapters_store.packed.host_buffers import HostBuffers
from adapters_store.packed.layout import ALIGN_BYTES, PackedAdapter, PackedModule


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything goes: modules in the base's order, and the buffer's length in elements."""

    modules: tuple[PackedModule, ...]
    num_elements: int


def packed_bytes(plan: AdapterPlan) -> int:
    """Bytes the adapter takes on the device, known before a tensor is read."""
    return plan_layout(plan).num_elements * type_of_base(plan.base.dtype).itemsize


def plan_layout(plan: AdapterPlan) -> Layout:
    """Offsets (in elements) of each A and B: aligned, and within a group all A's before all B's."""
    align = ALIGN_BYTES // type_of_base(plan.base.dtype).itemsize
    shapes = plan.base.modules
    a_offsets: dict[str, int] = {}
    b_offsets: dict[str, int] = {}
    end = 0
    for group in _groups(plan):
        for module in group:
            a_offsets[module.name] = end
            end += _aligned(module.rank * shapes[module.name].in_features, align)
        for module in group:
            b_offsets[module.name] = end
            end += _aligned(module.rank * shapes[module.name].out_features, align)
    modules = [
        PackedModule(module.name, module.rank, module.scale, a_offsets[module.name], b_offsets[module.name])
        for module in plan.modules
    ]
    for layer in plan.token_layers:
        starts = []
        for entry in layer.entries:
            starts.append(end)
            end += _aligned(entry.shape[0] * entry.shape[1], align)
        modules.append(PackedModule(layer.name, layer.rank, layer.scale, starts[0], starts[-1]))
    return Layout(tuple(modules), end)


def _aligned(count: int, align: int) -> int:
    return -(-count // align) * align


def _groups(plan: AdapterPlan) -> Iterable[list[PlannedModule]]:
    """The planned modules by the base's groups, in the order of each group's first module; a module without a group is
    its own."""
    group_of = _group_of(plan.base)
    groups: dict[str, list[PlannedModule]] = {}
    for module in plan.modules:
        groups.setdefault(group_of.get(module.name, module.name), []).append(module)
    return groups.values()


def _group_of(base: BaseDescription) -> dict[str, str]:
    return {name: group[0] for group in base.groups for name in group}


def pack(plan: AdapterPlan, weights: Path, *, check: bool = False, buffers: HostBuffers | None = None) -> PackedAdapter:
    """Read, hash and place every tensor. The digest is of the bytes packed: compare it with the one asked for.

    check: refuse values that cannot be served. buffers: the source of the memory; None: new memory.

    Raises:
        AdapterRejected: unsupported_full_weight, non_finite, cast_overflow, with `check`.
        OSError: the file cannot be read.
    """
    layout = plan_layout(plan)
    target = type_of_base(plan.base.dtype)
    buffer = (buffers or HostBuffers()).take(layout.num_elements, target.torch_dtype)
    elements = _as_bits(buffer, target)
    elements.fill(0)  # between the tensors too: what is summed and kept depends on the adapter alone
    builder = DigestBuilder(plan)
    with WeightsFile(weights) as file:
        for copy in plan.copies if check else ():
            check_copy(copy, file.sha256(copy.entry))
        for entry, offset, is_transposed in _placed(plan, layout):
            count = entry.shape[0] * entry.shape[1]
            room = elements[offset : offset + count].reshape(entry.shape[::-1] if is_transposed else entry.shape)
            first = 0
            for bits in file.parts(entry):
                if check:
                    check_values(entry, bits, plan.base)
                builder.update(bits)
                rows = cast_bits(bits, TENSOR_TYPES[entry.dtype], target)
                (room.T if is_transposed else room)[first : first + len(rows)] = rows
                first += len(rows)
    return PackedAdapter(builder.digest(), buffer, layout.modules)


def _placed(plan: AdapterPlan, layout: Layout) -> Iterator[tuple[TensorEntry, int, bool]]:
    """Every tensor in the digest's order, its offset, and whether it is stored transposed."""
    for module, place in zip(plan.modules, layout.modules, strict=False):
        yield module.a, place.a_offset, False
        yield module.b, place.b_offset, True
    for layer, place in zip(plan.token_layers, layout.modules[len(plan.modules) :], strict=True):
        for entry, offset in zip(layer.entries, (place.a_offset, place.b_offset), strict=False):
            yield entry, offset, layer.rank > 0


def _as_bits(buffer: torch.Tensor, target: TensorType) -> Bits:
    """The tensor's own memory as unsigned integers (numpy has no bfloat16)."""
    signed = torch.int32 if target.itemsize == 4 else torch.int16
    bits: Bits = buffer.view(signed).numpy().view(np.dtype(target.bits))
    return bits
