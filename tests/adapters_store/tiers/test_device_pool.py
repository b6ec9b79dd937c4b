"""Which adapters are on the device, which may be evicted, and which never are."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from adapters_store.base.description import AdapterDigest
from adapters_store.tiers.device_pool import DevicePool, DevicePoolSettings
from adapters_store.tiers.entries import PoolEntry
from support.worlds.adapter_memory import FakeClock, digest_of


def make_pool(capacity: int = 40, *, max_slots: int = 8, alignment: int = 1) -> DevicePool:
    settings = DevicePoolSettings(capacity_elements=capacity, max_slots=max_slots, alignment_elements=alignment)
    return DevicePool(settings, FakeClock())


def put(pool: DevicePool, name: str, size: int) -> PoolEntry:
    """A ready entry."""
    reservation = pool.reserve(digest_of(name), size)
    assert reservation is not None
    pool.mark_ready(reservation.entry)
    return reservation.entry


def names(pool: DevicePool) -> set[str]:
    return {entry.digest.removeprefix("sha256:") for entry in pool.entries()}


def test_an_entry_takes_its_own_size_rounded_to_a_cache_line() -> None:
    pool = make_pool(320, alignment=32)
    assert [put(pool, "a", 33).offset, put(pool, "b", 1).offset, put(pool, "c", 64).offset] == [0, 64, 96]
    assert pool.num_free_elements == 160


def test_the_longest_unused_goes_first() -> None:
    pool = make_pool()
    for name in "abcd":
        put(pool, name, 10)
    for name in "ab":
        pool.acquire(digest_of(name))
        pool.release(digest_of(name))
    reservation = pool.reserve(digest_of("e"), 10)
    assert reservation is not None
    assert [entry.digest for entry in reservation.evicted] == [digest_of("c")]
    assert names(pool) == {"a", "b", "d", "e"}
    assert pool.stats.evictions == 1


def test_in_use_copying_pinned_and_kept_entries_stay() -> None:
    pool = make_pool()
    for name in "abc":
        put(pool, name, 10)
    copying = pool.reserve(digest_of("d"), 10)
    assert copying is not None
    pool.acquire(digest_of("a"))
    pinned = pool.get(digest_of("b"))
    assert pinned is not None
    pinned.pinned = True
    assert pool.reserve(digest_of("e"), 10, keep={digest_of("c")}) is None
    assert names(pool) == {"a", "b", "c", "d"}
    assert pool.reserve(digest_of("e"), 10) is not None
    assert names(pool) == {"a", "b", "d", "e"}


def test_nothing_is_evicted_when_that_would_not_be_enough() -> None:
    pool = make_pool()
    for name in "abcd":
        put(pool, name, 10)
    pool.acquire(digest_of("b"))  # leaves holes of 10 and 20 at most
    assert pool.reserve(digest_of("e"), 21) is None
    assert pool.reserve(digest_of("f"), 100) is None
    assert names(pool) == {"a", "b", "c", "d"}
    assert pool.stats.evictions == 0


def test_entries_whose_going_would_not_help_are_spared() -> None:
    pool = make_pool()
    for name in "abcd":
        put(pool, name, 10)
    pool.acquire(digest_of("b"))
    reservation = pool.reserve(digest_of("e"), 20)  # a is older than c and d, but lies behind b
    assert reservation is not None
    assert {entry.digest for entry in reservation.evicted} == {digest_of("c"), digest_of("d")}
    assert names(pool) == {"a", "b", "e"}


def test_a_slot_is_reused_only_after_eviction() -> None:
    pool = make_pool(max_slots=2)
    a, b = put(pool, "a", 1), put(pool, "b", 1)
    assert {a.slot, b.slot} == {0, 1}
    pool.acquire(a.digest)
    c = pool.reserve(digest_of("c"), 1)
    assert c is not None
    assert (c.entry.slot, c.evicted) == (b.slot, (b,))
    assert pool.reserve(digest_of("d"), 1) is None


def test_only_a_ready_entry_is_given_out() -> None:
    pool = make_pool()
    reservation = pool.reserve(digest_of("a"), 10)
    assert reservation is not None
    assert pool.acquire(digest_of("a")) is None
    pool.mark_ready(reservation.entry)
    assert list(pool.ready()) == [digest_of("a")]
    assert pool.acquire(digest_of("a")) is reservation.entry
    assert (pool.stats.hits, pool.stats.activations, reservation.entry.ref_count) == (1, 1, 1)


def test_misuse_is_caught() -> None:
    pool = make_pool()
    entry = put(pool, "a", 10)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(entry.digest)
    with pytest.raises(AssertionError, match="has a range already"):
        pool.reserve(entry.digest, 10)
    pool.acquire(entry.digest)
    with pytest.raises(AssertionError, match="in use by 1"):
        pool.remove(entry)
    copying = pool.reserve(digest_of("b"), 1)
    assert copying is not None
    with pytest.raises(AssertionError, match="being copied"):
        pool.remove(copying.entry)


def test_pinned_entries_bound_what_could_ever_fit() -> None:
    pool = make_pool(40, max_slots=2)
    put(pool, "a", 10)
    middle = put(pool, "b", 10)
    assert pool.could_ever_fit(40)
    assert not pool.could_ever_fit(41)
    middle.pinned = True
    assert pool.could_ever_fit(20)
    assert not pool.could_ever_fit(21)
    first = pool.get(digest_of("a"))
    assert first is not None
    first.pinned = True
    assert not pool.could_ever_fit(1)  # no slot will ever be free


def test_random_use_keeps_places_apart_and_references_true() -> None:
    rng, pool = random.Random(7), make_pool(100, max_slots=5, alignment=4)
    sizes = {digest_of(str(index)): rng.randint(1, 50) for index in range(20)}
    held: list[AdapterDigest] = []
    places: dict[AdapterDigest, tuple[int, int]] = {}
    for _ in range(4000):
        digest = rng.choice(list(sizes))
        if held and rng.random() < 0.5:
            pool.release(held.pop(rng.randrange(len(held))))
        elif pool.get(digest) is None:
            reservation = pool.reserve(digest, sizes[digest])
            if reservation is not None and rng.random() < 0.9:
                pool.mark_ready(reservation.entry)
        elif pool.acquire(digest) is not None:
            held.append(digest)
        else:
            entry = pool.get(digest)
            assert entry is not None
            pool.mark_ready(entry)
        for entry in pool.entries():
            assert entry.ref_count == held.count(entry.digest)
            assert not entry.ref_count or places.get(entry.digest) in (None, (entry.slot, entry.offset))
        assert set(held) <= {entry.digest for entry in pool.entries()}
        places = {entry.digest: (entry.slot, entry.offset) for entry in pool.entries() if entry.ref_count}
        spans = sorted((entry.offset, entry.offset + entry.num_elements) for entry in pool.entries())
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
        assert len({entry.slot for entry in pool.entries()}) == len(pool.entries()) <= 5
    assert pool.stats.evictions > 100


@pytest.mark.parametrize(("field", "value"), [("max_slots", 0), ("capacity_elements", 31)])
def test_bad_settings_name_field_and_value(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field} .* got {value}"):
        replace(DevicePoolSettings(capacity_elements=64, max_slots=1), **{field: value})
