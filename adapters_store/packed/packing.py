"""A planned adapter and its file -> one contiguous buffer in device layout, cast to the base's dtype.

Layout contract: layout.py. Reading, hashing, checking and placing are one pass over the tensors. Plain numpy on
bit patterns: one thread, and the GIL is released while bytes move. Knows nothing of pools or devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
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

_FACTOR_BYTES = 4  # float32, whatever the base's type: rounded to bfloat16, a factor would change every output by 0.2 %


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything goes: modules in the base's order, and the buffer's length in elements."""

    modules: tuple[PackedModule, ...]
    num_elements: int

    @property
    def first_factor(self) -> int:
        """From here on the buffer holds float32, whatever its type."""
        return min((module.factor_offset for module in self.modules if module.factor_offset), default=self.num_elements)


def packed_bytes(plan: AdapterPlan) -> int:
    """Bytes the adapter takes on the device, known before a tensor is read."""
    return plan_layout(plan).num_elements * type_of_base(plan.base.dtype).itemsize


def plan_layout(plan: AdapterPlan) -> Layout:
    """Offsets (in elements) of each A and B: aligned, and within a group all A's before all B's. Factors are last."""
    itemsize = type_of_base(plan.base.dtype).itemsize
    align = ALIGN_BYTES // itemsize
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
    for index, module in enumerate(plan.modules):
        if module.magnitude is not None:
            modules[index] = replace(modules[index], factor_offset=end)
            end += _aligned(shapes[module.name].out_features * _FACTOR_BYTES // itemsize, align)
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
        AdapterUnavailable: base_weights_missing, for DoRA.
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
            is_factor = offset >= layout.first_factor
            kind = TENSOR_TYPES["F32"] if is_factor else target
            count = entry.shape[0] * entry.shape[1] * kind.itemsize // target.itemsize
            room = elements[offset : offset + count].view(kind.bits)
            room = room.reshape(entry.shape[::-1] if is_transposed else entry.shape)
            first = 0
            for bits in file.parts(entry):
                if check:
                    check_values(entry, bits, plan.base)
                builder.update(bits)
                rows = cast_bits(bits, TENSOR_TYPES[entry.dtype], kind)
                (room.T if is_transposed else room)[first : first + len(rows)] = rows
                first += len(rows)
    if factored := [module for module in layout.modules if module.factor_offset]:
        from adapters_store.packed.magnitudes import divide_by_norms  # it imports transformers, to read the base

        divide_by_norms(buffer, factored, plan.base)
    return PackedAdapter(builder.digest(), buffer, layout.modules)


def _placed(plan: AdapterPlan, layout: Layout) -> Iterator[tuple[TensorEntry, int, bool]]:
    """Every tensor in the digest's order, its offset, and whether it is stored transposed."""
    for module, place in zip(plan.modules, layout.modules, strict=False):
        yield module.a, place.a_offset, False
        yield module.b, place.b_offset, True
        if module.magnitude is not None:
            yield module.magnitude, place.factor_offset, False
    for layer, place in zip(plan.token_layers, layout.modules[len(plan.modules) :], strict=True):
        for entry, offset in zip(layer.entries, (place.a_offset, place.b_offset), strict=False):
            yield entry, offset, layer.rank > 0


def _as_bits(buffer: torch.Tensor, target: TensorType) -> Bits:
    """The tensor's own memory as unsigned integers (numpy has no bfloat16)."""
    signed = torch.int32 if target.itemsize == 4 else torch.int16
    bits: Bits = buffer.view(signed).numpy().view(np.dtype(target.bits))
    return bits
