"""What stays in host memory, what is loaded when, and what a failed or unwanted load leaves behind (nothing)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from adapters_store.base.description import AdapterDigest
from adapters_store.errors import BlobDamaged, StoreError
from adapters_store.packed.layout import PackedAdapter
from adapters_store.tiers.entries import HostEntry
from adapters_store.tiers.host_tier import HostTier, HostTierSettings
from support.worlds.adapter_memory import FakeClock, digest_of, packed

A, B, C, D = (digest_of(name) for name in "abcd")


class Loader:
    """Adapters of 10 elements (40 bytes), unless set otherwise. Records the requested loads."""

    def __init__(self) -> None:
        self.asked: list[AdapterDigest] = []
        self.sizes: dict[AdapterDigest, int] = {}
        self.errors: dict[AdapterDigest, Exception] = {}
        self.meanwhile: Callable[[], None] = lambda: None

    def __call__(self, digest: AdapterDigest) -> PackedAdapter:
        self.asked.append(digest)
        self.meanwhile()
        if digest in self.errors:
            raise self.errors[digest]
        return packed(digest.removeprefix("sha256:"), self.sizes.get(digest, 10))


@pytest.fixture
def loader() -> Loader:
    return Loader()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def host(loader: Loader, clock: FakeClock) -> HostTier:
    return HostTier(HostTierSettings(max_bytes=100, max_queue=3, retry_s=5.0), loader, clock=clock)


def load(host: HostTier, *digests: AdapterDigest) -> None:
    for digest in digests:
        assert host.request(digest)
        host.load_next()


def pin(host: HostTier, digest: AdapterDigest) -> HostEntry:
    adapter = host.find(digest)
    assert adapter is not None
    return host.pin(adapter)


def test_loads_are_done_once_each_in_the_order_asked(host: HostTier, loader: Loader) -> None:
    for digest in (B, A, B, A):
        assert host.request(digest)
    assert [host.load_next() for _ in range(3)] == [True, True, False]
    assert host.request(A)
    assert not host.load_next()
    assert loader.asked == [B, A]
    assert host.find(A) is not None
    assert (host.stats().loads, host.stats().misses, host.stats().num_bytes) == (2, 2, 80)


def test_tenants_loads_alternate_however_many_one_has_queued(loader: Loader, clock: FakeClock) -> None:
    host = HostTier(HostTierSettings(max_bytes=10_000), loader, clock=clock)
    acme, globex = ([digest_of(f"{tenant}{index}") for index in range(6)] for tenant in ("acme", "globex"))

    def arrive() -> None:
        loader.meanwhile = lambda: None
        for digest in globex[:3]:
            host.request(digest, "globex")
        host.request(acme[5], "acme")

    loader.meanwhile = arrive  # the first of acme's is under way
    for digest in acme[:5]:
        host.request(digest, "acme")
    while host.load_next():
        continue
    assert loader.asked == [acme[0], globex[0], acme[1], globex[1], acme[2], globex[2], *acme[3:]]
    for digest in globex[3:5]:
        host.request(digest, "globex")
    for digest in (A, B):
        host.request(digest, "acme")  # what it loaded alone is not held against it
    while host.load_next():
        continue
    assert loader.asked[9:] == [globex[3], A, globex[4], B]


def test_tenants_that_ask_for_one_at_a_time_do_not_starve_one_that_asked_for_several(
    loader: Loader, clock: FakeClock
) -> None:
    host = HostTier(HostTierSettings(max_bytes=10_000), loader, clock=clock)
    for index in range(3):
        host.request(digest_of(f"acme{index}"), "acme")
    for index in range(8):
        host.request(digest_of(f"globex{index}"), "globex")
        host.request(digest_of(f"initech{index}"), "initech")
        assert host.load_next()
        assert host.load_next()
    asked = [loader.asked.index(digest_of(f"acme{index}")) for index in range(3)]
    assert asked == [0, 3, 6], loader.asked


def test_a_fetch_under_way_is_kept_for_who_asks_again(loader: Loader, clock: FakeClock) -> None:
    started, go_on, fetched = threading.Semaphore(0), threading.Event(), []

    def fetch(digest: AdapterDigest) -> None:
        fetched.append(digest)
        started.release()
        assert go_on.wait(60)

    host = HostTier(HostTierSettings(max_bytes=100, stuck_s=5.0), loader, clock=clock, fetch=fetch)
    try:
        assert host.request(A)
        assert started.acquire(timeout=60)
        for _ in range(9):
            host.prioritise([])
            assert host.request(A)
        clock.advance(6.0)
        assert "object store" in str(host.failure(A)), "it waits since the first asked"
        assert host.request(B)
        assert started.acquire(timeout=60), "another adapter still finds a thread"
        assert fetched == [A, B]
    finally:
        go_on.set()
        host.close()


def test_a_queued_load_that_is_not_wanted_any_more_is_dropped(host: HostTier, loader: Loader) -> None:
    for digest in (A, B, C):
        host.request(digest)
    host.prioritise([B])
    assert host.request(D)
    while host.load_next():
        continue
    assert loader.asked == [B, D]
    assert host.request(A)
    assert host.load_next()
    assert host.find(A) is not None


def test_a_full_queue_takes_no_more(host: HostTier) -> None:
    assert [host.request(digest) for digest in (A, B, C, D)] == [True, True, True, False]
    host.load_next()
    assert host.request(D)


def test_the_longest_unused_is_evicted_to_stay_within_the_budget(host: HostTier) -> None:
    load(host, A, B)
    host.find(A)
    load(host, C)
    assert host.find(B) is None
    assert host.find(A) is not None
    assert (host.stats().num_bytes, host.stats().evictions) == (80, 1)


def test_a_buffer_that_is_being_copied_is_not_evicted(host: HostTier) -> None:
    load(host, A, B)
    held = pin(host, A)
    load(host, C)
    assert host.find(A) is not None
    assert host.find(B) is None
    host.unpin(held)
    host.find(C)
    load(host, B)
    assert host.find(A) is None
    with pytest.raises(AssertionError, match="unpinned more often"):
        host.unpin(held)


def test_an_adapter_that_was_evicted_since_it_was_found_can_still_be_copied(host: HostTier) -> None:
    load(host, A)
    adapter = host.find(A)
    assert adapter is not None
    load(host, B, C)
    assert host.find(A) is None
    held = host.pin(adapter)
    assert held.adapter is adapter
    host.unpin(held)
    assert host.stats().num_bytes == 80


def test_the_less_urgent_makes_no_room_for_itself(host: HostTier, loader: Loader) -> None:
    host.prioritise([A, B, C])
    load(host, A, B)
    load(host, C)
    assert [host.find(digest) is not None for digest in (A, B, C)] == [True, True, False]
    load(host, C)
    assert loader.asked == [A, B, C], "loaded again although there is known to be no room"
    host.prioritise([C, B])
    load(host, C)
    assert [host.find(digest) is not None for digest in (A, B, C)] == [False, True, True]


def test_a_hit_is_a_copy_that_needed_no_load(host: HostTier) -> None:
    load(host, A)
    host.unpin(pin(host, A))
    assert host.stats().hits == 0
    host.unpin(pin(host, A))
    assert host.stats().hits == 1


def test_a_failure_is_remembered_for_a_while_and_then_tried_again(
    host: HostTier, loader: Loader, clock: FakeClock
) -> None:
    loader.errors[A] = BlobDamaged("blob_damaged", "A is damaged")
    load(host, A)
    assert host.failure(A) is loader.errors[A]
    clock.advance(4.9)
    load(host, A)
    assert loader.asked == [A]
    clock.advance(0.2)
    assert host.failure(A) is None
    loader.errors.clear()
    load(host, A)
    assert host.find(A) is not None
    assert (host.stats().failures, host.stats().loads) == (1, 1)


def test_a_bug_in_one_load_fails_that_adapter_only(
    host: HostTier, loader: Loader, caplog: pytest.LogCaptureFixture
) -> None:
    loader.errors[A] = RuntimeError("/secret/path")
    load(host, A, B)
    error = host.failure(A)
    assert error is not None
    assert error.code == "adapter_load_failed"
    assert "/secret/path" not in error.message
    assert "/secret/path" in caplog.text
    assert host.find(B) is not None


def test_an_adapter_beyond_the_whole_budget_fails_with_size_and_limit(host: HostTier, loader: Loader) -> None:
    loader.sizes[A] = 26
    load(host, B, A)
    error = host.failure(A)
    assert error is not None
    assert (error.code, error.message) == (
        "adapter_too_large_for_host",
        "adapter has 104 bytes, host memory for adapters is 100",
    )
    assert host.find(B) is not None


def test_a_dropped_adapter_is_gone_from_memory_and_queue(host: HostTier, loader: Loader) -> None:
    load(host, A)
    host.request(B)
    host.drop(A)
    host.drop(B)
    host.drop(C)
    assert host.find(A) is None
    assert not host.load_next()
    assert (loader.asked, host.stats().num_bytes) == ([A], 0)


def test_a_load_under_way_when_its_adapter_is_dropped_is_thrown_away(host: HostTier, loader: Loader) -> None:
    loader.meanwhile = lambda: host.drop(A)
    load(host, A)
    assert host.find(A) is None
    loader.meanwhile = lambda: None
    load(host, A)
    assert host.find(A) is not None


def test_a_load_asked_anew_while_the_dropped_one_is_under_way_is_done_again(host: HostTier, loader: Loader) -> None:
    def delete_and_upload_again() -> None:
        loader.meanwhile = lambda: None
        host.drop(A)
        assert host.request(A)

    loader.meanwhile = delete_and_upload_again
    load(host, A)
    assert host.find(A) is None
    assert host.load_next()
    assert host.find(A) is not None
    assert loader.asked == [A, A]


def test_the_version_changes_with_every_load_failure_and_drop(host: HostTier, loader: Loader) -> None:
    versions = [host.version]
    loader.errors[B] = BlobDamaged("blob_damaged", "B is damaged")
    for digest in (A, B):
        load(host, digest)
        versions.append(host.version)
    host.drop(A)
    versions.append(host.version)
    assert len(set(versions)) == 4


@pytest.fixture
def running(loader: Loader) -> Iterator[tuple[HostTier, threading.Event]]:
    """A host tier whose thread runs, and the event its notify() sets."""
    loaded = threading.Event()
    host = HostTier(HostTierSettings(max_bytes=10_000), loader)
    host.start(loaded.set)
    yield host, loaded
    host.close()


def test_the_thread_loads_in_the_background_and_wakes_the_engine(
    running: tuple[HostTier, threading.Event], loader: Loader
) -> None:
    host, loaded = running
    names: list[str] = []
    loader.meanwhile = lambda: names.append(threading.current_thread().name)
    host.request(A)
    assert loaded.wait(600)
    assert host.find(A) is not None
    assert names == ["adapter-loader"]


def test_work_after_a_load_holds_up_neither_its_request_nor_the_thread(loader: Loader) -> None:
    loaded, may_end = threading.Event(), threading.Event()
    ended: list[bool] = []

    def keep(is_awaited: Callable[[], bool]) -> None:
        ended.append(may_end.wait(600))
        raise OSError("the disk is gone")

    host = HostTier(HostTierSettings(max_bytes=10_000), loader, after_load=keep)
    host.start(loaded.set)
    for digest in (A, B):
        host.request(digest)
        assert loaded.wait(600)
        loaded.clear()
        assert host.find(digest) is not None
        may_end.set()
    host.close()
    assert ended == [True, True]


def test_work_after_a_load_may_take_its_time_until_a_load_waits(loader: Loader, clock: FakeClock) -> None:
    seen: list[bool] = []

    def keep(is_awaited: Callable[[], bool]) -> None:
        clock.advance(100)
        seen.append(is_awaited())
        if len(seen) == 1:
            host.request(B)
            seen.append(is_awaited())
            assert host.failure(B) is None, "the work's time was taken for a load that is stuck"

    host = HostTier(HostTierSettings(max_bytes=10_000), loader, clock=clock, after_load=keep)
    load(host, A)
    assert seen == [False, True]
    assert host.load_next()
    assert seen == [False, True, False]
    host.close()


def test_loads_that_wait_behind_work_that_hangs_fail(loader: Loader, clock: FakeClock) -> None:
    found: list[StoreError | None] = []

    def hang(_: Callable[[], bool]) -> None:
        if not found:
            host.request(B)
            for seconds in (59, 2):
                clock.advance(seconds)
                found.append(host.failure(B))

    host = HostTier(HostTierSettings(max_bytes=10_000), loader, clock=clock, after_load=hang)
    load(host, A)
    assert found[0] is None
    assert found[1] is not None
    assert found[1].code == "adapter_load_stuck"
    assert host.failure(B) is None


def test_the_caller_never_waits_for_a_load(running: tuple[HostTier, threading.Event], loader: Loader) -> None:
    host, loaded = running
    gate, entered = threading.Event(), threading.Event()

    def block() -> None:
        entered.set()
        gate.wait(600)

    loader.meanwhile = block
    host.request(A)
    assert entered.wait(600)
    assert host.request(B)  # each of these would hang here if the lock were held during a load
    assert host.find(A) is None
    assert host.stats().loads == 0
    assert not loaded.is_set()
    gate.set()
    assert loaded.wait(600)


def test_many_threads_may_ask_at_once(running: tuple[HostTier, threading.Event], loader: Loader) -> None:
    host, _ = running
    digests = [digest_of(str(index)) for index in range(100)]

    def ask() -> None:
        for digest in digests:
            host.request(digest)
            host.find(digest)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    host.close()
    while host.load_next():
        continue
    assert sorted(loader.asked) == sorted(digests)
    assert host.stats().num_bytes == 40 * 100


def test_closing_ends_the_thread_even_with_loads_queued(loader: Loader) -> None:
    host = HostTier(HostTierSettings(max_bytes=100), loader)
    host.start()
    host.close()
    host.request(A)
    assert loader.asked == []
    assert not any(thread.name == "adapter-loader" for thread in threading.enumerate())


@pytest.mark.parametrize("field", ["max_bytes", "max_queue"])
def test_bad_settings_name_field_and_value(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        replace(HostTierSettings(max_bytes=1), **{field: 0})
