"""The adapters of one engine in host and device memory, and the load that brings them there. Knows sizes; knows no
requests."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch

from adapters_store.base.description import AdapterDigest, BaseDescription
from adapters_store.packed.host_buffers import HostBuffers
from adapters_store.packed.layout import ALIGN_BYTES, PackedAdapter
from adapters_store.tiers.device_pool import DevicePool, DevicePoolSettings
from adapters_store.tiers.host_slab import HostSlab
from adapters_store.tiers.host_tier import HostTier, HostTierSettings
from adapters_store.tiers.tiers import AdapterTiers
from lora_kernels.background import Later, Pace, TimeSlices, UntilAwaited
from server.engine.metrics import Histogram
from server.engine.model.adapter_copier import ArenaCopier, empty_table
from server.engine.model.base_model import BaseModel
from server.engine.startup.memory_plan import MemoryPlan

if TYPE_CHECKING:
    from server.engine.tensor_parallel.leader import Leader


class AdapterSource(Protocol):
    """Where adapters come from: `adapters_store.store.AdapterStore`. fetch: brings one to this machine's disk, before
    it is loaded; None: all are there."""

    @property
    def fetch(self) -> Callable[[AdapterDigest], object] | None: ...

    def load_packed(
        self,
        digest: AdapterDigest,
        base: BaseDescription,
        *,
        buffers: HostBuffers | None = None,
        slices: TimeSlices | None = None,
        later: Later = ...,
    ) -> PackedAdapter: ...
    def quarantine_adapter(
        self, digest: AdapterDigest, code: str, message: str, *, tenant: str | None = None
    ) -> None: ...


class AdapterParts:
    """The adapter table, both tiers, and what copies between them. slices: when loads and copies may compute."""

    def __init__(
        self, base: BaseModel, plan: MemoryPlan, source: AdapterSource, *, max_adapters: int, leader: Leader | None
    ) -> None:
        self.slices = TimeSlices()
        self.load_seconds = Histogram()
        self._base, self._source, self._leader = base.description, source, leader
        self._later: list[Callable[[Pace], None]] = []  # the loader's thread alone adds and does
        arena = torch.zeros(plan.adapter_pool_bytes // base.dtype.itemsize, dtype=base.dtype, device=base.device)
        self.table = empty_table(base.description, arena, max_adapters)
        self.copier = ArenaCopier(self.table, base.description, self.slices, others=leader)
        self._slab = HostSlab(plan.host_cache_bytes, lock=True) if base.device.type == "cuda" else None
        max_bytes = plan.host_cache_bytes if self._slab is None else self._slab.capacity
        self._buffers = HostBuffers(max_bytes) if self._slab is None else HostBuffers(cut=self._slab.take)
        self.host = HostTier(
            HostTierSettings(max_bytes=max_bytes),
            self._load,
            fetch=source.fetch,
            after_load=self._do_later,
        )
        if self._slab is not None:
            self._slab.make_room = self.host.make_room
        pool = DevicePoolSettings(
            capacity_elements=arena.numel(),
            max_slots=max_adapters,
            alignment_elements=ALIGN_BYTES // arena.element_size(),
        )
        self.tiers = AdapterTiers(self.host, DevicePool(pool), self.copier)

    def close(self) -> None:
        self.host.close()
        self.copier.close()
        if self._slab is not None:
            self._slab.close()

    def _load(self, digest: AdapterDigest) -> PackedAdapter:
        torch.set_num_threads(1)  # a second pool of compute threads slows every step (lora_kernels.process)
        start_s = time.perf_counter()
        buffers = self._buffers if self._leader is None else HostBuffers()
        packed = self._source.load_packed(
            digest, self._base, buffers=buffers, slices=self.slices, later=self._later.append
        )
        if self._leader is not None:
            packed = self._leader.cut(packed, self._buffers, self.slices)
        self.load_seconds.observe(time.perf_counter() - start_s)
        return packed

    def _do_later(self, is_awaited: Callable[[], bool]) -> None:
        while self._later:
            self._later.pop()(UntilAwaited(self.slices, is_awaited))
