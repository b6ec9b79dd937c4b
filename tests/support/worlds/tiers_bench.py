"""Adapter tiers over a fake disk and a fake device, where loads and copies happen when the test says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from adapters_store.base.description import AdapterDigest
from adapters_store.errors import StoreError
from adapters_store.packed.layout import PackedAdapter
from adapters_store.tiers.device_pool import DevicePool, DevicePoolSettings
from adapters_store.tiers.entries import Owner
from adapters_store.tiers.host_tier import HostTier, HostTierSettings
from adapters_store.tiers.stats import AdapterTiersSettings
from adapters_store.tiers.tiers import AdapterTiers
from support.worlds.adapter_memory import FakeClock, FakeDevice, packed


@dataclass
class FakeDisk:
    """Adapters of 10 elements, unless set otherwise."""

    sizes: dict[AdapterDigest, int] = field(default_factory=dict)
    errors: dict[AdapterDigest, StoreError] = field(default_factory=dict)
    meanwhile: Callable[[], None] = lambda: None

    def load(self, digest: AdapterDigest) -> PackedAdapter:
        self.meanwhile()
        if digest in self.errors:
            raise self.errors[digest]
        return packed(digest.removeprefix("sha256:"), self.sizes.get(digest, 10))


@dataclass
class Bench:
    """Tiers over a device of 40 elements."""

    tiers: AdapterTiers
    host: HostTier
    device: FakeDevice
    clock: FakeClock
    disk: FakeDisk
    delay: list[int]
    loads: list[tuple[Owner, int]] = field(default_factory=list)

    def settle(self) -> None:
        """Until nothing is under way."""
        for _ in range(50):
            self.host.load_next()
            self.device.tick()
            self.loads += self.tiers.poll().loads

    def bring(self, *digests: AdapterDigest) -> None:
        """On the device, without references."""
        self.tiers.update(digests)
        self.settle()
        assert set(digests) <= set(self.tiers.ready())
        self.tiers.update(())

    def resident(self) -> set[AdapterDigest]:
        return {entry.digest for entry in self.tiers.resident()}


def make_bench(*, max_copies: int = 4, max_bytes: int = 4000, recheck_s: float = 1e9) -> Bench:
    """recheck_s is out of reach, so that everything here happens because the tiers were notified."""
    clock, disk, delay = FakeClock(), FakeDisk(), [0]
    device = FakeDevice(40, lambda digest: 1 + ord(digest[-1]), lambda _: delay[0])
    host = HostTier(HostTierSettings(max_bytes=max_bytes), disk.load, clock=clock)
    pool = DevicePool(DevicePoolSettings(capacity_elements=40, max_slots=8, alignment_elements=1), clock)
    settings = AdapterTiersSettings(max_copies=max_copies, recheck_s=recheck_s)
    tiers = AdapterTiers(host, pool, device, settings=settings, clock=clock)
    return Bench(tiers, host, device, clock, disk, delay)
