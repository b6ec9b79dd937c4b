"""Host memory for adapters is one range: locked once, cut exactly, and never more than its budget."""

from __future__ import annotations

import random

import pytest
import torch

from adapters_store.base.description import AdapterDigest
from adapters_store.packed.host_buffers import HostBuffers
from adapters_store.packed.layout import PackedAdapter
from adapters_store.tiers.host_slab import CACHE_LINE, HostMemoryFull, HostSlab
from adapters_store.tiers.host_tier import HostTier, HostTierSettings

KIB = 1024
CAPACITY = 1024 * KIB


class Cudart:
    """Notes what is locked. error: of the call that locks."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.locked: list[tuple[int, int]] = []
        self.unlocked: list[int] = []

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        self.locked.append((address, num_bytes))
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        self.unlocked.append(address)
        return 0


class World:
    """A tier over a slab; each adapter's bytes all have the value that its digest says."""

    def __init__(self, sizes: dict[str, int], capacity: int = CAPACITY) -> None:
        self.now_s = 0.0
        self.sizes = sizes
        self.slab = HostSlab(capacity, lock=False)
        self.buffers = HostBuffers(cut=self.slab.take)
        self.num_loads = 0
        self.tier = HostTier(HostTierSettings(max_bytes=self.slab.capacity), self.load, clock=lambda: self.now_s)
        self.slab.make_room = self.tier.make_room

    def load(self, digest: AdapterDigest) -> PackedAdapter:
        self.num_loads += 1
        buffer = self.buffers.take(self.sizes[digest] // 2, torch.bfloat16)
        buffer.view(torch.uint8).fill_(value_of(digest))
        return PackedAdapter(digest, buffer, ())

    def bring(self, name: str) -> PackedAdapter | None:
        self.tier.request(AdapterDigest(name))
        self.tier.load_next()
        return self.tier.find(AdapterDigest(name))

    def assert_books_balance(self) -> None:
        held = [adapter for digest in self.tier.held() if (adapter := self.tier.find(digest)) is not None]
        assert sum(adapter.num_bytes for adapter in held) == self.tier.stats().num_bytes
        assert self.slab.num_free_bytes == self.slab.capacity - self.tier.stats().num_bytes
        for adapter in held:
            values = adapter.buffer.view(torch.uint8)
            assert int(values[0]) == int(values[-1]) == value_of(adapter.digest)


def value_of(digest: AdapterDigest) -> int:
    return 1 + int(digest) % 250


def test_the_books_balance_whatever_ranks_come_and_go() -> None:
    """Of each power of two torch's own cache kept the most that ever was: here a change of ranks leaves nothing."""
    chance = random.Random(5)
    ranks = [8, 16, 64, 128]
    sizes = {str(index): ranks[index // 40] * (1024 + CACHE_LINE * chance.randrange(4)) for index in range(160)}
    world = World(sizes)
    for step in range(300):
        first = 40 * (step // 75)  # the mix of ranks changes
        found = world.bring(str(chance.randrange(max(0, first - 20), first + 40)))
        assert found is not None, "unused adapters give up their room"
        del found
        world.assert_books_balance()
    assert world.tier.stats().evictions > 50


def test_an_adapter_that_a_copy_reads_keeps_its_memory_and_others_wait_without_trying_again() -> None:
    world = World({"1": 700 * KIB, "2": 600 * KIB})
    first = world.bring("1")
    assert first is not None
    pinned = world.tier.pin(first)
    del first
    assert world.bring("2") is None
    for _ in range(5):
        world.bring("2")
    assert world.num_loads == 2, "nothing has changed, so the disk is left alone"
    world.tier.unpin(pinned)
    del pinned
    assert world.bring("2") is not None
    assert world.tier.held() == ["2"]
    world.assert_books_balance()


def test_memory_full_of_more_urgent_adapters_is_tried_again_after_a_while() -> None:
    world = World({"1": 700 * KIB, "2": 600 * KIB})
    assert world.bring("1") is not None
    world.tier.prioritise([AdapterDigest("1"), AdapterDigest("2")])
    assert world.bring("2") is None
    assert world.bring("2") is None
    assert world.num_loads == 2
    world.tier.prioritise([AdapterDigest("2")])
    assert world.bring("2") is not None


def test_an_adapter_larger_than_the_slab_is_refused_with_both_sizes() -> None:
    world = World({"1": CAPACITY + CACHE_LINE})
    assert world.bring("1") is None
    error = world.tier.failure(AdapterDigest("1"))
    assert error is not None
    assert error.code == "adapter_too_large_for_host"
    assert str(CAPACITY) in error.message


def test_memory_comes_back_only_with_the_last_view_of_it() -> None:
    slab = HostSlab(CAPACITY, lock=False)
    buffers = HostBuffers(cut=slab.take)
    view = buffers.take(CAPACITY, torch.uint8).view(torch.int32)[8:16]
    with pytest.raises(HostMemoryFull):
        buffers.take(1, torch.uint8)
    del view
    assert buffers.take(CAPACITY, torch.uint8).data_ptr() % CACHE_LINE == 0


def test_the_whole_budget_is_locked_once_and_no_adapter_locks_more(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    slab = HostSlab(CAPACITY, lock=True)
    buffers = HostBuffers(cut=slab.take)
    (address, num_bytes) = cudart.locked[0]
    for count in (1, 63, 5000):
        place = buffers.take(count, torch.bfloat16).data_ptr()
        assert address <= place <= address + num_bytes - 2 * count
    assert (slab.is_locked, num_bytes, len(cudart.locked)) == (True, CAPACITY, 1)
    slab.close()
    slab.close()
    assert cudart.unlocked == [address]


def test_a_system_that_locks_no_memory_is_served_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    launched: list[str] = []

    def reporting(count: int, *, device: str) -> None:
        launched.append(device)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: Cudart(error=2))
    monkeypatch.setattr(torch, "zeros", reporting)
    slab = HostSlab(CAPACITY, lock=True)
    assert launched == ["cuda"], "CUDA reports the error once more: not in a request's forward"
    assert not slab.is_locked
    assert "--host-cache-mib" in caplog.text
    assert HostBuffers(cut=slab.take).take(9, torch.uint8).numel() == 9
