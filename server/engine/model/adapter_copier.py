"""Copies packed adapters into the device arena and fills its table. Knows tensors and slots; evicts nothing."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from adapters_store.base.description import BaseDescription
from adapters_store.packed.layout import ALIGN_BYTES, PackedAdapter
from adapters_store.packed.packed_file import as_bytes
from adapters_store.tiers.entries import IsCopied
from lora_kernels import background
from lora_kernels.background import TimeSlices
from lora_kernels.lora.batch import LoraTable
from server.engine.model.base_model import BaseModel
from server.engine.model.other_ranks import OtherRanks

INLINE_COPY_BYTES = 256 * 1024  # handing a smaller copy to another thread costs more than the copy


class ArenaCopier:
    """Copies adapters into the arena beside the engine: on a thread (CPU) or on a side stream (GPU).

    others: each gets its part of an adapter.
    """

    def __init__(
        self, table: LoraTable, base: BaseDescription, slices: TimeSlices, *, others: OtherRanks | None = None
    ) -> None:
        self._table = table
        self._others = others
        self._slices = slices
        self._module_index = base.module_index
        self._on_gpu = table.arena.device.type == "cuda"
        self._stream = torch.cuda.Stream(table.arena.device) if self._on_gpu else None
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="adapter-copy")

    def start(self, slot: int, offset: int, adapter: PackedAdapter) -> IsCopied:
        """Begin the copy to arena[offset:] and point the slot's table row at it."""
        if self._others is not None:
            self._others.load_adapter(slot, offset, adapter)
        self._table.set_slot(slot, offset, *adapter.places(self._module_index), is_int8=adapter.is_int8)
        target = self._table.arena[offset : offset + adapter.buffer.numel()]
        if self._stream is not None:
            return self._copy_on_stream(self._stream, target, adapter.buffer)
        if adapter.num_bytes <= INLINE_COPY_BYTES:
            _copy(target, adapter.buffer)
            return lambda: True
        return partial(_has_ended, self._threads.submit(_copy_in_slices, target, adapter.buffer, self._slices))

    def clear(self, slot: int) -> None:
        """The slot holds no adapter any more."""
        if self._others is not None:
            self._others.clear_slot(slot)
        self._table.clear_slot(slot)

    def close(self) -> None:
        self._threads.shutdown()

    def _copy_on_stream(self, stream: torch.cuda.Stream, target: torch.Tensor, buffer: torch.Tensor) -> IsCopied:
        stream.wait_stream(torch.cuda.current_stream(target.device))  # the last reader of this memory may still run
        with torch.cuda.stream(stream):
            target.copy_(buffer, non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
        return event.query


def _has_ended(copy: Future[None]) -> bool:
    """Raises what the copy raised: an adapter that was not copied whole is never served."""
    if not copy.done():
        return False
    copy.result()
    return True


def empty_table(base: BaseDescription, arena: torch.Tensor, num_slots: int) -> LoraTable:
    return LoraTable(arena, len(base.table_rows), num_slots, first_expert=len(base.modules))


def table_of(base: BaseModel, adapters: Sequence[PackedAdapter]) -> LoraTable:
    """A table of its own, whose slot n holds adapters[n]."""
    sizes = [-(-adapter.buffer.numel() // ALIGN_BYTES) * ALIGN_BYTES for adapter in adapters]
    arena = torch.zeros(sum(sizes), dtype=base.dtype, device=base.device)
    table = empty_table(base.description, arena, max(len(adapters), 1))
    offset = 0
    for slot, (adapter, size) in enumerate(zip(adapters, sizes, strict=True)):
        table.set_slot(slot, offset, *adapter.places(base.description.module_index), is_int8=adapter.is_int8)
        arena[offset : offset + adapter.buffer.numel()] = adapter.buffer.to(base.device)
        offset += size
    return table


def _copy(target: torch.Tensor, buffer: torch.Tensor) -> None:
    """On one thread, without the GIL: torch's own copy would wake a second pool of compute threads."""
    np.copyto(as_bytes(target), as_bytes(buffer))


def _copy_in_slices(target: torch.Tensor, buffer: torch.Tensor, slices: TimeSlices) -> None:
    if background.is_available():
        background.copy_bytes(as_bytes(target), as_bytes(buffer), slices)
    else:
        _copy(target, buffer)
