"""Cold adapters of an object store come to the disk beside each other: a slow one delays itself alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from adapters_store.base.description import AdapterDigest
from adapters_store.errors import StoreUnavailable
from adapters_store.packed.layout import PackedAdapter
from adapters_store.remote.keys import ADAPTERS
from adapters_store.store import AdapterStore
from adapters_store.tiers.host_tier import HostTier, HostTierSettings
from adapters_store.tiers.load_queue import NUM_THREADS
from support.servers.waiting import wait_until
from support.worlds.adapter_memory import FakeClock, digest_of, packed

from .conftest import Fleet

A, B, C = (digest_of(name) for name in "abc")


class Remote:
    """Adapters whose fetch waits until it is allowed, or fails."""

    def __init__(self) -> None:
        self.allowed = {digest: threading.Event() for digest in (A, B, C)}
        self.errors: dict[AdapterDigest, Exception] = {}
        self.loaded: list[AdapterDigest] = []

    def fetch(self, digest: AdapterDigest) -> None:
        self.allowed[digest].wait(60)
        if digest in self.errors:
            raise self.errors[digest]

    def load(self, digest: AdapterDigest) -> PackedAdapter:
        self.loaded.append(digest)
        return packed(digest.removeprefix("sha256:"), 10)


@pytest.fixture
def remote() -> Iterator[Remote]:
    remote = Remote()
    yield remote
    for event in remote.allowed.values():
        event.set()


@contextmanager
def tier(remote: Remote, clock: FakeClock) -> Iterator[HostTier]:
    settings = HostTierSettings(max_bytes=1000, stuck_s=60, retry_s=5)
    host = HostTier(settings, remote.load, fetch=remote.fetch, clock=clock)
    host.start()
    yield host
    host.close()


def test_a_fetch_that_hangs_fails_its_own_adapter_and_others_are_loaded(remote: Remote) -> None:
    clock = FakeClock()
    with tier(remote, clock) as host:
        for digest in (A, B):
            assert host.request(digest)
        remote.allowed[B].set()
        wait_until(lambda: host.find(B))
        clock.advance(61)
        assert host.request(C)
        stuck = host.failure(A)
        assert stuck is not None
        assert (stuck.code, "object store" in stuck.message) == ("adapter_load_stuck", True)
        assert host.failure(C) is None
        remote.allowed[A].set()
        wait_until(lambda: host.find(A))
        assert host.failure(A) is None


def test_a_fetch_that_fails_is_the_failure_of_the_load_unless_the_store_has_changed_since(remote: Remote) -> None:
    away = StoreUnavailable("blobs_unavailable", "away")
    remote.errors = {A: away, B: away}
    with tier(remote, FakeClock()) as host:
        host.request(A)
        remote.allowed[A].set()
        wait_until(lambda: host.failure(A))
        host.request(B)
        host.forget_failures()
        before = host.version
        remote.allowed[B].set()
        wait_until(lambda: host.version > before)
        assert (host.failure(A), host.failure(B)) == (None, None)
        assert remote.loaded == []


def test_what_was_dropped_while_it_was_fetched_is_not_loaded(remote: Remote) -> None:
    with tier(remote, FakeClock()) as host:
        host.request(A)
        host.drop(A)
        host.request(B)
        remote.allowed[A].set()
        remote.allowed[B].set()
        wait_until(lambda: host.find(B))
        assert remote.loaded == [B]


def test_every_thread_but_one_may_hang(remote: Remote) -> None:
    remote.allowed |= {digest_of(f"n{number}"): threading.Event() for number in range(NUM_THREADS - 1)}
    remote.allowed[A].set()
    with tier(remote, FakeClock()) as host:
        for digest in remote.allowed:
            if digest not in (B, C):
                assert host.request(digest)
        wait_until(lambda: host.find(A))


def test_a_slow_object_of_a_real_store_delays_no_other(fleet: Fleet) -> None:
    a, b = fleet.replica("a"), fleet.replica("b")
    a.tenants.create("acme")
    slow, quick = (fleet.publish(a, name, seed=seed).digest for seed, name in enumerate(("slow", "quick")))
    fleet.faults.slow = tuple(ADAPTERS.keys(slow))
    with loading(b, fleet) as host:
        for digest in (slow, quick):
            assert host.request(digest)
        wait_until(lambda: host.find(quick))
        assert host.find(slow) is None
        fleet.faults.go_on.set()
        wait_until(lambda: host.find(slow))


@contextmanager
def loading(store: AdapterStore, fleet: Fleet) -> Iterator[HostTier]:
    settings = HostTierSettings(max_bytes=1 << 24)
    host = HostTier(settings, lambda digest: store.load_packed(digest, fleet.base), fetch=store.fetch)
    host.start()
    yield host
    fleet.faults.go_on.set()
    host.close()
